"""The time, passed in so that whatever depends on it can be tested without waiting."""

import time
from datetime import UTC, datetime
from typing import Protocol


class Clock(Protocol):
    """What the daemon asks of a clock."""

    def now(self) -> datetime:
        """Return the wall-clock time, aware, in UTC. It may jump."""

    def monotonic(self) -> float:
        """Return seconds that never jump, from an arbitrary start."""


class SystemClock:
    """The machine's own clock."""

    def now(self) -> datetime:
        """Return the wall-clock time, aware, in UTC."""
        return datetime.now(UTC)

    def monotonic(self) -> float:
        """Return `time.monotonic()`."""
        return time.monotonic()
