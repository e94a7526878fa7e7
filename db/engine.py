"""Database connections: transactions, idempotent state changes, driver errors, owning home."""

import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from enum import StrEnum
from typing import TYPE_CHECKING

from sqlalchemy import URL, Connection, Engine, create_engine, event, exc, make_url, select, update
from sqlalchemy.dialects import postgresql, sqlite

from lungwatch.db.models import Base, Delivery, Image, OwningHome, Result
from lungwatch.db.states import DeliveryState, IllegalTransition, State, check_transition
from lungwatch.errors import DatabaseError, MissingExtraError, NotFoundError, TransientError

if TYPE_CHECKING:
    from lungwatch.attributes import RadiographMeta


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


def describe_url(url: URL) -> str:
    """Return a database's name for people, without a password."""
    if url.get_backend_name() == "sqlite":
        return url.database or "in memory"
    return url.render_as_string(hide_password=True)


@contextmanager
def translate_errors(url: URL) -> Iterator[None]:
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
        raise DatabaseBusyError(
            f"the database {describe_url(url)} has no free connection"
        ) from error


def damaged_error(url: URL) -> DatabaseError:
    """Return the error for a database that is not whole."""
    return DatabaseError(f"the database {describe_url(url)} {_PERMANENT['SQLITE_CORRUPT']}")


def _translate(url: URL, error: BaseException | None) -> DatabaseError:
    name = getattr(error, "sqlite_errorname", "")
    for known, advice in _TRANSIENT.items():
        # Extended codes (SQLITE_IOERR_WRITE) begin with the primary one.
        if name.startswith(known):
            kind = DatabaseFullError if known == "SQLITE_FULL" else DatabaseBusyError
            return kind(f"the database {describe_url(url)} {advice}")
    for known, advice in _PERMANENT.items():
        if name.startswith(known):
            return DatabaseError(f"the database {describe_url(url)} {advice}")
    said = " ".join(str(error).split())
    # PostgreSQL: classes 08 (connection), 40 (rollback, deadlock), 53 (resources), 55 (locks)
    # and 57 (shutting down); a connection that never came about has no code.
    code = getattr(error, "sqlstate", "") or ""
    if url.get_backend_name() == "postgresql" and (
        not code or code[:2] in ("08", "40", "53", "55", "57")
    ):
        return DatabaseBusyError(f"the database {describe_url(url)} is not available: {said}")
    return DatabaseError(f"the database {describe_url(url)} cannot be used: {said}")


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
        translate_errors(engine.url),
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
    with translate_errors(engine.url), engine.connect() as connection:
        yield connection


Value = str | int | float | datetime | list[str] | list[float] | dict[str, float] | None


def insert_if_new(
    connection: Connection, table: type[Base], unique: tuple[str, ...], values: Mapping[str, Value]
) -> bool:
    """Insert a row unless its `unique` columns are taken; say whether it was inserted."""
    dialect = postgresql if connection.dialect.name == "postgresql" else sqlite
    statement = dialect.insert(table).values(**values)
    return connection.execute(statement.on_conflict_do_nothing(index_elements=unique)).rowcount == 1


def change_state(
    connection: Connection, result_id: int, *, current: State, target: State, **values: Value
) -> bool:
    """Set a result's state by compare-and-set, and other columns along with it.

    Returns
    -------
    bool
        Whether it was changed. False if the result came to this end at the very instant
        `finished_at`: by an earlier try of the same transaction, whose COMMIT a server has
        carried out and, dying, not answered.

    Raises
    ------
    IllegalTransition
        If the table of transitions does not hold the change, or the result is not in
        `current`.
    NotFoundError
        If there is no such result.
    """
    check_transition(current, target)
    found = compare_and_set(connection, Result, result_id, current=current, target=target, **values)
    if found == current:
        return True
    if found == target and has_ended_at(connection, result_id, values.get("finished_at")):
        return False
    raise IllegalTransition(f"result {result_id} is {found}, not {current}: it cannot be {target}")


def has_ended_at(connection: Connection, result_id: int, moment: Value) -> bool:
    """Whether a result came to its end at just this moment; False for None."""
    known = select(Result.id).where(Result.id == result_id, Result.finished_at == moment)
    return moment is not None and connection.scalar(known) is not None


def compare_and_set(
    connection: Connection,
    table: type[Result] | type[Delivery],
    row_id: int,
    *,
    current: State | DeliveryState,
    target: State | DeliveryState,
    **values: Value,
) -> StrEnum:
    """Set a row's state, and other columns along with it, if it is in `current`.

    Returns
    -------
    StrEnum
        The state that the row was found in; it was changed if that is `current`.

    Raises
    ------
    NotFoundError
        If there is no such row.
    """
    changed = connection.execute(
        update(table)
        .where(table.id == row_id, table.state == current)
        .values(state=target, **values)
    )
    if changed.rowcount == 1:
        return current
    found = connection.scalar(select(table.state).where(table.id == row_id))
    if found is None:
        raise NotFoundError(f"there is no {table.__tablename__} {row_id}")
    return found


def update_image(connection: Connection, image_id: int, **values: Value) -> None:
    """Set columns of an image.

    Raises
    ------
    NotFoundError
        If there is no such image.
    """
    changed = connection.execute(update(Image).where(Image.id == image_id).values(**values))
    if changed.rowcount != 1:
        raise NotFoundError(f"there is no image {image_id}")


def update_image_of(connection: Connection, result_id: int, **values: Value) -> None:
    """Set columns of the image that a result is about."""
    image_id = select(Result.image_id).where(Result.id == result_id).scalar_subquery()
    connection.execute(update(Image).where(Image.id == image_id).values(**values))


def meta_columns(meta: "RadiographMeta") -> dict[str, Value]:
    """Return what a file says about its image as columns of `Image`."""
    return {
        name: clean(value) if isinstance(value, str) else value
        for name, value in asdict(meta).items()
    }


def clean(text: str) -> str:
    """Return text that every database can store.

    File names may hold bytes that are no UTF-8, DICOM values may hold NUL: shown as escapes.
    """
    return text.encode("utf-8", "backslashreplace").decode().replace("\0", "\\x00")


def check_integrity(engine: Engine) -> None:
    """Look at every page of a SQLite database; a server looks after its own.

    Raises
    ------
    DatabaseError
        If it is damaged; the message says what to do.
    """
    if engine.dialect.name != "sqlite":
        return
    with reading(engine) as connection:
        # quick_check reads all pages and leaves out comparing the indices' content.
        said = connection.exec_driver_sql("PRAGMA quick_check(1)").scalar()
    if said != "ok":
        raise damaged_error(engine.url)


_ONLY_ROW = 1


@dataclass(frozen=True, kw_only=True)
class Owner:
    """The home that a database belongs to.

    Attributes
    ----------
    mark
        Made up by the home; it keeps the same one beside its folders.
    place
        Machine and folder that it was first used from.
    """

    mark: str
    place: str


def owner_of(engine: Engine) -> Owner | None:
    """Return the home that a database belongs to, None for one that nobody owns yet."""
    with reading(engine) as connection:
        row = connection.execute(select(OwningHome.mark, OwningHome.place)).first()
    return None if row is None else Owner(mark=row.mark, place=row.place)


def take_ownership(engine: Engine, owner: Owner, now: datetime) -> Owner:
    """Take a database that nobody owns; return who owns it now."""
    with writing(engine) as connection:
        insert_if_new(
            connection,
            OwningHome,
            ("id",),
            {
                "id": _ONLY_ROW,
                "mark": owner.mark,
                "place": owner.place,
                "first_used_at": now,
            },
        )
        row = connection.execute(select(OwningHome.mark, OwningHome.place)).one()
    return Owner(mark=row.mark, place=row.place)
