"""A clock that a test sets."""

from datetime import UTC, datetime, timedelta

START = datetime(2026, 1, 2, 12, tzinfo=UTC)


class ManualClock:
    """Stands still until a test moves it; wall clock and monotonic clock go together.

    Attributes
    ----------
    time
        The wall-clock time, aware.
    """

    def __init__(self, time: datetime = START) -> None:
        self._start = time
        self.time = time

    def now(self) -> datetime:
        """Return the wall-clock time."""
        return self.time

    def monotonic(self) -> float:
        """Return the seconds since 100 s before the first time."""
        return 100 + (self.time - self._start).total_seconds()

    def advance(self, seconds: float) -> None:
        """Let some time pass."""
        self.time += timedelta(seconds=seconds)
