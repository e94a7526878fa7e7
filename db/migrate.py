"""Database migrations: an empty or earlier version's database to the present schema."""

from pathlib import Path

from sqlalchemy import Connection, Engine, inspect, text

from lungwatch.db import migrations
from lungwatch.db.backup import check_not_restoring, copy_database, sqlite_path
from lungwatch.db.engine import open_engine, parse_url, reading, writing
from lungwatch.db.failures import describe
from lungwatch.errors import DatabaseError, NotFoundError

REVISIONS = ("0001", "0002", "0003", "0004", "0005", "0006", "0008")
"""Every revision in order, so that reading needs no Alembic; a test holds it to the scripts."""

# Any number will do that no other program on the same PostgreSQL server locks.
_ADVISORY_LOCK = 0x6C756E67


def open_database(url: str, *, within_restore: bool = False) -> Engine:
    """Open a database, creating or upgrading it first.

    Parameters
    ----------
    within_restore
        By the restore that is under way; anybody else is refused meanwhile.

    Raises
    ------
    DatabaseError
        If it is not a lungwatch database, is newer than this program, or cannot be used.
    """
    engine = open_engine(url)
    try:
        if not within_restore:
            check_not_restoring(engine.url)
        _back_up_older(engine)
        upgrade(engine)
    except BaseException:
        engine.dispose()
        raise
    return engine


def open_existing(url: str) -> Engine:
    """Open a database that is there already, and change nothing in it.

    Raises
    ------
    NotFoundError
        If there is no database yet.
    DatabaseError
        If it is of another version or cannot be used.
    """
    parsed = parse_url(url)
    if parsed.get_backend_name() == "sqlite" and not Path(parsed.database or "").is_file():
        raise NotFoundError(f"no database at {describe(parsed)}; run `lungwatch run` first")
    check_not_restoring(parsed)
    engine = open_engine(url)
    try:
        check_current(engine)
    except BaseException:
        engine.dispose()
        raise
    return engine


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
            f"the database {describe(engine.url)} has {found}, this program uses "
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
        revision = _revision(connection)
        if revision != REVISIONS[-1]:
            _run_scripts(connection)


def _back_up_older(engine: Engine) -> None:
    """Keep a copy of a SQLite database as it was before its schema is brought up to date.

    There is no way back from a later schema but that copy.
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


def _run_scripts(connection: Connection) -> None:
    # Alembic and what it imports cost more than everything else a query does.
    from alembic import command  # noqa: PLC0415
    from alembic.config import Config  # noqa: PLC0415

    config = Config()
    folder = str(Path(migrations.__file__).parent)
    config.set_main_option("script_location", folder.replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    command.upgrade(config, "head")


def _revision(connection: Connection) -> str | None:
    """Return the database's revision, None for an empty one."""
    name = describe(connection.engine.url)
    tables = inspect(connection).get_table_names()
    if "alembic_version" not in tables:
        # A server may well hold other programs' tables beside ours; a file is ours alone.
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
