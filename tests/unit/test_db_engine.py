"""Opening a database: durable settings, locks only for writers, and clear words when it fails."""

import os
import sqlite3
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest
from sqlalchemy import Engine, text

from lungwatch.db.engine import DatabaseBusyError, open_engine, reading, writing
from lungwatch.db.maintenance import open_database
from lungwatch.db.models import Image, UtcDateTime
from lungwatch.errors import DatabaseError, MissingExtraError, TransientError


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'lungwatch.db'}"


def write(engine: Engine, *statements: str) -> None:
    with writing(engine) as connection:
        for statement in statements:
            connection.execute(text(statement))


def test_sqlite_is_durable_and_checks_foreign_keys(url: str) -> None:
    engine = open_database(url)
    with reading(engine) as connection:
        found = {
            name: connection.exec_driver_sql(f"PRAGMA {name}").scalar()
            for name in ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
        }
    engine.dispose()
    assert found == {
        "journal_mode": "wal",
        "synchronous": 2,  # FULL
        "foreign_keys": 1,
        "busy_timeout": 10_000,
    }


def test_a_reader_neither_waits_for_a_writer_nor_blocks_one(url: str) -> None:
    engine = open_engine(url, busy_timeout_s=0, creates=True)
    with writing(engine) as connection:
        connection.execute(text("CREATE TABLE t (x INTEGER)"))
    with reading(engine) as reader:
        assert reader.execute(text("SELECT count(*) FROM t")).scalar() == 0
        with writing(engine) as writer:
            writer.execute(text("INSERT INTO t VALUES (1)"))
            assert reader.execute(text("SELECT count(*) FROM t")).scalar() == 0
        # One snapshot: the reader does not see what was committed after it began.
        assert reader.execute(text("SELECT count(*) FROM t")).scalar() == 0
    engine.dispose()


def test_a_writer_takes_the_lock_before_it_reads(url: str) -> None:
    """Two writers that first read and then write would otherwise fail at the second step."""
    engine = open_engine(url, busy_timeout_s=0, creates=True)
    with (
        writing(engine) as connection,
        pytest.raises(DatabaseBusyError, match="locked by another program"),
        writing(engine),
    ):
        pass
    assert connection.closed
    engine.dispose()


def test_a_failed_write_leaves_nothing(url: str) -> None:
    engine = open_engine(url, creates=True)
    with pytest.raises(DatabaseError, match="cannot be used"):
        write(engine, "CREATE TABLE t (x INTEGER)", "INSERT INTO missing VALUES (1)")
    with reading(engine) as connection:
        tables = connection.execute(text("SELECT count(*) FROM sqlite_master")).scalar()
    engine.dispose()
    assert tables == 0


def test_busy_is_transient_and_damage_is_not() -> None:
    assert issubclass(DatabaseBusyError, TransientError)
    assert not issubclass(DatabaseError, TransientError)


def test_a_file_that_is_no_database_is_named_so(tmp_path: Path) -> None:
    path = tmp_path / "lungwatch.db"
    path.write_bytes(b"this is a text, long enough to be taken for a header" * 100)
    with pytest.raises(DatabaseError, match=f"{path} is not a database"):
        open_database(f"sqlite:///{path}")


def test_a_damaged_database_is_named_so(tmp_path: Path, url: str) -> None:
    open_database(url).dispose()
    path = tmp_path / "lungwatch.db"
    data = bytearray(path.read_bytes())
    data[100:4096] = b"\xa5" * (4096 - 100)
    path.write_bytes(data)
    with pytest.raises(DatabaseError, match=r"is damaged: .*backup restore"):
        open_database(url)


def test_a_missing_folder_is_named_so(tmp_path: Path) -> None:
    with pytest.raises(DatabaseError, match="check that its folder exists"):
        open_database(f"sqlite:///{tmp_path / 'missing' / 'lungwatch.db'}")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_named_so(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(DatabaseError, match="writable"):
            open_database(f"sqlite:///{tmp_path / 'lungwatch.db'}")
    finally:
        tmp_path.chmod(0o700)


def test_a_read_only_database_is_named_so(tmp_path: Path) -> None:
    """SQLite's own read-only mode stands for the rights that root does not lack."""
    path = tmp_path / "lungwatch.db"
    open_database(f"sqlite:///{path}").dispose()
    engine = open_engine(f"sqlite:///file:{path}?mode=ro&uri=true")
    with pytest.raises(DatabaseError, match="cannot be written: check the rights"):
        write(engine, "CREATE TABLE t (x INTEGER)")
    engine.dispose()


def test_a_full_disk_is_transient(url: str) -> None:
    """A page limit makes SQLite say what it says on a full disk."""
    engine = open_database(url)
    with pytest.raises(DatabaseBusyError, match="the disk is full: make room"):
        write(
            engine,
            "PRAGMA max_page_count = 1",
            "CREATE TABLE t (x BLOB)",
            "INSERT INTO t VALUES (zeroblob(10000000))",
        )
    engine.dispose()


@pytest.mark.parametrize("url", ["", "nonsense", "mysql://localhost/x", "sqlite+aiosqlite:///x"])
def test_a_url_that_is_not_supported_is_refused(url: str) -> None:
    with pytest.raises(DatabaseError, match="the database URL"):
        open_engine(url)


def test_postgresql_without_its_driver_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "psycopg", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'lungwatch\[postgres\]'"):
        open_engine("postgresql://localhost/lungwatch")


def test_a_password_is_never_shown() -> None:
    pytest.importorskip("psycopg")
    with pytest.raises(DatabaseBusyError) as caught:
        open_database("postgresql://me:secret@127.0.0.1:1/lungwatch?connect_timeout=2")
    assert "secret" not in str(caught.value)
    assert "127.0.0.1" in str(caught.value)


class TestInstants:
    """Times are aware on both sides and UTC in between."""

    def test_any_zone_comes_back_as_the_same_instant_in_utc(self, url: str) -> None:
        engine = open_database(url)
        given = datetime(2026, 3, 1, 0, 30, 0, 123456, timezone(timedelta(hours=7)))
        with writing(engine) as connection:
            connection.execute(
                Image.__table__.insert().values(
                    sha256="0" * 64, size_bytes=1, source_name="a", received_at=given
                )
            )
            found = connection.execute(Image.__table__.select()).one().received_at
        engine.dispose()
        assert found == given
        assert found.tzinfo is UTC

    def test_the_file_holds_utc_that_other_programs_can_read(
        self, url: str, tmp_path: Path
    ) -> None:
        engine = open_database(url)
        given = datetime(2026, 3, 1, 0, 30, tzinfo=timezone(timedelta(hours=7)))
        with writing(engine) as connection:
            connection.execute(
                Image.__table__.insert().values(
                    sha256="0" * 64, size_bytes=1, source_name="a", received_at=given
                )
            )
        engine.dispose()
        plain = sqlite3.connect(tmp_path / "lungwatch.db")
        (found,) = plain.execute("SELECT datetime(received_at) FROM image").fetchone()
        plain.close()
        assert found == "2026-02-28 17:30:00"

    def test_a_time_without_a_zone_is_a_mistake(self) -> None:
        engine = open_engine("sqlite://")
        with pytest.raises(ValueError, match="has no time zone"):
            UtcDateTime().process_bind_param(datetime(2026, 1, 1), engine.dialect)  # noqa: DTZ001
        engine.dispose()
