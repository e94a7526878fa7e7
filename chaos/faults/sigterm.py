"""The service manager asks it to end."""

from typing import ClassVar

from chaos.fault import PassingFault
from chaos.place import ChaosError, Place


class Sigterm(PassingFault):
    """Under load, and it has to end by itself with status 0."""

    name: ClassVar[str] = "SIGTERM under load"
    how: ClassVar[str] = "SIGTERM with files in hand and waiting; status 0, then started again"
    hold_s: ClassVar[float] = 0.0
    runs: ClassVar[tuple[int, int]] = (3, 20)
    sign: ClassVar[str] = "action=stopped"

    def inject(self, place: Place) -> None:
        """Ask, and wait for the end."""
        status = place.stop()
        if status:
            raise ChaosError(f"status {status} after SIGTERM: {place.log()[-300:]}")

    def heal(self, place: Place) -> None:
        """Start again."""
        place.start()
