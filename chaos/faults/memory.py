"""The daemon gets no more memory for a while: it is refused, or costs a process its life."""

from typing import ClassVar

from chaos import cgroup, shim
from chaos.cgroup import MemoryGroup
from chaos.fault import PassingFault
from chaos.place import Place
from chaos.shim import Shim
from tests.support.pictures import large

_ROOM = 4 << 20


class MemoryPressure(PassingFault):
    """The system gives no more, now and then.

    Not by RLIMIT_AS or RLIMIT_DATA: what the daemon has set aside by then serves it on, and
    nothing is refused.
    """

    name: ClassVar[str] = "memory pressure"
    how: ClassVar[str] = (
        "every 20th allocation of 16 KiB or more in the daemon is refused for 2 s (LD_PRELOAD)"
    )
    every: ClassVar[int] = 20

    def obstacle(self) -> str | None:
        """Without a compiler there is no library that refuses."""
        return shim.obstacle()

    def launch(self, place: Place) -> None:
        """Start with the library preloaded."""
        self._shim = Shim(place)
        place.start_ready(**self._shim.env)

    def inject(self, place: Place) -> None:  # noqa: ARG002
        """Refuse."""
        self._shim.set(starve=self.every)

    def heal(self, place: Place) -> None:  # noqa: ARG002
        """Give again."""
        self._refused = self._shim.no_memory
        self._shim.set()

    def strikes(self, place: Place) -> int:  # noqa: ARG002
        """Count the allocations that were refused."""
        return self._refused


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
