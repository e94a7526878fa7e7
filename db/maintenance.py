"""Database maintenance: opening and migration, online copies, removal of files by retention."""

import contextlib
import sqlite3
from contextlib import closing
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy import URL, ColumnElement, Connection, Engine, func, inspect, select, text, update
from sqlalchemy.orm import QueryableAttribute

from lungwatch.db import migrations
from lungwatch.db.engine import describe_url, open_engine, parse_url, reading, writing
from lungwatch.db.models import Delivery, Image, Result
from lungwatch.db.states import UNFINISHED, DeliveryState
from lungwatch.errors import DatabaseError, NotFoundError
from lungwatch.files import replacing

if TYPE_CHECKING:
    from typing import Any

    from sqlalchemy import Select


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
    try:
        with replacing(target) as temporary:
            with (
                closing(sqlite3.connect(_read_only(source), uri=True)) as original,
                closing(sqlite3.connect(temporary)) as copy,
            ):
                original.backup(copy, pages=_PAGES)
                # One file: a copy is moved about without the journal beside it.
                copy.execute("PRAGMA journal_mode = DELETE")
            check_copy(temporary)
    except (sqlite3.Error, OSError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise DatabaseError(f"the database cannot be copied: {why}") from error


def checkpoint_wal(database: Path) -> None:
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


REVISIONS = ("0001", "0002", "0003", "0004", "0005", "0006", "0007", "0008", "0009")

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
        raise NotFoundError(f"no database at {describe_url(parsed)}; run `lungwatch run` first")
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
    name = describe_url(connection.engine.url)
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


# What was refused can be sent again (`lungwatch pacs send --failed`), and is built anew for that.
_UNSENT_OR_FAILED = (DeliveryState.QUEUED, DeliveryState.SENDING, DeliveryState.FAILED)


@dataclass(frozen=True, kw_only=True)
class RemovableFile:
    """A file that all has been done with.

    Attributes
    ----------
    row_id
        Of the image whose original it is, or of the result whose overlay.
    path
        Relative to the home.
    finished_at
        When the last of its results came to its end.
    """

    row_id: int
    path: str
    finished_at: datetime


def removable_originals(engine: Engine) -> list[RemovableFile]:
    """Return the originals of which every result has an end and nothing is still to be sent."""
    ended = func.max(Result.finished_at).label("finished_at")
    statement = (
        select(Image.id.label("row_id"), Image.path, ended)
        .join(Result)
        .where(
            Image.path.startswith("done/") | Image.path.startswith("quarantine/"),
            _is_finished(),
        )
        .group_by(Image.id, Image.path)
        .having(ended.is_not(None))
    )
    return _removable(engine, statement)


def removable_overlays(engine: Engine) -> list[RemovableFile]:
    """Return the overlays of results that have ended and that nothing waits to be sent of."""
    statement = select(
        Result.id.label("row_id"), Result.overlay.label("path"), Result.finished_at
    ).where(
        Result.overlay.is_not(None),
        Result.finished_at.is_not(None),
        Result.state.not_in(UNFINISHED),
        ~_has_unsent(Result.id),
    )
    return _removable(engine, statement)


def mark_original_removed(engine: Engine, kept: RemovableFile, now: datetime) -> bool:
    """Note that an original is removed, if it is finished with still; say whether it was."""
    with writing(engine) as connection:
        changed = connection.execute(
            update(Image)
            .where(Image.id == kept.row_id, Image.path == kept.path, _is_finished())
            .values(path=None, removed_at=now)
        )
    return changed.rowcount == 1


def mark_overlay_removed(engine: Engine, kept: RemovableFile, now: datetime) -> bool:
    """Note that an overlay is removed, if nothing waits for it; say whether it was."""
    with writing(engine) as connection:
        changed = connection.execute(
            update(Result)
            .where(
                Result.id == kept.row_id,
                Result.overlay == kept.path,
                Result.state.not_in(UNFINISHED),
                ~_has_unsent(Result.id),
            )
            .values(overlay=None, overlay_removed_at=now)
        )
    return changed.rowcount == 1


def _is_finished() -> ColumnElement[bool]:
    """Of an image: no result on its way, nothing of it in the outbox."""
    unfinished = select(Result.id).where(
        Result.image_id == Image.id, Result.state.in_(UNFINISHED) | _has_unsent(Result.id)
    )
    return ~unfinished.correlate(Image).exists()


def _has_unsent(result_id: QueryableAttribute[int]) -> ColumnElement[bool]:
    return (
        select(Delivery.id)
        .where(Delivery.result_id == result_id, Delivery.state.in_(_UNSENT_OR_FAILED))
        .exists()
    )


def _removable(engine: Engine, statement: "Select[*tuple[Any, ...]]") -> list[RemovableFile]:
    with reading(engine) as connection:
        return [RemovableFile(**row._mapping) for row in connection.execute(statement)]  # noqa: SLF001 - SQLAlchemy's public name
