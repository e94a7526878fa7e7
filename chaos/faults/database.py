"""The database is locked, replaced, or damaged."""

import sqlite3
import time
from contextlib import closing
from typing import ClassVar

from chaos.fault import PassingFault, RepeatedFault, Trial
from chaos.place import ChaosError, Place
from tests.support.pictures import picture

_PAGE = 4096


class DatabaseLocked(PassingFault):
    """Another process holds the write lock for longer than the daemon waits for it."""

    name: ClassVar[str] = "database locked"
    how: ClassVar[str] = "another process holds a write transaction for 12 s (busy timeout: 10 s)"
    hold_s: ClassVar[float] = 12.0
    sign: ClassVar[str] = "action=database_away"
    is_met_while_held: ClassVar[bool] = True

    def inject(self, place: Place) -> None:
        """Take the lock."""
        self._connection = sqlite3.connect(place.database, timeout=30, isolation_level=None)
        self._connection.execute("BEGIN IMMEDIATE")

    def heal(self, place: Place) -> None:  # noqa: ARG002
        """Give it back."""
        self._connection.rollback()
        self._connection.close()


class DatabaseReplaced(PassingFault):
    """A copy is moved over the database while files are being worked on, later the right one."""

    name: ClassVar[str] = "database replaced"
    how: ClassVar[str] = (
        "a copy of the SQLite file is renamed over it under load, the log stays; after 2 s and the "
        "daemon's notice the right file is renamed back"
    )
    sign: ClassVar[str] = "action=database_replaced"
    is_met_while_held: ClassVar[bool] = True

    def inject(self, place: Place) -> None:
        """Move a copy over it, as who restores a backup beside a running daemon does."""
        self._right, copy = place.root / "right.db", place.root / "copy.db"
        with (
            closing(sqlite3.connect(place.database, timeout=30)) as source,
            closing(sqlite3.connect(copy)) as target,
        ):
            source.backup(target)
        self._right.hardlink_to(place.database)
        copy.rename(place.database)

    def heal(self, place: Place) -> None:
        """Move the right one back."""
        self._right.rename(place.database)


class CorruptedPage(RepeatedFault):
    """A page of the file is overwritten while no daemon runs."""

    name: ClassVar[str] = "database page overwritten"
    how: ClassVar[str] = (
        "16 KiB of the SQLite file are overwritten; the start has to refuse; then `lungwatch "
        "backup restore` of a backup older than half of the files, and `lungwatch reconcile`"
    )

    def _trial(self, place: Place, run: int) -> Trial:
        """Back up after half of the files, damage after all, restore, reconcile, drop more."""
        self._work_off(place, range(run * 100, run * 100 + 10))
        self._expect(place, "backup", "create")
        self._work_off(place, range(run * 100 + 10, run * 100 + 20))
        with place.database.open("r+b") as file:
            file.seek(2 * _PAGE)
            file.write(b"\xa5" * 4 * _PAGE)
        refused = place.start().wait(60)
        if refused != 1 or "Traceback" in place.log():
            raise ChaosError(f"a damaged database was not refused: {place.log()[-300:]}")
        started_s = time.monotonic()
        self._expect(place, "backup", "restore")
        self._expect(place, "reconcile")
        place.start()
        recovery_s = place.next_end_s(started_s)
        place.settle()
        return Trial(
            audit=place.audit(), recovery_s=recovery_s, injected=1, note="refused, then restored"
        )

    def _work_off(self, place: Place, numbers: range) -> None:
        for number in numbers:
            place.drop(f"{number}.png", picture(number))
        place.start()
        place.settle()

    def _expect(self, place: Place, *command: str) -> None:
        said = place.command(*command)
        if said.returncode:
            raise ChaosError(f"{' '.join(command)}: {said.stderr[-300:]}")
