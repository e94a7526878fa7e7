"""The disk is full, and has room again."""

import contextlib
import os
import subprocess
from typing import ClassVar

from chaos.fault import PassingFault
from chaos.place import Place

_SIZE_MB = 32
_CHUNK = bytes(1 << 16)


class DiskFull(PassingFault):
    """Whatever write comes next fails."""

    name: ClassVar[str] = "disk full"
    how: ClassVar[str] = (
        f"the home is a tmpfs of {_SIZE_MB} MiB, filled to the last byte under load for 3 s "
        "(min_free_mb = 0, so that nothing holds back)"
    )
    hold_s: ClassVar[float] = 3.0
    runs: ClassVar[tuple[int, int]] = (3, 20)
    sign: ClassVar[str] = "action=short_of_space"
    is_met_while_held: ClassVar[bool] = True

    def obstacle(self) -> str | None:
        """Mounting is root's."""
        return None if os.geteuid() == 0 else "needs root, to mount a tmpfs"

    def prepare(self, place: Place) -> None:
        """Mount."""
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={_SIZE_MB}m", "tmpfs", place.root], check=True
        )
        place.incoming.mkdir()
        self._is_full = False

    def inject(self, place: Place) -> None:
        """Fill it, with files waiting; nobody can drop any more then."""
        for number in range(9000, 9010):
            self._drop(place, number)
        self._is_full = True
        with (place.root / "ballast").open("wb", buffering=0) as ballast:
            for chunk in (_CHUNK, bytes(512)):
                with contextlib.suppress(OSError):
                    while ballast.write(chunk):
                        pass

    def heal(self, place: Place) -> None:
        """Make room."""
        (place.root / "ballast").unlink()
        self._is_full = False

    def clean(self, place: Place) -> None:
        """Unmount."""
        subprocess.run(["umount", "-l", place.root], check=False)

    def _drop(self, place: Place, number: int) -> None:
        if not self._is_full:
            super()._drop(place, number)
