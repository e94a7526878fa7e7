"""The daemon gets no more memory for a while, from the limit of a process or of a group."""

import resource
from pathlib import Path
from typing import ClassVar

from chaos import cgroup
from chaos.cgroup import MemoryGroup
from chaos.fault import PassingFault
from chaos.pictures import large
from chaos.place import Place

_ROOM = 4 << 20


class MemoryPressure(PassingFault):
    """Its address space is limited to what it has just now."""

    name: ClassVar[str] = "memory pressure"
    how: ClassVar[str] = "RLIMIT_AS of the running daemon is set to its size for 2 s, then lifted"

    def inject(self, place: Place) -> None:
        """Allow nothing more."""
        assert place.process is not None
        status = Path(f"/proc/{place.process.pid}/status").read_text()
        (size,) = [line for line in status.splitlines() if line.startswith("VmSize")]
        self._limit(place, int(size.split()[1]) * 1024)

    def heal(self, place: Place) -> None:
        """Allow it again."""
        assert place.process is not None
        if place.process.poll() is None:
            self._limit(place, resource.RLIM_INFINITY)

    def _limit(self, place: Place, size: int) -> None:
        assert place.process is not None
        _, hard = resource.prlimit(place.process.pid, resource.RLIMIT_AS)
        resource.prlimit(place.process.pid, resource.RLIMIT_AS, (size, hard))


class OutOfMemory(PassingFault):
    """The kernel kills the process that is too large for its control group."""

    name: ClassVar[str] = "OOM killer"
    how: ClassVar[str] = (
        "the daemon runs in a control group whose memory limit is lowered to 4 MiB above what it "
        "holds, for 3 s, and large images come; the kernel kills the daemon or a decoder"
    )
    hold_s: ClassVar[float] = 3.0

    def obstacle(self) -> str | None:
        """Control groups are root's, and may not be there."""
        return cgroup.obstacle()

    def launch(self, place: Place) -> None:
        """Start it in a group of its own."""
        self._group = MemoryGroup(place.root.name).__enter__()
        self._kills = 0
        place.on_start = self._group.add
        place.start_ready()

    def inject(self, place: Place) -> None:
        """Allow next to nothing more, and ask for much."""
        self._group.limit(self._group.anonymous + _ROOM)
        for number in range(6000, 6004):
            place.drop(f"{number}.png", large(number))

    def heal(self, place: Place) -> None:  # noqa: ARG002
        """Allow it again."""
        self._kills = self._group.kills
        self._group.limit(None)

    def strikes(self, place: Place) -> int:  # noqa: ARG002
        """Count the kernel's kills."""
        return self._kills

    def clean(self, place: Place) -> None:  # noqa: ARG002
        """Leave no group behind."""
        self._group.__exit__()
