"""A destination that is down is left alone for longer each time, and never for ever."""

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lungwatch.daemon.pacs.scu import Backoff, delay_s

T0 = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
ONE, OTHER = "PACS@a:104", "PACS@b:104"


def test_the_delay_doubles_up_to_its_bound() -> None:
    delays = [delay_s(failures, first_s=5, most_s=900) for failures in range(1, 11)]
    assert delays == [5, 10, 20, 40, 80, 160, 320, 640, 900, 900]


@given(failures=st.integers(1, 10**9), first_s=st.floats(0.1, 3600), factor=st.floats(1, 1e4))
def test_the_delay_never_leaves_its_bounds(failures: int, first_s: float, factor: float) -> None:
    most_s = first_s * factor
    assert first_s <= delay_s(failures, first_s=first_s, most_s=most_s) <= most_s


def test_before_the_first_failure_there_is_no_delay() -> None:
    with pytest.raises(ValueError, match="before the first failure"):
        delay_s(0, first_s=5, most_s=900)


def test_a_destination_is_left_alone_until_its_time_and_the_other_is_not() -> None:
    backoff = Backoff(first_s=5, most_s=900)
    assert backoff.is_open(ONE, T0)
    until = backoff.failed(ONE, T0)
    assert until == T0 + timedelta(seconds=5)
    assert not backoff.is_open(ONE, until - timedelta(milliseconds=1))
    assert backoff.is_open(ONE, until)
    assert backoff.is_open(OTHER, T0)


def test_failures_in_a_row_lengthen_the_wait_and_an_answer_ends_it() -> None:
    backoff = Backoff(first_s=5, most_s=900)
    backoff.failed(ONE, T0)
    assert backoff.failed(ONE, T0) == T0 + timedelta(seconds=10)
    backoff.reached(ONE)
    assert backoff.is_open(ONE, T0)
    assert backoff.failed(ONE, T0) == T0 + timedelta(seconds=5)


def test_a_clock_that_is_set_back_shuts_nothing_off() -> None:
    backoff = Backoff(first_s=5, most_s=900)
    backoff.failed(ONE, T0)
    assert backoff.is_open(ONE, T0 - timedelta(days=365))
