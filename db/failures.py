"""The drivers' errors, said in words that tell an administrator what to do."""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy import URL, exc

from lungwatch.errors import DatabaseError, TransientError


class DatabaseBusyError(DatabaseError, TransientError):
    """The database is locked, full or out of reach for now; trying again may succeed."""


class DatabaseFullError(DatabaseBusyError):
    """The database cannot grow, since the disk is full."""


_TRANSIENT = {
    "SQLITE_BUSY": "was locked by another program for too long: find what holds it open",
    "SQLITE_LOCKED": "was locked by another program for too long: find what holds it open",
    "SQLITE_FULL": "cannot grow, the disk is full: make room",
    "SQLITE_IOERR": "cannot be read or written, the disk reports an error: check it",
}
_PERMANENT = {
    "SQLITE_NOTADB": "is not a database: check the path, or move the file away",
    "SQLITE_CORRUPT": "is damaged: stop the daemon and run `lungwatch backup restore`",
    "SQLITE_READONLY": "cannot be written: check the rights of the file and its folder",
    "SQLITE_PERM": "cannot be written: check the rights of the file and its folder",
    "SQLITE_CANTOPEN": "cannot be opened: check that its folder exists and is writable",
    "SQLITE_AUTH": "cannot be opened: check the rights of the file and its folder",
}


def describe(url: URL) -> str:
    """Return a database's name for people, without a password."""
    if url.get_backend_name() == "sqlite":
        return url.database or "in memory"
    return url.render_as_string(hide_password=True)


@contextmanager
def translated(url: URL) -> Iterator[None]:
    """Turn a driver's error into one clear line.

    Integrity and programming errors pass unchanged: they are mistakes of this program.

    Raises
    ------
    DatabaseError
        If the database cannot be used as it is.
    DatabaseBusyError
        If trying again later may help.
    """
    try:
        yield
    except (exc.IntegrityError, exc.ProgrammingError, exc.InterfaceError):
        raise
    except exc.DBAPIError as error:
        raise _translate(url, error.orig) from error
    except sqlite3.DatabaseError as error:
        # Raised while a connection is being set up, before SQLAlchemy looks.
        raise _translate(url, error) from error
    except exc.TimeoutError as error:
        raise DatabaseBusyError(f"the database {describe(url)} has no free connection") from error


def damaged(url: URL) -> DatabaseError:
    """Return the error for a database that is not whole."""
    return DatabaseError(f"the database {describe(url)} {_PERMANENT['SQLITE_CORRUPT']}")


def _translate(url: URL, error: BaseException | None) -> DatabaseError:
    name = getattr(error, "sqlite_errorname", "")
    for known, advice in _TRANSIENT.items():
        # Extended codes (SQLITE_IOERR_WRITE) begin with the primary one.
        if name.startswith(known):
            kind = DatabaseFullError if known == "SQLITE_FULL" else DatabaseBusyError
            return kind(f"the database {describe(url)} {advice}")
    for known, advice in _PERMANENT.items():
        if name.startswith(known):
            return DatabaseError(f"the database {describe(url)} {advice}")
    said = " ".join(str(error).split())
    # PostgreSQL: classes 08 (connection), 40 (rollback, deadlock), 53 (resources), 55 (locks)
    # and 57 (shutting down); a connection that never came about has no code.
    code = getattr(error, "sqlstate", "") or ""
    if url.get_backend_name() == "postgresql" and (
        not code or code[:2] in ("08", "40", "53", "55", "57")
    ):
        return DatabaseBusyError(f"the database {describe(url)} is not available: {said}")
    return DatabaseError(f"the database {describe(url)} cannot be used: {said}")
