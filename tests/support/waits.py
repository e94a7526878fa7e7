"""Waiting for an event, with what to show if it does not come."""

import time
from collections.abc import Callable

# Longer than anything takes on a busy machine: what does not happen by then has hung.
PATIENCE_S = 120.0
_POLL_S = 0.02


def wait_for(
    is_true: Callable[[], object],
    show: Callable[[], object] = lambda: "it does not happen",
    timeout_s: float = PATIENCE_S,
    *,
    error: type[Exception] = AssertionError,
) -> None:
    """Wait until something holds.

    Parameters
    ----------
    is_true
        Asked again and again.
    show
        What it returns at the end is the failure's message.

    Raises
    ------
    AssertionError
        Or another `error`, if it does not hold in time.
    """
    deadline = time.monotonic() + timeout_s
    while not is_true():
        if time.monotonic() > deadline:
            raise error(f"not within {timeout_s:g} s: {show()}")
        time.sleep(_POLL_S)
