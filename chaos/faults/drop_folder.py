"""The drop folder is not there for a while."""

import os
import subprocess
from typing import ClassVar

from chaos.fault import PassingFault
from chaos.place import Place
from tests.support.pictures import picture


class DropFolderGone(PassingFault):
    """It is renamed away, with files in it, and put back."""

    name: ClassVar[str] = "drop folder vanished"
    how: ClassVar[str] = "incoming/ is renamed away under load for 2 s, then put back"
    sign: ClassVar[str] = "action=drop_folder_lost"
    is_met_while_held: ClassVar[bool] = True

    def inject(self, place: Place) -> None:
        """Rename it away."""
        place.incoming.rename(place.root / "elsewhere")

    def heal(self, place: Place) -> None:
        """Put it back."""
        (place.root / "elsewhere").rename(place.incoming)

    def _drop(self, place: Place, number: int) -> None:
        if place.incoming.exists():
            super()._drop(place, number)
            return
        # Whoever holds the folder open goes on writing into it, wherever it is called.
        (place.root / "elsewhere" / f"{number}.png").write_bytes(picture(number))
        place.expect(f"{number}.png", picture(number))


class DropFolderCovered(PassingFault):
    """Another file system is mounted over it, as when a share comes late."""

    name: ClassVar[str] = "drop folder under a mount"
    how: ClassVar[str] = "an empty tmpfs is mounted over incoming/ for 2 s, files come before it"
    sign: ClassVar[str] = "action=drop_folder_lost"
    is_met_while_held: ClassVar[bool] = True

    def obstacle(self) -> str | None:
        """Mounting is root's."""
        return None if os.geteuid() == 0 else "needs root, to mount a tmpfs"

    def prepare(self, place: Place) -> None:  # noqa: ARG002
        """Nothing is mounted yet."""
        self._is_covered = False

    def inject(self, place: Place) -> None:
        """Cover it, with files beneath."""
        for number in range(8000, 8010):
            self._drop(place, number)
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", place.incoming], check=True)
        self._is_covered = True

    def heal(self, place: Place) -> None:
        """Uncover it."""
        subprocess.run(["umount", place.incoming], check=True)
        self._is_covered = False

    def clean(self, place: Place) -> None:
        """Leave no mount behind."""
        if self._is_covered:
            subprocess.run(["umount", "-l", place.incoming], check=False)

    def _drop(self, place: Place, number: int) -> None:
        # What is dropped into the covering file system goes with it: nothing to promise there.
        if not self._is_covered:
            super()._drop(place, number)
