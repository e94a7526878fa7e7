"""The kernel's events are lost, or refused from the start."""

import errno
import uuid
from pathlib import Path
from typing import ClassVar

from chaos import shim
from chaos.fault import PassingFault
from chaos.place import Place
from chaos.shim import Shim

_QUEUE = Path("/proc/sys/fs/inotify/max_queued_events")


class EventsLost(PassingFault):
    """The queue overflows while nobody reads it."""

    name: ClassVar[str] = "inotify overflow"
    how: ClassVar[str] = (
        "the daemon is stopped (SIGSTOP), the queue is filled beyond max_queued_events, then "
        "files come, then it goes on"
    )
    hold_s: ClassVar[float] = 0.5
    sign: ClassVar[str] = "action=inotify_overflow"

    def obstacle(self) -> str | None:
        """Without the limit nobody knows when it is passed."""
        return None if _QUEUE.exists() else "this kernel has no inotify"

    def inject(self, place: Place) -> None:
        """Stop it and fill the queue."""
        place.suspend()
        # Two names in turn: equal events that follow each other are counted once.
        noise = [place.incoming / f".{uuid.uuid4().hex}" for _ in range(2)]
        for _ in range(int(_QUEUE.read_text())):
            for path in noise:
                path.touch()
        for path in noise:
            path.unlink()

    def heal(self, place: Place) -> None:
        """Let it go on."""
        place.resume()


class NoWatches(PassingFault):
    """The user's watches are used up when the daemon starts."""

    name: ClassVar[str] = "no inotify watches"
    how: ClassVar[str] = (
        "inotify_init1 and inotify_add_watch fail with ENOSPC at the start (LD_PRELOAD)"
    )
    hold_s: ClassVar[float] = 1.0

    def obstacle(self) -> str | None:
        """Without a compiler there is no library that refuses."""
        return shim.obstacle()

    def launch(self, place: Place) -> None:
        """Start without watches."""
        self._shim = Shim(place)
        self._shim.set(no_inotify=errno.ENOSPC)
        place.start_ready(**self._shim.env)

    def inject(self, place: Place) -> None:
        """It is there from the start."""

    def heal(self, place: Place) -> None:  # noqa: ARG002
        """Watches are free again."""
        self._failed = self._shim.failed
        self._shim.set()

    def strikes(self, place: Place) -> int:  # noqa: ARG002
        """Count the calls that were refused."""
        return self._failed
