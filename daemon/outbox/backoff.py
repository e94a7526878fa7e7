"""How long to wait before the next try: twice as long each time, up to a bound."""

from datetime import datetime, timedelta

# 2**64 times any first delay is beyond every bound; the power itself must not grow for ever.
_MOST_DOUBLINGS = 64


def delay_s(failures: int, *, first_s: float, most_s: float) -> float:
    """Return the seconds to wait after so many failures in a row.

    Parameters
    ----------
    failures
        At least 1.
    first_s, most_s
        After the first failure; after many.
    """
    if failures < 1:
        raise ValueError("there is nothing to wait for before the first failure")
    return min(first_s * 2.0 ** min(failures - 1, _MOST_DOUBLINGS), most_s)


class Backoff:
    """Which destinations are to be left alone, and until when.

    It is kept for each destination and not for each object: one that is down costs one
    attempt at a connection each time, however much waits for it.
    """

    def __init__(self, *, first_s: float, most_s: float) -> None:
        self._first_s = first_s
        self._most_s = most_s
        self._failures: dict[str, int] = {}
        self._until: dict[str, datetime] = {}

    def is_open(self, destination: str, now: datetime) -> bool:
        """Whether a destination may be tried."""
        until = self._until.get(destination)
        # A clock that was set back must not shut a destination off until it has caught up.
        longest = timedelta(seconds=self._most_s)
        return until is None or now >= until or until - now > longest

    def failed(self, destination: str, now: datetime) -> datetime:
        """Note that a destination was not reached; return when to try again."""
        failures = self._failures.get(destination, 0) + 1
        self._failures[destination] = failures
        self._until[destination] = now + timedelta(seconds=self.after(failures))
        return self._until[destination]

    def reached(self, destination: str) -> None:
        """Note that a destination answers."""
        self._failures.pop(destination, None)
        self._until.pop(destination, None)

    def after(self, failures: int) -> float:
        """Return the seconds to wait after so many failures in a row."""
        return delay_s(failures, first_s=self._first_s, most_s=self._most_s)
