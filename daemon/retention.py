"""Backups of a home's database, and retention: removal of files past their limits."""

import contextlib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

from sqlalchemy import URL, Engine

from lungwatch.daemon.config import Config
from lungwatch.daemon.home import Home
from lungwatch.daemon.stage import crashpoint
from lungwatch.db.audit import AuditEvent, Outcome, record_events
from lungwatch.db.maintenance import (
    RemovableFile,
    check_copy,
    checkpoint_wal,
    copy_database,
    mark_original_removed,
    mark_overlay_removed,
    removable_originals,
    removable_overlays,
    restore_marker,
    sqlite_path,
)
from lungwatch.errors import DatabaseError, HomeError, NotFoundError
from lungwatch.files import fsync_dir, make_dirs, write_atomic

_SUFFIX = ".db"
_STAMP = "%Y%m%dT%H%M%S.%fZ"
# What an administrator laid beside them sorts anywhere: taken for the newest, it would cost the
# backup that is.
_NAME = re.compile(r"lungwatch-\d{8}T\d{6}\.\d{6}Z\.db", re.ASCII)
# Beside the database lie SQLite's own files, which belong to it alone.
_COMPANIONS = ("-wal", "-shm")


@dataclass(frozen=True, kw_only=True)
class Backup:
    """One backup.

    Attributes
    ----------
    removed
        Older ones that made room for it.
    """

    path: Path
    size_bytes: int
    removed: tuple[Path, ...]


def create_backup(
    home: Home, url: URL, now: datetime, *, keep: int, output: Path | None = None
) -> Backup:
    """Copy the database, beside a running daemon or without one, and prove the copy whole.

    Parameters
    ----------
    now
        In UTC; names the file.
    keep
        How many are kept in its folder, this one among them; 0 for all.
    output
        A folder, or the name of a file that is not there yet; None for the home's `backups/`.

    Raises
    ------
    DatabaseError
        If the database cannot be copied whole, or there is a file of that name.
    NotFoundError
        If there is no database yet, or no folder to write to.
    """
    source = sqlite_path(url)
    if not source.is_file():
        raise NotFoundError("there is no database yet; run `lungwatch run` first")
    if output is None:
        make_dirs(home.backups)
        output = home.backups
    target = output
    if output.is_dir():
        target = output / f"lungwatch-{now.strftime(_STAMP)}{_SUFFIX}"
    elif output.exists():
        raise DatabaseError(f"{output} is there already: name another file, or a folder")
    elif not output.parent.is_dir():
        raise NotFoundError(f"there is no folder {output.parent}: create it first")
    copy_database(source, target)
    old = backups(output)[:-keep] if keep and output.is_dir() else []
    for path in old:
        path.unlink()
    return Backup(path=target, size_bytes=target.stat().st_size, removed=tuple(old))


def backups(folder: Path) -> list[Path]:
    """Return the backups in a folder, the oldest first; files of other names are none."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name))


@contextlib.contextmanager
def restored(url: URL, backup: Path, now: datetime) -> Iterator[Path | None]:
    """Put a backup in the database's place; the home must be locked.

    Whenever it breaks off, there is either the former database or the restored one under the
    database's name, each whole by itself, and from the first change until the context ends
    nothing else opens it: what happened after the backup is in the folders alone, and
    `Reconciler` has to put files that the backup does not know back into the drop folder.

    Yields
    ------
    Path or None
        Where the database that was there is now; it is kept.

    Raises
    ------
    DatabaseError
        If the backup is not whole or cannot be copied, and nothing is changed then; or if its
        place cannot be changed.
    """
    database = sqlite_path(url)
    if not backup.is_file():
        raise NotFoundError(f"no backup at {backup}")
    check_copy(backup)
    fresh = database.with_name(f"{database.name}.restored")
    copy_database(backup, fresh)
    crashpoint("restore_copied")
    aside = database.with_name(f"{database.name}.before-restore-{now.strftime(_STAMP)}")
    marker = restore_marker(database)
    try:
        write_atomic(marker, f"{backup.absolute()}\n".encode(errors="surrogateescape"))
        crashpoint("restore_marked")
        is_there = _swap(database, fresh, aside)
        yield aside if is_there else None
        marker.unlink()
        fsync_dir(marker.parent)
    except OSError as error:
        raise DatabaseError(f"the backup cannot be restored: {error.strerror}") from error


def _swap(database: Path, fresh: Path, aside: Path) -> bool:
    """Exchange the database for a fresh file; say whether there was one, now kept aside."""
    # There is a database under its name at every moment: a daemon would begin a new one.
    is_there = database.exists()
    if is_there:
        # Its log belongs to its name and would be taken for the restored one's.
        checkpoint_wal(database)
        aside.hardlink_to(database)
        crashpoint("restore_kept")
    for companion in _COMPANIONS:
        path = database.with_name(database.name + companion)
        if path.exists():
            path.rename(aside.with_name(aside.name + companion))
    fsync_dir(database.parent)
    crashpoint("restore_parted")
    fresh.replace(database)
    fsync_dir(database.parent)
    crashpoint("restore_replaced")
    return is_there


Folder = Literal["done", "quarantine", "overlays", "backups"]
_FOLDERS: tuple[Folder, ...] = ("done", "quarantine", "overlays", "backups")
_GIB = 1024**3


@dataclass(frozen=True, kw_only=True)
class FolderLimits:
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
    row: RemovableFile | None


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
    row: RemovableFile | None
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
            folder: FolderLimits(
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

    def run(self, removals: Sequence[Removal]) -> list[Removal]:
        """Remove planned files and return those removed.

        The audit trail gets an event before the first removal, and one for each folder after.

        Raises
        ------
        DatabaseError
            If the database cannot be changed.
        HomeError
            If a file cannot be removed.
        """
        self._record("home", "started", {"chosen": len(removals)})
        removed = []
        failed_in = None
        try:
            for removal in removals:
                failed_in = removal.folder
                if self.remove(removal, datetime.now(UTC)):
                    removed.append(removal)
            failed_in = None
        except OSError as error:
            raise HomeError(f"a file cannot be removed: {error.strerror}") from error
        finally:
            for folder in sorted({removal.folder for removal in removals}):
                sizes = [removal.size_bytes for removal in removed if removal.folder == folder]
                outcome: Outcome = "failed" if folder == failed_in else "ok"
                self._record(folder, outcome, {"files": len(sizes), "size_bytes": sum(sizes)})
        return removed

    def _record(self, target: str, outcome: Outcome, detail: dict[str, object]) -> None:
        event = AuditEvent(action="retention run", target=target, outcome=outcome, detail=detail)
        record_events(self._engine, datetime.now(UTC), [event])

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
                mark_overlay_removed(self._engine, row, now)
                if removal.folder == "overlays"
                else mark_original_removed(self._engine, row, now)
            )
            if not forgotten:
                return False
        path = self._home.absolute(removal.path)
        path.unlink(missing_ok=True)
        fsync_dir(path.parent)
        self._tidy(path.parent, self._home.root / removal.folder)
        return True

    def _candidates(self) -> Iterator[Candidate]:
        rows: list[tuple[Folder, RemovableFile]] = [
            ("done" if row.path.startswith("done/") else "quarantine", row)
            for row in removable_originals(self._engine)
        ]
        rows += [("overlays", row) for row in removable_overlays(self._engine)]
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
