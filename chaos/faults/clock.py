"""The clock is set while files are being worked on."""

import time
from typing import ClassVar

from chaos import shim
from chaos.fault import PassingFault
from chaos.place import Place
from chaos.shim import DAY_NS, Shim


class ClockJump(PassingFault):
    """A day forth, and a day back beyond where it was."""

    name: ClassVar[str] = "clock jumps"
    how: ClassVar[str] = "the time of day is moved by +1 day, then to -1 day (LD_PRELOAD)"

    def obstacle(self) -> str | None:
        """Without a compiler there is no library that tells another time."""
        return shim.obstacle()

    def launch(self, place: Place) -> None:
        """Start with the library preloaded."""
        self._shim = Shim(place)
        place.start_ready(**self._shim.env)

    def inject(self, place: Place) -> None:  # noqa: ARG002
        """Jump forth, and later back."""
        self._shim.set(clock_shift_ns=DAY_NS)
        time.sleep(1)
        self._readings = self._shim.shifted
        self._shim.set(clock_shift_ns=-DAY_NS)

    def heal(self, place: Place) -> None:  # noqa: ARG002
        """Set it right."""
        self._readings += self._shim.shifted
        self._shim.set()

    def strikes(self, place: Place) -> int:  # noqa: ARG002
        """Count the readings of the moved clock."""
        return self._readings
