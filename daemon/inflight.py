"""How many files are between their claim and their end: the bound on memory."""

import threading


class InFlight:
    """A counted limit that can be waited on from both sides."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._count = 0
        self._ended = 0
        self._changed = threading.Condition()

    @property
    def count(self) -> int:
        """Files that hold a slot now."""
        with self._changed:
            return self._count

    @property
    def ended(self) -> int:
        """Files that have met their end so far."""
        with self._changed:
            return self._ended

    def acquire(self, timeout_s: float) -> bool:
        """Take a slot; False if none came free in time."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._count < self._limit, timeout_s):
                return False
            self._count += 1
            return True

    def release(self, *, ended: bool = True) -> None:
        """Give a slot back; its file has met its end, or is still where it was."""
        with self._changed:
            self._count -= 1
            self._ended += ended
            self._changed.notify_all()

    def wait_empty(self, timeout_s: float) -> bool:
        """Wait until no slot is held; False if that took too long."""
        with self._changed:
            return self._changed.wait_for(lambda: self._count == 0, timeout_s)
