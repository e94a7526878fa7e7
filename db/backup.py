"""A copy of a SQLite database, whole at one instant, while others write to it."""

import contextlib
import os
import sqlite3
from contextlib import closing
from pathlib import Path

from sqlalchemy import URL

from lungwatch.atomicfile import fsync_dir
from lungwatch.errors import DatabaseError

_PAGES = 1000


def sqlite_path(url: URL) -> Path:
    """Return the file of a SQLite database.

    Raises
    ------
    DatabaseError
        If it is another database, which brings tools of its own.
    """
    if url.get_backend_name() != "sqlite" or not url.database:
        raise DatabaseError(
            "only a SQLite database is backed up here: use pg_dump and pg_restore for PostgreSQL"
        )
    return Path(url.database)


def restore_marker(database: Path) -> Path:
    """Where it is noted, from its first step to its last, that a restore is under way."""
    return database.with_name(f"{database.name}.restoring")


def check_not_restoring(url: URL) -> None:
    """Refuse a database whose restore was interrupted.

    Raises
    ------
    DatabaseError
        If it was; the message says which backup, and what to do.
    """
    if url.get_backend_name() != "sqlite" or not url.database:
        return
    marker = restore_marker(Path(url.database))
    try:
        backup = marker.read_text(errors="replace").strip()
    except OSError:
        return
    raise DatabaseError(
        f"a restore of {url.database} was interrupted: run `lungwatch backup restore {backup}` "
        f"again, or remove {marker} to go on with the database that is there"
    )


def copy_database(source: Path, target: Path) -> None:
    """Copy a database by SQLite's online backup, prove the copy whole, and name it.

    Parameters
    ----------
    source
        A database that may be in use.
    target
        The file to be; it appears whole or not at all.

    Raises
    ------
    DatabaseError
        If the source is damaged, or the copy cannot be written.
    """
    temporary = target.with_name(f".tmp-{os.getpid()}-{target.name}")
    try:
        with (
            closing(sqlite3.connect(_read_only(source), uri=True)) as original,
            closing(sqlite3.connect(temporary)) as copy,
        ):
            original.backup(copy, pages=_PAGES)
            # One file: a copy is moved about without the journal beside it.
            copy.execute("PRAGMA journal_mode = DELETE")
        check_copy(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(target)
        fsync_dir(target.parent)
    except (sqlite3.Error, OSError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise DatabaseError(f"the database cannot be copied: {why}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def absorb_log(database: Path) -> None:
    """Write what stands in a database's log into its file, so that the file is whole alone.

    A damaged one stays as it is.
    """
    with (
        contextlib.suppress(sqlite3.Error),
        closing(sqlite3.connect(database)) as connection,
    ):
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()


def _read_only(path: Path) -> str:
    return path.absolute().as_uri() + "?mode=ro"


def check_copy(path: Path) -> None:
    """Prove that a backup is a whole database of lungwatch.

    Raises
    ------
    DatabaseError
        If it is not.
    """
    problem = DatabaseError(f"{path.name} is no whole database of lungwatch")
    try:
        with closing(sqlite3.connect(_read_only(path), uri=True)) as connection:
            said = connection.execute("PRAGMA integrity_check(1)").fetchone()[0]
            connection.execute("SELECT version_num FROM alembic_version").fetchone()
    except sqlite3.Error as error:
        raise problem from error
    if said != "ok":
        raise problem
