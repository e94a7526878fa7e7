"""A lasting trouble is said once, waited out by everybody, and let go of when the service ends."""

import errno
import logging
import threading

import pytest

from lungwatch.daemon.retry import OutageKind, Outages, ShutdownRequested, outage_of
from lungwatch.db.engine import DatabaseBusyError, DatabaseFullError
from lungwatch.errors import DatabaseError
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
        threading.Thread(target=lambda: answers.append(outages.ride_out(step))) for _ in range(3)
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
        outages.ride_out(step)
    assert outages.current == frozenset()


def test_once_abandoned_nobody_waits_and_nobody_tries_in_vain():
    outages, tries = Outages(), []

    def step():
        tries.append(1)
        raise DatabaseBusyError

    outages.abandon()
    for _ in range(2):
        with pytest.raises(ShutdownRequested):
            outages.ride_out(step)
    assert len(tries) == 1
