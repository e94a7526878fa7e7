"""Database connections: transactions, idempotent state changes, driver errors, the owning home."""

import sqlite3
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from datetime import datetime
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from sqlalchemy import (
    URL,
    Connection,
    Engine,
    Select,
    create_engine,
    event,
    exc,
    make_url,
    select,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite

from lungwatch.db.models import (
    Base,
    Delivery,
    DeliveryState,
    IllegalTransition,
    OwningHome,
    Result,
    State,
    check_transition,
)
from lungwatch.errors import DatabaseError, MissingExtraError, NotFoundError, TransientError

if TYPE_CHECKING:
    from sqlalchemy import ColumnElement

BUSY_TIMEOUT_S = 10
_WRITE = "lungwatch_write"
GUARD = "lungwatch_guard"
"""Execution option of an engine whose transactions a guard checks (`lungwatch.db.identity`)."""

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
# Connection, rollback and deadlock, resources, locks, shutting down (PostgreSQL, appendix A).
_TRANSIENT_SQLSTATES = ("08", "40", "53", "55", "57")

Value = str | int | float | datetime | list[str] | list[float] | dict[str, float] | None
_Row = TypeVar("_Row")


class DatabaseBusyError(DatabaseError, TransientError):
    """The database is locked, full or unreachable for now; trying again may succeed."""


class DatabaseReplacedError(DatabaseBusyError):
    """The database is not the one that was opened; all is well once the right one is back."""


class DatabaseFullError(DatabaseBusyError):
    """The database cannot grow, since the disk is full."""


class Guard(Protocol):
    """What checks the transactions of an engine, and raises where one must not go on."""

    def check_files(self) -> None:
        """Check that the database is the one that was opened."""

    def check(self, connection: Connection) -> None:
        """Check the same within a transaction, and that it may write."""


def open_engine(
    url: str,
    *,
    busy_timeout_s: float = BUSY_TIMEOUT_S,
    creates: bool = False,
    keeps_journal: bool = False,
) -> Engine:
    """Return an engine for an SQLAlchemy URL; nothing is opened or created yet.

    Parameters
    ----------
    url
        ``sqlite:////absolute/path`` or ``postgresql://user@host/name``.
    busy_timeout_s
        How long a writer waits for another one.
    keeps_journal
        Whether a SQLite file, which is only read, stays in its journal mode: it may be another
        program's.
    creates
        Whether a SQLite file that is missing is made; else it cannot be opened.

    Raises
    ------
    DatabaseError
        If the URL is malformed, or of a database that is not supported.
    MissingExtraError
        If the driver is not installed.
    """
    parsed = parse_url(url)
    try:
        if parsed.get_backend_name() == "sqlite":
            if creates or parsed.query or parsed.database in (None, "", ":memory:"):
                engine = create_engine(parsed, connect_args={"timeout": busy_timeout_s})
            else:
                path = Path(parsed.database)
                engine = create_engine(
                    parsed, creator=lambda: connect_existing(path, timeout_s=busy_timeout_s)
                )
            _prepare_sqlite(engine, keeps_journal=keeps_journal)
            return engine
        return create_engine(
            parsed, connect_args={"options": f"-c lock_timeout={round(busy_timeout_s * 1000)}"}
        )
    except ModuleNotFoundError as error:
        raise MissingExtraError("a PostgreSQL database", "postgres") from error


def connect_existing(path: Path, *, timeout_s: float) -> sqlite3.Connection:
    """Open a SQLite file for any thread, and never make one.

    Raises
    ------
    sqlite3.OperationalError
        If there is none.
    """
    # An ordinary connection makes a file that is missing: empty, and taken for the right one.
    return sqlite3.connect(
        f"{path.absolute().as_uri()}?mode=rw",
        uri=True,
        timeout=timeout_s,
        check_same_thread=False,
    )


def parse_url(url: str) -> URL:
    """Return the parsed URL with the driver that lungwatch depends on.

    Raises
    ------
    DatabaseError
        If it is malformed, or of a database that is not supported.
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


def describe_url(url: URL) -> str:
    """Return a database's name for people, without a password."""
    if url.get_backend_name() == "sqlite":
        return url.database or "in memory"
    return url.render_as_string(hide_password=True)


def _prepare_sqlite(engine: Engine, *, keeps_journal: bool) -> None:
    @event.listens_for(engine, "connect")
    def configure(connection: sqlite3.Connection, _record: object) -> None:
        # The driver's own BEGIN comes late and never before SELECT: `begin` does it instead.
        connection.isolation_level = None
        connection.execute("PRAGMA foreign_keys = ON")
        # Files are moved once a commit has returned, so it must be durable; WAL alone is not.
        connection.execute("PRAGMA synchronous = FULL")
        if keeps_journal:
            return
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
        translate_errors(engine.url),
        engine.execution_options(**{_WRITE: True}).begin() as connection,
    ):
        guard = guard_of(connection)
        if guard is not None:
            guard.check(connection)
        yield connection
        if guard is not None:
            guard.check_files()
    if guard is not None:
        # Once more: what was removed during the commit has not kept it. The change is made again
        # when the right database is back, which finds it made or makes it.
        with translate_errors(engine.url):
            guard.check_files()


def guard_of(connection: Connection) -> Guard | None:
    """Return what guards a connection's transactions."""
    guard: Guard | None = connection.get_execution_options().get(GUARD)
    return guard


@contextmanager
def reading(engine: Engine) -> Iterator[Connection]:
    """Open a read transaction: one snapshot, which blocks no writer.

    Raises
    ------
    DatabaseError
        If the database cannot be opened or read.
    """
    with translate_errors(engine.url), engine.connect() as connection:
        if (guard := guard_of(connection)) is not None:
            guard.check_files()
        yield connection


@contextmanager
def translate_errors(url: URL) -> Iterator[None]:
    """Turn a driver's error into one line that says what to do.

    Integrity and programming errors pass unchanged: they are defects of this program.

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
        busy = f"the database {describe_url(url)} has no free connection"
        raise DatabaseBusyError(busy) from error


def _translate(url: URL, error: BaseException | None) -> DatabaseError:
    database, name = f"the database {describe_url(url)}", getattr(error, "sqlite_errorname", "")
    for known, advice in _TRANSIENT.items():
        # Extended codes (SQLITE_IOERR_WRITE) begin with the primary one.
        if name.startswith(known):
            kind = DatabaseFullError if known == "SQLITE_FULL" else DatabaseBusyError
            return kind(f"{database} {advice}")
    for known, advice in _PERMANENT.items():
        if name.startswith(known):
            return DatabaseError(f"{database} {advice}")
    message = " ".join(str(error).split())
    # A connection that was never established has no SQLSTATE.
    code = getattr(error, "sqlstate", "") or ""
    if url.get_backend_name() == "postgresql" and (not code or code[:2] in _TRANSIENT_SQLSTATES):
        return DatabaseBusyError(f"{database} is not available: {message}")
    return DatabaseError(f"{database} cannot be used: {message}")


def check_integrity(engine: Engine) -> None:
    """Check every page of a SQLite database; a database server checks its own.

    Raises
    ------
    DatabaseError
        If it is damaged; the message says what to do.
    """
    if engine.dialect.name != "sqlite":
        return
    with reading(engine) as connection:
        # quick_check reads all pages, and does not compare the indexes with their tables.
        answer = connection.exec_driver_sql("PRAGMA quick_check(1)").scalar()
    if answer != "ok":
        raise DatabaseError(
            f"the database {describe_url(engine.url)} {_PERMANENT['SQLITE_CORRUPT']}"
        )


def columns_for(
    row: type,
    table: type[Base],
    elsewhere: Mapping[str, Any] = MappingProxyType({}),
    *,
    skip: Collection[str] = (),
) -> list["ColumnElement[Any]"]:
    """Return a column for each field of a row dataclass.

    Parameters
    ----------
    table
        Whose column has the field's name.
    elsewhere
        Columns of the other fields, which come first.
    skip
        Fields without a column.
    """
    own = table.__table__.c
    return [
        (elsewhere[name] if name in elsewhere else own[name]).label(name)
        for name in (field.name for field in fields(row))
        if name not in skip
    ]


def read_rows(engine: Engine, row: type[_Row], statement: "Select[*tuple[Any, ...]]") -> list[_Row]:
    """Run a query and return its rows as dataclasses, whose fields name the columns."""
    with reading(engine) as connection:
        return [row(**found._mapping) for found in connection.execute(statement)]  # noqa: SLF001 - SQLAlchemy's public name


def insert_if_new(
    connection: Connection, table: type[Base], unique: tuple[str, ...], values: Mapping[str, Value]
) -> bool:
    """Insert a row unless its `unique` columns are taken; return whether it was inserted."""
    dialect = postgresql if connection.dialect.name == "postgresql" else sqlite
    statement = dialect.insert(table).values(**values)
    return connection.execute(statement.on_conflict_do_nothing(index_elements=unique)).rowcount == 1


def change_state(
    connection: Connection,
    table: type[Result] | type[Delivery],
    row_id: int,
    *,
    current: State | DeliveryState,
    target: State | DeliveryState,
    **values: Value,
) -> bool:
    """Set a row's state by compare-and-set, and other columns along with it.

    Returns
    -------
    bool
        Whether it was changed. False if a result reached this end with the same `finished_at`:
        an earlier try of the same transaction, which the server committed before it died
        without an answer.

    Raises
    ------
    IllegalTransition
        If the table of transitions does not hold the change, or the row is not in `current`.
    NotFoundError
        If there is no such row.
    """
    check_transition(current, target)
    changed = connection.execute(
        update(table)
        .where(table.id == row_id, table.state == current)
        .values(state=target, **values)
    )
    if changed.rowcount == 1:
        return True
    found = state_of(connection, table, row_id)
    if (
        table is Result
        and found == target
        and has_finished_at(connection, row_id, values.get("finished_at"))
    ):
        return False
    raise IllegalTransition(
        f"{table.__tablename__} {row_id} is {found}, not {current}: it cannot be {target}"
    )


def state_of(
    connection: Connection, table: type[Result] | type[Delivery], row_id: int
) -> State | DeliveryState:
    """Return the state of a result or a delivery.

    Raises
    ------
    NotFoundError
        If there is no such row.
    """
    known: Select[Any] = select(table.state).where(table.id == row_id)
    state: State | DeliveryState | None = connection.scalar(known)
    if state is None:
        raise NotFoundError(f"there is no {table.__tablename__} {row_id}")
    return state


def has_finished_at(connection: Connection, result_id: int, moment: Value) -> bool:
    """Return whether a result ended at exactly this moment; False for None."""
    known = select(Result.id).where(Result.id == result_id, Result.finished_at == moment)
    return moment is not None and connection.scalar(known) is not None


def clean(text: str) -> str:
    """Return text that every database can store.

    File names may hold bytes that are not UTF-8, DICOM values may hold NUL: shown as escapes.
    """
    return text.encode("utf-8", "backslashreplace").decode().replace("\0", "\\x00")


@dataclass(frozen=True, kw_only=True)
class Owner:
    """The home that a database belongs to.

    Attributes
    ----------
    mark
        A random identifier, which the home keeps beside its folders too.
    place
        Machine and folder that it was first used from.
    """

    mark: str
    place: str


def owner_of(engine: Engine) -> Owner | None:
    """Return the home that a database belongs to, None if it belongs to none yet."""
    owners = read_rows(engine, Owner, select(*columns_for(Owner, OwningHome)))
    return owners[0] if owners else None


def take_ownership(engine: Engine, owner: Owner, now: datetime) -> Owner:
    """Make a database that belongs to no home belong to `owner`; return its owner now."""
    with writing(engine) as connection:
        insert_if_new(
            connection,
            OwningHome,
            ("id",),
            {"id": 1, "mark": owner.mark, "place": owner.place, "first_used_at": now},
        )
        row = connection.execute(select(*columns_for(Owner, OwningHome))).one()
    return Owner(mark=row.mark, place=row.place)
