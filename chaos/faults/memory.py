"""The daemon gets no more memory for a while."""

import resource
from pathlib import Path
from typing import ClassVar

from chaos.fault import PassingFault
from chaos.place import Place


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
