"""Removing what has been kept for long enough: never a file that is not finished with."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

from sqlalchemy import Engine

from lungwatch.atomicfile import fsync_dir
from lungwatch.daemon.backup import backups
from lungwatch.daemon.config import Config
from lungwatch.daemon.home import Home
from lungwatch.db.keeping import (
    Kept,
    forget_original,
    forget_overlay,
    kept_originals,
    kept_overlays,
)

Folder = Literal["done", "quarantine", "overlays", "backups"]
_FOLDERS: tuple[Folder, ...] = ("done", "quarantine", "overlays", "backups")
_GIB = 1024**3


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one folder may keep.

    Attributes
    ----------
    days, gb
        Age, and GiB in all; 0 for no limit.
    """

    days: int
    gb: float


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A file that all has been done with.

    Attributes
    ----------
    path
        Relative to the home; names a digest, a model or a time, and no patient.
    since
        When its last result came to its end; of a backup, when it was made; of an object that
        lungwatch made itself, when it came.
    row
        The row that names it; None for a backup, and for an object that lungwatch made itself.
    """

    folder: Folder
    path: str
    since: datetime
    size_bytes: int
    row: Kept | None


@dataclass(frozen=True, kw_only=True)
class Removal:
    """A file that is to go; the fields before `why` are those of `Candidate`.

    Attributes
    ----------
    why
        "age" or "space".
    reason
        The same in a line, with the key that says so.
    """

    folder: Folder
    path: str
    since: datetime
    size_bytes: int
    row: Kept | None
    why: Literal["age", "space"]
    reason: str


class Retention:
    """Applies the limits of a configuration to a home, beside a running daemon or without one.

    The row is changed first, on condition that the file is still finished with, then the file is
    removed. What a crash leaves between the two, `lungwatch reconcile` removes.
    """

    def __init__(self, config: Config, home: Home, engine: Engine) -> None:
        self._home = home
        self._engine = engine
        self._limits = {
            folder: Limits(
                days=getattr(config, f"retain_{folder}_days"),
                gb=getattr(config, f"retain_{folder}_gb"),
            )
            for folder in _FOLDERS
        }

    def plan(self, now: datetime) -> list[Removal]:
        """Return what the limits want removed: folder by folder, in each the oldest first.

        Raises
        ------
        DatabaseError
            If the database cannot be read.
        """
        found = sorted(self._candidates(), key=lambda item: item.since)
        return [
            removal
            for folder in _FOLDERS
            for removal in self._plan_folder(folder, [i for i in found if i.folder == folder], now)
        ]

    def _plan_folder(
        self, folder: Folder, found: list[Candidate], now: datetime
    ) -> Iterator[Removal]:
        limits = self._limits[folder]
        oldest = now - timedelta(days=limits.days)
        left = []
        for item in found:
            if limits.days and item.since < oldest:
                age = (now - item.since).days
                yield _removal(item, "age", f"{age} days old, retain_{folder}_days = {limits.days}")
            else:
                left.append(item)
        if not limits.gb:
            return
        # All that lies there counts, also what has to stay.
        used = _used(self._home.root / folder)
        used -= sum(item.size_bytes for item in found) - sum(item.size_bytes for item in left)
        why = f"{folder}/ holds {used / _GIB:.3g} GiB, retain_{folder}_gb = {limits.gb:g}"
        for item in left:
            if used <= limits.gb * _GIB:
                return
            yield _removal(item, "space", why)
            used -= item.size_bytes

    def remove(self, removal: Removal, now: datetime) -> bool:
        """Remove one file; False if it is in use again.

        Raises
        ------
        DatabaseError
            If the row cannot be changed; the file stays then.
        OSError
            If the file cannot be removed.
        """
        row = removal.row
        if row is not None:
            forgotten = (
                forget_overlay(self._engine, row, now)
                if removal.folder == "overlays"
                else forget_original(self._engine, row, now)
            )
            if not forgotten:
                return False
        path = self._home.absolute(removal.path)
        path.unlink(missing_ok=True)
        fsync_dir(path.parent)
        self._tidy(path.parent, self._home.root / removal.folder)
        return True

    def _candidates(self) -> Iterator[Candidate]:
        rows: list[tuple[Folder, Kept]] = [
            ("done" if row.path.startswith("done/") else "quarantine", row)
            for row in kept_originals(self._engine)
        ]
        rows += [("overlays", row) for row in kept_overlays(self._engine)]
        for folder, row in rows:
            if (size := self._size(row.path)) is not None:
                yield Candidate(
                    folder=folder, path=row.path, since=row.finished_at, size_bytes=size, row=row
                )
        # Of these there is no row.
        own = self._home.own_objects
        for path in sorted(own.iterdir()) if own.is_dir() else ():
            relative = self._home.relative(path)
            if (size := self._size(relative)) is not None:
                # Since it was moved there, whatever a copy has kept of another time.
                moved_at = datetime.fromtimestamp(path.stat().st_ctime, UTC)
                yield Candidate(
                    folder="quarantine", path=relative, since=moved_at, size_bytes=size, row=None
                )
        # The newest is the way back after a damage: it stays, however old or large.
        for path in backups(self._home.backups)[:-1]:
            relative = self._home.relative(path)
            if (size := self._size(relative)) is not None:
                made_at = datetime.fromtimestamp(path.stat().st_mtime, UTC)
                yield Candidate(
                    folder="backups", path=relative, since=made_at, size_bytes=size, row=None
                )

    def _size(self, relative: str) -> int | None:
        path = self._home.absolute(relative)
        # A link put there by somebody may lead anywhere; a missing file is reconcile's to tell.
        if not path.is_file() or path.resolve() != self._home.root.resolve() / relative:
            return None
        return path.stat().st_size

    @staticmethod
    def _tidy(folder: Path, root: Path) -> None:
        """Remove the date folders that have become empty."""
        while folder != root and not any(folder.iterdir()):
            try:
                folder.rmdir()
            except OSError:  # the daemon has just filed something there
                return
            folder = folder.parent


def _removal(item: Candidate, why: Literal["age", "space"], reason: str) -> Removal:
    return Removal(
        folder=item.folder,
        path=item.path,
        since=item.since,
        size_bytes=item.size_bytes,
        row=item.row,
        why=why,
        reason=reason,
    )


def _used(root: Path) -> int:
    """Return the bytes of all files below a folder, links not followed."""
    total = 0
    for folder, _, names in os.walk(root):
        for name in names:
            try:
                total += Path(folder, name).lstat().st_size
            except FileNotFoundError:  # the daemon has just moved it
                continue
    return total
