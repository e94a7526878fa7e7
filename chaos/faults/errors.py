"""Calls on the home's files fail for a while, as on a network file system or a dying disk."""

import errno
from typing import ClassVar

from chaos import shim
from chaos.fault import PassingFault
from chaos.place import Place
from chaos.shim import Shim


class _Errors(PassingFault):
    """Every so many-th open, write, rename, fsync, unlink or mkdir fails."""

    error: ClassVar[int]
    every: ClassVar[int] = 5
    spare_sqlite: ClassVar[bool] = False

    def obstacle(self) -> str | None:
        """Without a compiler there is no library that fails."""
        return shim.obstacle()

    def launch(self, place: Place) -> None:
        """Start with the library preloaded."""
        self._shim = Shim(place)
        place.env.update(self._shim.env)
        place.start_ready()

    def inject(self, place: Place) -> None:  # noqa: ARG002
        """Have calls fail."""
        self._shim.set(error=self.error, every=self.every, spare_sqlite=self.spare_sqlite)

    def heal(self, place: Place) -> None:  # noqa: ARG002
        """Have them succeed again."""
        self._failed = self._shim.failed
        self._shim.set()

    def strikes(self, place: Place) -> int:  # noqa: ARG002
        """Count the calls that failed."""
        return self._failed

    def clean(self, place: Place) -> None:
        """Let `reconcile` run without the library."""
        for name in self._shim.env:
            place.env.pop(name, None)


class IoError(_Errors):
    """The disk does not answer."""

    name: ClassVar[str] = "EIO"
    how: ClassVar[str] = (
        "every 5th open, write, rename, fsync … in the home fails with EIO for 2 s, those of "
        "SQLite included (LD_PRELOAD)"
    )
    error: ClassVar[int] = errno.EIO


class StaleHandle(_Errors):
    """The file server forgot."""

    name: ClassVar[str] = "ESTALE"
    how: ClassVar[str] = "every 3rd such call outside the database fails with ESTALE for 2 s"
    error: ClassVar[int] = errno.ESTALE
    every: ClassVar[int] = 3
    spare_sqlite: ClassVar[bool] = True


class ReadOnly(_Errors):
    """The kernel mounted it read-only."""

    name: ClassVar[str] = "home read-only"
    how: ClassVar[str] = "every such call outside the database fails with EROFS for 2 s"
    error: ClassVar[int] = errno.EROFS
    every: ClassVar[int] = 1
    spare_sqlite: ClassVar[bool] = True
