"""An outage is logged once and waited out by all threads, until the service stops."""

import errno
import logging
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lungwatch.daemon import retry as module
from lungwatch.daemon.retry import (
    Backoff,
    OutageKind,
    Outages,
    ShutdownRequested,
    delay_s,
    outage_of,
)
from lungwatch.db.engine import DatabaseBusyError, DatabaseFullError
from lungwatch.errors import DatabaseError, ProcessingFailed, Reason, TransientError
from tests.support.waits import wait_for


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (OSError(errno.ENOSPC, "full"), OutageKind.SPACE),
        (OSError(errno.EDQUOT, "full"), OutageKind.SPACE),
        (OSError(errno.EROFS, "read-only"), OutageKind.READ_ONLY),
        (DatabaseFullError(), OutageKind.SPACE),
        (DatabaseBusyError(), OutageKind.DATABASE),
        (OSError(errno.EIO, "passing"), None),
        (DatabaseError("damaged"), None),
        (ValueError(), None),
    ],
)
def test_what_lasts_is_told_from_what_passes_and_from_mistakes(error, kind):
    assert outage_of(error) is kind


def test_several_that_wait_for_the_same_thing_say_so_once(caplog):
    outages, is_over = Outages(), threading.Event()
    caplog.set_level(logging.WARNING, "lungwatch")
    logging.getLogger("lungwatch").propagate = True

    def step():
        if not is_over.is_set():
            raise OSError(errno.ENOSPC, "No space left on device")
        return 1

    answers = []
    threads = [
        threading.Thread(target=lambda: answers.append(outages.wait_out(step))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    wait_for(lambda: "short_of_space" in caplog.text)
    assert outages.current == {OutageKind.SPACE}
    is_over.set()
    for thread in threads:
        thread.join()
    assert answers == [1, 1, 1]
    assert outages.current == frozenset()
    actions = [record.getMessage().split()[0] for record in caplog.records]
    assert actions[0] == "action=short_of_space"
    assert actions[-1] == "action=space_back"


def test_another_error_ends_the_waiting_and_is_passed_on():
    errors = [OSError(errno.EROFS, "read-only"), ValueError("a mistake")]
    outages = Outages()

    def step():
        raise errors.pop(0)

    with pytest.raises(ValueError, match="a mistake"):
        outages.wait_out(step)
    assert outages.current == frozenset()


def test_once_shut_down_nobody_waits_and_nobody_tries_in_vain():
    outages, tries = Outages(), []

    def step():
        tries.append(1)
        raise DatabaseBusyError

    outages.shut_down()
    for _ in range(2):
        with pytest.raises(ShutdownRequested):
            outages.wait_out(step)
    assert len(tries) == 1


def passing(errors):
    """Return a step that raises the errors one after the other, then returns 1."""

    def step():
        if errors:
            raise errors.pop(0)
        return 1

    return step


def retry(outages, step, retries=3):
    waits = []
    answer = outages.retry(step, retries=retries, sha256="ab" * 32, on_wait=lambda: waits.append(1))
    return answer, len(waits)


@pytest.fixture
def no_delay(monkeypatch):
    monkeypatch.setattr(module, "delay_s", lambda *_, **__: 0.0)


@pytest.mark.usefixtures("no_delay")
def test_a_transient_error_is_retried_and_another_one_is_not():
    busy, crashed = OSError(errno.EIO, "busy"), TransientError("the decoder was killed")
    assert retry(Outages(), passing([busy, crashed])) == (1, 2)
    with pytest.raises(PermissionError):
        retry(Outages(), passing([busy, PermissionError(errno.EACCES, "no")]))


@pytest.mark.usefixtures("no_delay")
def test_after_the_last_retry_the_file_fails():
    def step():
        raise OSError(errno.EIO, "Input/output error")

    with pytest.raises(ProcessingFailed, match="retries exhausted: Input/output error") as caught:
        retry(Outages(), step, retries=2)
    assert caught.value.reason is Reason.RETRIES_EXHAUSTED


def test_a_retry_that_the_shutdown_meets_leaves_the_file_claimed():
    outages = Outages()
    outages.shut_down()
    with pytest.raises(ShutdownRequested):
        retry(outages, passing([OSError(errno.EIO, "busy")]))


def test_the_delay_doubles_up_to_its_bound():
    delays = [delay_s(failures, first_s=5, most_s=900) for failures in range(1, 11)]
    assert delays == [5, 10, 20, 40, 80, 160, 320, 640, 900, 900]


@given(failures=st.integers(1, 10**9), first_s=st.floats(0.1, 3600), factor=st.floats(1, 1e4))
def test_the_delay_never_leaves_its_bounds(failures, first_s, factor):
    most_s = first_s * factor
    assert first_s <= delay_s(failures, first_s=first_s, most_s=most_s) <= most_s


def test_before_the_first_failure_there_is_no_delay():
    with pytest.raises(ValueError, match="before the first failure"):
        delay_s(0, most_s=900)


def test_a_key_is_not_due_until_its_time_and_the_other_is():
    backoff = Backoff(first_s=5, most_s=900)
    assert backoff.is_due("one", 100.0)
    assert backoff.failed("one", 100.0) == 5.0
    assert not backoff.is_due("one", 104.999)
    assert backoff.is_due("one", 105.0)
    assert backoff.is_due("other", 100.0)


def test_failures_in_a_row_lengthen_the_wait_and_success_ends_it():
    backoff = Backoff(first_s=5, most_s=900)
    backoff.failed("one", 100.0)
    assert backoff.failed("one", 100.0) == 10.0
    assert (list(backoff), backoff.failures("one")) == (["one"], 2)
    backoff.succeeded("one")
    assert (list(backoff), backoff.failures("one")) == ([], 0)
    assert backoff.is_due("one", 100.0)
    assert backoff.failed("one", 100.0) == 5.0


def test_a_clock_that_is_set_back_delays_nothing():
    backoff = Backoff(first_s=5, most_s=900)
    backoff.failed("one", 1e9)
    assert backoff.is_due("one", 1e9 - 365 * 86400)
