"""What lies in the drop folder and has not been claimed, for those who ask from other threads."""

import threading
from collections.abc import Mapping
from pathlib import Path


class Waiting:
    """The files that wait, as the last look at the drop folder found them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._since: dict[Path, float] = {}

    @property
    def count(self) -> int:
        """How many wait."""
        with self._lock:
            return len(self._since)

    @property
    def oldest_at(self) -> float | None:
        """When the oldest of them came, in seconds since the epoch; None if none waits."""
        with self._lock:
            return min(self._since.values(), default=None)

    def replace(self, since: Mapping[Path, float]) -> None:
        """Take over a new look: the files and when each came, in seconds since the epoch."""
        with self._lock:
            self._since = dict(since)

    def leave(self, path: Path) -> None:
        """Note that a file waits no longer."""
        with self._lock:
            self._since.pop(path, None)
