"""Backups of a home's database, disk usage, and removal of files past their limits."""

import contextlib
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

from sqlalchemy import URL, Engine

from lungwatch.daemon.config import Config
from lungwatch.daemon.home import Home
from lungwatch.daemon.stage import crashpoint
from lungwatch.daemon.timekeeping import TOLERANCE, check_clock, read_clock
from lungwatch.db.audit import AuditEvent, Outcome, record_events
from lungwatch.db.engine import parse_url
from lungwatch.db.maintenance import (
    check_copy,
    checkpoint_wal,
    copy_database,
    restore_marker,
    sqlite_path,
)
from lungwatch.db.removals import (
    RemovableFile,
    last_stop,
    mark_original_removed,
    mark_overlay_removed,
    removable_originals,
    removable_overlays,
    save_reading,
)
from lungwatch.errors import DatabaseError, HomeError, LungwatchError, NotFoundError
from lungwatch.files import fsync_dir, make_dirs, write_atomic

_SUFFIX = ".db"
_STAMP = "%Y%m%dT%H%M%S.%fZ"
# Other files that an administrator put there are no backups: taken for the newest, one would cost
# the backup that is.
_NAME = re.compile(r"lungwatch-\d{8}T\d{6}\.\d{6}Z\.db", re.ASCII)
# SQLite's own files beside the database.
_SIDE_FILES = ("-wal", "-shm")


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
    """Copy the database, also beside a running daemon, and verify the copy.

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
    # Not the new one: under a clock that was set back its name is the oldest.
    others = [path for path in backups(output) if path != target] if output.is_dir() else []
    old = others[: max(0, len(others) - keep + 1)] if keep else []
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
    for side_file in _SIDE_FILES:
        path = database.with_name(database.name + side_file)
        if path.exists():
            path.rename(aside.with_name(aside.name + side_file))
    fsync_dir(database.parent)
    crashpoint("restore_parted")
    fresh.replace(database)
    fsync_dir(database.parent)
    crashpoint("restore_replaced")
    return is_there


@dataclass(frozen=True, kw_only=True)
class DiskUsage:
    """Free space of the home's file systems, and the age of its newest backup.

    Attributes
    ----------
    free
        Bytes free of each file system, under the first of "home", "overlays", "outbox",
        "backups" and "database" that lies on it.
    last_backup_at
        Of the newest backup, in seconds since the epoch; None if there is none.
    """

    free: dict[str, int]
    last_backup_at: float | None


def disk_usage(home: Home, database_url: str) -> DiskUsage:
    """Measure them.

    Raises
    ------
    OSError
        If the home is away.
    """
    folders = {
        "home": home.root,
        "overlays": home.overlays,
        "outbox": home.outbox,
        "backups": home.backups,
    }
    with contextlib.suppress(LungwatchError):  # another machine's
        folders["database"] = sqlite_path(parse_url(database_url)).parent
    names: dict[int, str] = {}
    for name, folder in folders.items():
        if name == "home" or folder.is_dir():
            names.setdefault(folder.stat().st_dev, name)
    newest = backups(home.backups)[-1:]
    return DiskUsage(
        free={name: shutil.disk_usage(folders[name]).free for name in names.values()},
        last_backup_at=newest[0].stat().st_mtime if newest else None,
    )


Folder = Literal["done", "quarantine", "overlays", "backups"]
_FOLDERS: tuple[Folder, ...] = ("done", "quarantine", "overlays", "backups")
_GIB = 1024**3
_BLOCK_BYTES = 512  # of `st_blocks`, whatever the file system's own blocks are (stat(2))
# Removals of a folder that no share is asked of: a quarter of three files is none.
_FEW_FILES = 10


class RetentionStopped(LungwatchError):  # noqa: N818 - a refusal that asks for a confirmation
    """A run of retention was stopped before the first removal.

    Attributes
    ----------
    reason
        ``clock_ahead``, ``clock_behind`` or ``share_exceeded``.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True, kw_only=True)
class Share:
    """What a run removes of one folder, of all that it holds."""

    folder: str
    files: int
    files_held: int
    size_bytes: int
    bytes_held: int

    @property
    def largest(self) -> float:
        """The larger of the shares of files and bytes, 0..1."""
        return max(self.files / max(1, self.files_held), self.size_bytes / max(1, self.bytes_held))


@dataclass(frozen=True, kw_only=True)
class Removal:
    """A file that nothing needs any more, and why it is to be removed.

    Attributes
    ----------
    path
        Relative to the home; names a digest, a model or a time, and no patient.
    since
        End of its last result; of a backup, when it was made; of an object that lungwatch made
        itself, when it came.
    row
        The row that names it; None for a backup, and for an object that lungwatch made itself.
    why
        "age" or "space"; None within the limits.
    reason
        The same in a line, with the key of the limit.
    """

    folder: Folder
    path: str
    since: datetime
    size_bytes: int
    row: RemovableFile | None
    why: Literal["age", "space"] | None = None
    reason: str = ""


class Retention:
    """Applies the limits of a configuration to a home, also beside a running daemon.

    The row is changed first, on condition that nothing needs the file, then the file is removed.
    After a crash between the two, `lungwatch reconcile` removes the file.
    """

    def __init__(self, config: Config, home: Home, engine: Engine) -> None:
        self._home = home
        self._engine = engine
        self._config = config
        self.implausible: list[str] = []
        """Files that the last plan left alone, as their times contradict one another."""

    def check_clock(self, now: datetime) -> RetentionStopped | None:
        """Compare the system clock with what is recorded; return why a run has to stop.

        Raises
        ------
        DatabaseError
            If the database cannot be read.
        """
        pause = timedelta(days=self._config.retain_max_pause_days)
        doubt = check_clock(self._engine, self._home, read_clock(now), pause)
        if doubt is None:
            return None
        return RetentionStopped(
            doubt.problem,
            f"{doubt.detail}: set the clock, or run `lungwatch retention run --clock-is-right`",
        )

    def shares(self, removals: Sequence[Removal]) -> list[Share]:
        """Return what a plan removes of each folder that it concerns."""
        found = []
        for folder in _FOLDERS:
            chosen = [removal for removal in removals if removal.folder == folder]
            if chosen:
                held, files = _used(self._home.root / folder)
                found.append(
                    Share(
                        folder=folder,
                        files=len(chosen),
                        files_held=files,
                        size_bytes=sum(removal.size_bytes for removal in chosen),
                        bytes_held=held,
                    )
                )
        return found

    def check_shares(self, shares: Sequence[Share]) -> RetentionStopped | None:
        """Return why a plan is too large to be carried out unasked; None if it is not."""
        most = self._config.retain_max_share
        for one in shares:
            if one.files > _FEW_FILES and one.largest > most:
                return RetentionStopped(
                    "share_exceeded",
                    f"{one.files} of {one.files_held} files in {one.folder}/ would be removed "
                    f"({one.largest:.0%}, retention.max_share = {most:g}): look at `--dry-run`, "
                    "then run `lungwatch retention run --yes`",
                )
        return None

    def stop(self, why: RetentionStopped) -> None:
        """Write down that a run was stopped."""
        self._record("home", "failed", {"reason": why.reason})

    @property
    def was_stopped(self) -> bool:
        """Whether the last run was stopped."""
        return last_stop(self._engine) is not None

    def keep_reading(self, now: datetime, *, confirmed: bool) -> None:
        """Keep the clock's present reading; a confirmed one is audited."""
        event = AuditEvent(action="retention confirm clock", target="home")
        save_reading(self._engine, read_clock(now), [event] if confirmed else [])

    def plan(self, now: datetime) -> list[Removal]:
        """Return what exceeds the limits: folder by folder, in each the oldest first.

        Raises
        ------
        DatabaseError
            If the database cannot be read.
        """
        self.implausible = []
        found = sorted(
            (item for item in self._candidates() if self._is_plausible(item, now)),
            key=lambda item: item.since,
        )
        return [
            removal
            for folder in _FOLDERS
            for removal in self._plan_folder(folder, [i for i in found if i.folder == folder], now)
        ]

    def _plan_folder(
        self, folder: Folder, found: list[Removal], now: datetime
    ) -> Iterator[Removal]:
        days: int = getattr(self._config, f"retain_{folder}_days")
        gb: float = getattr(self._config, f"retain_{folder}_gb")
        left = []
        for item in found:
            if days and item.since < now - timedelta(days=days):
                age = f"{(now - item.since).days} days old, retention.{folder}_days = {days}"
                yield replace(item, why="age", reason=age)
            else:
                left.append(item)
        if not gb:
            return
        # All files in the folder count, also those that stay.
        used, _ = _used(self._home.root / folder)
        used -= sum(item.size_bytes for item in found) - sum(item.size_bytes for item in left)
        reason = f"{folder}/ holds {used / _GIB:.3g} GiB, retention.{folder}_gb = {gb:g}"
        for item in left:
            if used <= gb * _GIB:
                return
            yield replace(item, why="space", reason=reason)
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

    def _is_plausible(self, item: Removal, now: datetime) -> bool:
        """Tell whether a file's times agree: none in the future, no row older than its file."""
        try:
            status = self._home.absolute(item.path).stat()
        except FileNotFoundError:  # the daemon has just moved it
            return False
        # A copy may keep an old mtime, and a change of mode renews ctime.
        existed_by = datetime.fromtimestamp(min(status.st_mtime, status.st_ctime), UTC)
        row = item.row
        is_future = item.since > now + TOLERANCE
        is_before_file = row is not None and item.since < existed_by - TOLERANCE
        is_before_receipt = row is not None and item.since < row.received_at - TOLERANCE
        if is_future or is_before_file or is_before_receipt:
            self.implausible.append(item.path)
            return False
        return True

    def _candidates(self) -> Iterator[Removal]:
        for original in removable_originals(self._engine):
            folder: Folder = "done" if original.path.startswith("done/") else "quarantine"
            yield from self._candidate(folder, original.path, original.finished_at, original)
        for overlay in removable_overlays(self._engine):
            yield from self._candidate("overlays", overlay.path, overlay.finished_at, overlay)
        own = self._home.own_objects
        for path in sorted(own.iterdir()) if own.is_dir() else ():
            # ctime: when it was moved there, whatever mtime a copy has kept.
            moved_at = datetime.fromtimestamp(path.stat().st_ctime, UTC)
            yield from self._candidate("quarantine", self._home.relative(path), moved_at)
        # The newest backup stays, however old or large.
        for path in backups(self._home.backups)[:-1]:
            made_at = datetime.fromtimestamp(path.stat().st_mtime, UTC)
            yield from self._candidate("backups", self._home.relative(path), made_at)

    def _candidate(
        self, folder: Folder, relative: str, since: datetime, row: RemovableFile | None = None
    ) -> Iterator[Removal]:
        path = self._home.absolute(relative)
        # A link may lead anywhere; a missing file is reconcile's to report.
        if path.is_file() and path.resolve() == self._home.root.resolve() / relative:
            # A sparse file takes less room than its length.
            size = path.stat().st_blocks * _BLOCK_BYTES
            yield Removal(folder=folder, path=relative, since=since, size_bytes=size, row=row)

    @staticmethod
    def _tidy(folder: Path, root: Path) -> None:
        """Remove the date folders that have become empty."""
        while folder != root and not any(folder.iterdir()):
            try:
                folder.rmdir()
            except OSError:  # the daemon has just filed something there
                return
            folder = folder.parent


def _used(root: Path) -> tuple[int, int]:
    """Return the bytes that all files below a folder take, links not followed, and their number."""
    total = count = 0
    for folder, _, names in os.walk(root):
        for name in names:
            try:
                total += Path(folder, name).lstat().st_blocks * _BLOCK_BYTES
                count += 1
            except FileNotFoundError:  # the daemon has just moved it
                continue
    return total, count
