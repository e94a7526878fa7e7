"""Backups of a home's database, and the way back from one."""

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from sqlalchemy import URL

from lungwatch.atomicfile import fsync_dir, make_dirs, write_atomic
from lungwatch.daemon.crashpoint import crashpoint
from lungwatch.daemon.home import Home
from lungwatch.db.backup import absorb_log, check_copy, copy_database, restore_marker, sqlite_path
from lungwatch.errors import DatabaseError, NotFoundError

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
        absorb_log(database)
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
