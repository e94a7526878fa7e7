"""Backups of a home's database, and the way back from one."""

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from sqlalchemy import URL

from lungwatch.atomicfile import fsync_dir, make_dirs
from lungwatch.daemon.home import Home
from lungwatch.db.backup import check_copy, copy_database, sqlite_path
from lungwatch.errors import NotFoundError

_SUFFIX = ".db"
_STAMP = "%Y%m%dT%H%M%S.%fZ"
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


def create_backup(home: Home, url: URL, now: datetime, *, keep: int) -> Backup:
    """Copy the database into the home's `backups/`, beside a running daemon or without one.

    Parameters
    ----------
    now
        In UTC; names the file.
    keep
        How many are kept, this one among them; 0 for all.

    Raises
    ------
    DatabaseError
        If the database cannot be copied whole.
    """
    source = sqlite_path(url)
    if not source.is_file():
        raise NotFoundError("there is no database yet; run `lungwatch run` first")
    make_dirs(home.backups)
    target = home.backups / f"lungwatch-{now.strftime(_STAMP)}{_SUFFIX}"
    copy_database(source, target)
    old = backups(home)[:-keep] if keep else []
    for path in old:
        path.unlink()
    return Backup(path=target, size_bytes=target.stat().st_size, removed=tuple(old))


def backups(home: Home) -> list[Path]:
    """Return the backups, the oldest first."""
    return sorted(home.backups.glob(f"lungwatch-*{_SUFFIX}")) if home.backups.is_dir() else []


def restore_backup(url: URL, backup: Path, now: datetime) -> Path | None:
    """Put a backup in the database's place; the home must be locked.

    What happened after the backup is not in it, but in the folders: `Reconciler` puts files
    that it does not know back into the drop folder.

    Returns
    -------
    Path or None
        Where the database that was there is now; it is kept.

    Raises
    ------
    DatabaseError
        If the backup is not whole; nothing is changed then.
    """
    database = sqlite_path(url)
    if not backup.is_file():
        raise NotFoundError(f"no backup at {backup}")
    check_copy(backup)
    aside = database.with_name(f"{database.name}.before-restore-{now.strftime(_STAMP)}")
    fresh = database.with_name(f"{database.name}.restored")
    copy_database(backup, fresh)
    # There is a database under its name at every moment: a daemon would begin a new one.
    is_there = database.exists()
    if is_there:
        aside.hardlink_to(database)
    for companion in _COMPANIONS:
        path = database.with_name(database.name + companion)
        if path.exists():
            path.rename(aside.with_name(aside.name + companion))
    fresh.replace(database)
    fsync_dir(database.parent)
    return aside if is_there else None
