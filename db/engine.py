"""Connections: how a database is opened, and the two kinds of transaction."""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy import URL, Connection, Engine, create_engine, event, exc, make_url

from lungwatch.db.failures import translated
from lungwatch.errors import DatabaseError, MissingExtraError

BUSY_TIMEOUT_S = 10
_WRITE = "lungwatch_write"


def open_engine(url: str, *, busy_timeout_s: float = BUSY_TIMEOUT_S) -> Engine:
    """Return an engine for an SQLAlchemy URL; nothing is opened or created yet.

    Parameters
    ----------
    url
        ``sqlite:////absolute/path`` or ``postgresql://user@host/name``.
    busy_timeout_s
        How long a writer waits for another one.

    Raises
    ------
    DatabaseError
        If the URL is none, or of a database that is not supported.
    MissingExtraError
        If the driver is not installed.
    """
    parsed = parse_url(url)
    try:
        if parsed.get_backend_name() == "sqlite":
            engine = create_engine(parsed, connect_args={"timeout": busy_timeout_s})
            _prepare_sqlite(engine)
            return engine
        return create_engine(
            parsed, connect_args={"options": f"-c lock_timeout={round(busy_timeout_s * 1000)}"}
        )
    except ModuleNotFoundError as error:
        raise MissingExtraError("a PostgreSQL database", "postgres") from error


def parse_url(url: str) -> URL:
    """Return the parsed URL with the driver that this program brings.

    Raises
    ------
    DatabaseError
        If it is no URL, or of a database that is not supported.
    """
    try:
        parsed = make_url(url)
    except exc.ArgumentError as error:
        raise DatabaseError(
            "the database URL is not understood: write sqlite:////path/to/file.db "
            "or postgresql://user@host/name"
        ) from error
    if parsed.drivername in ("postgresql", "postgres"):
        return parsed.set(drivername="postgresql+psycopg")
    if parsed.drivername not in ("sqlite", "sqlite+pysqlite", "postgresql+psycopg"):
        raise DatabaseError(
            f"the database URL names {parsed.drivername}: only sqlite and postgresql are supported"
        )
    return parsed


def _prepare_sqlite(engine: Engine) -> None:
    @event.listens_for(engine, "connect")
    def configure(connection: sqlite3.Connection, _record: object) -> None:
        # The driver's own BEGIN comes late and never before SELECT: `begin` does it instead.
        connection.isolation_level = None
        connection.execute("PRAGMA foreign_keys = ON")
        # A commit is durable before a file is moved on its strength; WAL alone promises less.
        connection.execute("PRAGMA synchronous = FULL")
        if connection.execute("PRAGMA journal_mode").fetchone()[0] != "wal":
            connection.execute("PRAGMA journal_mode = WAL")

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        # A transaction that reads first and writes later cannot wait for another writer, it
        # fails at once (SQLITE_BUSY_SNAPSHOT): writers take the lock at the start.
        writes = connection.get_execution_options().get(_WRITE, False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


@contextmanager
def writing(engine: Engine) -> Iterator[Connection]:
    """Open a write transaction: committed at the end, rolled back on any exception.

    Raises
    ------
    DatabaseError
        If the database cannot be opened or written.
    DatabaseBusyError
        If trying again later may help.
    """
    with (
        translated(engine.url),
        engine.execution_options(**{_WRITE: True}).begin() as connection,
    ):
        yield connection


@contextmanager
def reading(engine: Engine) -> Iterator[Connection]:
    """Open a read transaction, one snapshot, that blocks no writer.

    Raises
    ------
    DatabaseError
        If the database cannot be opened or read.
    """
    with translated(engine.url), engine.connect() as connection:
        yield connection
