"""Database maintenance: opening and migration, and online copies."""

import contextlib
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy import URL, Connection, Engine, inspect, text

from lungwatch.db.engine import (
    describe_url,
    open_engine,
    parse_url,
    reading,
    writing,
)
from lungwatch.errors import DatabaseError, NotFoundError
from lungwatch.files import replacing

if TYPE_CHECKING:
    from alembic.config import Config

_MIGRATIONS = Path(__file__).with_name("migrations")

REVISIONS = tuple(sorted(path.name[:4] for path in _MIGRATIONS.glob("versions/[0-9]*.py")))
"""Every revision in order, by the names of the scripts: reading needs no Alembic."""

# Any number that no other program on the same PostgreSQL server locks.
_ADVISORY_LOCK = 0x6C756E67
_PAGES = 1000


def open_database(url: str, *, within_restore: bool = False, creates: bool = True) -> Engine:
    """Open a database, creating or upgrading it first.

    Parameters
    ----------
    creates
        Whether a database that is missing or empty is made.
    within_restore
        Whether the caller is the restore in progress; others are refused meanwhile.

    Raises
    ------
    NotFoundError
        If it is missing and is not to be made.
    DatabaseError
        If it is not a lungwatch database, is newer than this program, or cannot be used.
    """
    engine = open_engine(url, creates=creates)
    with _disposed_on_error(engine):
        if not within_restore:
            check_not_restoring(engine.url)
        if not creates:
            _require_schema(engine)
        _back_up_older(engine)
        upgrade(engine)
    return engine


def _require_schema(engine: Engine) -> None:
    """Refuse a database that is missing or empty.

    Raises
    ------
    NotFoundError
        If it is.
    """
    path = Path(engine.url.database or "")
    is_missing = engine.dialect.name == "sqlite" and not path.is_file()
    if not is_missing:
        with reading(engine) as connection:
            is_missing = _revision(connection) is None
    if is_missing:
        name = describe_url(engine.url)
        raise NotFoundError(f"no database at {name}; run `lungwatch run` first")


def open_existing(url: str) -> Engine:
    """Open a database that exists already, and change nothing in it.

    Raises
    ------
    NotFoundError
        If there is no database yet.
    DatabaseError
        If it is of another version or cannot be used.
    """
    parsed = parse_url(url)
    if parsed.get_backend_name() == "sqlite" and not Path(parsed.database or "").is_file():
        raise NotFoundError(f"no database at {describe_url(parsed)}; run `lungwatch run` first")
    check_not_restoring(parsed)
    engine = open_engine(url, keeps_journal=True)
    with _disposed_on_error(engine):
        check_current(engine)
    return engine


@contextmanager
def _disposed_on_error(engine: Engine) -> Iterator[None]:
    try:
        yield
    except BaseException:
        engine.dispose()
        raise


def check_current(engine: Engine) -> None:
    """Refuse a database whose schema is not the present one.

    Raises
    ------
    DatabaseError
        If it is older, newer, or not lungwatch's.
    """
    with reading(engine) as connection:
        revision = _revision(connection)
    if revision != REVISIONS[-1]:
        found = f"schema {revision}" if revision else "no schema yet"
        raise DatabaseError(
            f"the database {describe_url(engine.url)} has {found}, this program uses "
            f"{REVISIONS[-1]}: `lungwatch run` brings it up to date"
        )


def upgrade(engine: Engine) -> None:
    """Bring the schema up to date, all of it or nothing, one process at a time.

    Raises
    ------
    DatabaseError
        If it is not a lungwatch database, is newer than this program, or cannot be used.
    """
    with writing(engine) as connection:
        # SQLite's write lock is held from here on; PostgreSQL needs one of its own.
        if connection.dialect.name == "postgresql":
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _ADVISORY_LOCK})
        if _revision(connection) == REVISIONS[-1]:
            return
        # Alembic and its imports cost more time than a query takes.
        from alembic import command  # noqa: PLC0415

        command.upgrade(alembic_config(connection), "head")


def alembic_config(connection: Connection) -> "Config":
    """Return what Alembic's commands need to migrate within a connection's transaction."""
    from alembic.config import Config  # noqa: PLC0415 - as above

    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    return config


def _revision(connection: Connection) -> str | None:
    """Return the database's revision, None for an empty one."""
    name = describe_url(connection.engine.url)
    tables = inspect(connection).get_table_names()
    if "alembic_version" not in tables:
        # A server may hold tables of other programs too; a file is lungwatch's alone.
        if tables and connection.dialect.name == "sqlite":
            raise DatabaseError(
                f"the database {name} belongs to another program (it has a table "
                f"{tables[0]!r}): choose another path"
            )
        return None
    revision = connection.execute(text("SELECT version_num FROM alembic_version")).scalar()
    if revision is not None and revision not in REVISIONS:
        raise DatabaseError(
            f"the database {name} has schema {revision}, which is newer than this program knows "
            f"({REVISIONS[-1]}): install the lungwatch release that wrote it, or a later one"
        )
    return str(revision) if revision is not None else None


def _back_up_older(engine: Engine) -> None:
    """Copy a SQLite database of an earlier schema before it is migrated.

    That copy is the only way back from a later schema.
    """
    if engine.dialect.name != "sqlite" or not sqlite_path(engine.url).is_file():
        return
    with reading(engine) as connection:
        revision = _revision(connection)
    if revision is not None and revision != REVISIONS[-1]:
        source = sqlite_path(engine.url)
        target = source.with_name(f"{source.name}.schema-{revision}")
        if not target.exists():  # a second start after an interrupted one
            copy_database(source, target)


def sqlite_path(url: URL) -> Path:
    """Return the file of a SQLite database.

    Raises
    ------
    DatabaseError
        If it is another database, which has tools of its own.
    """
    if url.get_backend_name() != "sqlite" or not url.database:
        raise DatabaseError(
            "only a SQLite database is backed up here: use pg_dump and pg_restore for PostgreSQL"
        )
    return Path(url.database)


def restore_marker(database: Path) -> Path:
    """Return the file that exists while a restore is in progress, with the backup's name."""
    return database.with_name(f"{database.name}.restoring")


def check_not_restoring(url: URL) -> None:
    """Refuse a database whose restore was interrupted.

    Raises
    ------
    DatabaseError
        If it was; the message names the backup, and what to do.
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
    """Copy a SQLite database by its online backup, one snapshot, check the copy, and name it.

    Parameters
    ----------
    source
        A database that may be in use.
    target
        The new file; it appears whole or not at all.

    Raises
    ------
    DatabaseError
        If the source is damaged, or the copy cannot be written.
    """
    try:
        with replacing(target) as temporary:
            with (
                _connected_read_only(source) as original,
                closing(sqlite3.connect(temporary)) as copy,
            ):
                original.backup(copy, pages=_PAGES)
                # One file: a copy is moved about without the journal beside it.
                copy.execute("PRAGMA journal_mode = DELETE")
            check_copy(temporary)
    except (sqlite3.Error, OSError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise DatabaseError(f"the database cannot be copied: {why}") from error


def check_copy(path: Path) -> None:
    """Check that a backup is an undamaged database of lungwatch.

    Raises
    ------
    DatabaseError
        If it is not.
    """
    problem = DatabaseError(f"{path.name} is not an intact lungwatch database")
    try:
        with _connected_read_only(path) as connection:
            answer = connection.execute("PRAGMA integrity_check(1)").fetchone()[0]
            connection.execute("SELECT version_num FROM alembic_version").fetchone()
    except sqlite3.Error as error:
        raise problem from error
    if answer != "ok":
        raise problem


def checkpoint_wal(database: Path) -> None:
    """Write a database's write-ahead log into its file, so that the file is complete by itself.

    A damaged one is left as it is.
    """
    with (
        contextlib.suppress(sqlite3.Error),
        closing(sqlite3.connect(database)) as connection,
    ):
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()


@contextmanager
def _connected_read_only(path: Path) -> Iterator[sqlite3.Connection]:
    uri = path.absolute().as_uri() + "?mode=ro"
    with closing(sqlite3.connect(uri, uri=True)) as connection:
        yield connection
