"""The scripts build what the models say, once, in one piece, and only forwards."""

import sqlite3
import subprocess
import sys
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import inspect, text

from lungwatch.db.deliveries import Deliveries, OutboxPlan, list_deliveries
from lungwatch.db.engine import open_engine, reading, writing
from lungwatch.db.maintenance import (
    REVISIONS,
    alembic_config,
    check_current,
    open_database,
    open_existing,
)
from lungwatch.db.maintenance import upgrade as upgrade_schema
from lungwatch.db.models import Base
from lungwatch.db.queries import get_result
from lungwatch.errors import DatabaseError, NotFoundError

FIRST_SCHEMA_ROWS = (
    """INSERT INTO image (id, sha256, size_bytes, source_name, path, received_at, patient_id,
        station) VALUES (7, 'abc', 12, 'chest.dcm', 'done/abc.dcm',
        '2024-01-02 03:04:05.000000', 'MRN-1', 'ROOM1')""",
    """INSERT INTO model (id, name, version, sha256, contract, first_used_at)
        VALUES (1, 'baseline', '1.0.0', 'def', '{}', '2024-01-02 03:04:05.000000')""",
    """INSERT INTO result (id, image_id, model_id, state, attempts, probability, flags)
        VALUES (3, 7, 1, 'done', 1, 0.25, '[]')""",
)


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'lungwatch.db'}"


def test_the_migrated_schema_is_that_of_the_models(url: str) -> None:
    engine = open_database(url)
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        differences = compare_metadata(context, Base.metadata)
    engine.dispose()
    assert differences == []


def test_constraints_have_the_names_of_the_models(url: str) -> None:
    """A later migration addresses them by name."""
    engine = open_database(url)
    inspector = inspect(engine)
    for table in Base.metadata.sorted_tables:
        found = {
            inspector.get_pk_constraint(table.name)["name"],
            *(item["name"] for item in inspector.get_unique_constraints(table.name)),
            *(item["name"] for item in inspector.get_foreign_keys(table.name)),
        }
        named = {str(constraint.name) for constraint in table.constraints}
        assert found == named
    engine.dispose()


def test_the_listed_revisions_are_the_scripts(url: str) -> None:
    engine = open_engine(url, creates=True)
    with engine.connect() as connection:
        scripts = ScriptDirectory.from_config(alembic_config(connection)).walk_revisions()
        scripts = [script.revision for script in scripts]
    engine.dispose()
    assert tuple(reversed(scripts)) == REVISIONS


def test_upgrading_again_changes_nothing(url: str, tmp_path: Path) -> None:
    open_database(url).dispose()
    before = (tmp_path / "lungwatch.db").read_bytes()
    engine = open_database(url)
    upgrade_schema(engine)
    check_current(engine)
    engine.dispose()
    assert (tmp_path / "lungwatch.db").read_bytes() == before


def test_a_filled_database_of_the_first_schema_keeps_its_rows(url: str) -> None:
    engine = open_engine(url, creates=True)
    with writing(engine) as connection:
        command.upgrade(alembic_config(connection), "0001")
        for statement in FIRST_SCHEMA_ROWS:
            connection.execute(text(statement))
    before = inspect(engine).get_columns("image")
    engine.dispose()

    with pytest.raises(DatabaseError, match="schema 0001, this program uses"):
        open_existing(url)
    engine = open_database(url)
    detail = get_result(engine, 3)
    added = {column["name"] for column in inspect(engine).get_columns("image")} - {
        column["name"] for column in before
    }
    engine.dispose()
    assert added == {
        "sop_class",
        "series_date",
        "acquisition_date",
        "manufacturer_model",
        "removed_at",
        "patient_sex",
        "patient_age",
        "study_time",
        "sending_ae",
    }
    # The way back: the database as it was, kept beside the new one.
    with closing(sqlite3.connect(url.removeprefix("sqlite:///") + ".schema-0001")) as kept:
        assert kept.execute("SELECT version_num FROM alembic_version").fetchone() == ("0001",)
        assert kept.execute("SELECT probability FROM result").fetchone() == (0.25,)
    assert (detail.sha256, detail.source_name, detail.probability) == ("abc", "chest.dcm", 0.25)
    stated = detail.attributes
    assert (stated["patient_id"], stated["station"]) == ("MRN-1", "ROOM1")
    assert detail.file == "done/abc.dcm"
    assert stated["sop_class"] is stated["manufacturer_model"] is None


def test_a_filled_database_of_the_second_schema_gains_an_empty_outbox(url: str) -> None:
    """Nobody asked for old results to be sent; from now on they can be."""
    engine = open_engine(url, creates=True)
    with writing(engine) as connection:
        command.upgrade(alembic_config(connection), "0002")
        for statement in FIRST_SCHEMA_ROWS:
            connection.execute(text(statement))
        connection.execute(text("UPDATE image SET study_uid = '1.2', sop_uid = '1.2.3'"))
    engine.dispose()

    engine = open_database(url)
    assert (get_result(engine, 3).probability, get_result(engine, 3).delivery) == (0.25, None)
    assert list_deliveries(engine) == []
    plan = OutboxPlan(destinations=("PACS@host:104",), kinds=("sc", "sr"))
    assert Deliveries(engine).queue(3, plan, datetime(2026, 3, 1, tzinfo=UTC)) == 2
    assert get_result(engine, 3).delivery == "queued"
    engine.dispose()


def test_processes_that_start_at_once_all_find_the_schema(url: str) -> None:
    program = (
        "import sys; from lungwatch.db import open_database, check_current\n"
        "sys.stdin.read(); engine = open_database(sys.argv[1]); check_current(engine)"
    )
    started = [
        subprocess.Popen(
            [sys.executable, "-c", program, url],
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    for process in started:
        assert process.stdin is not None
        process.stdin.close()
        process.stdin = None
    errors = [process.communicate(timeout=240)[1] for process in started]
    assert [process.returncode for process in started] == [0, 0, 0], errors


def test_a_migration_that_fails_leaves_nothing(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = open_engine(url, creates=True)
    monkeypatch.setattr(
        "alembic.operations.Operations.create_index", lambda *_, **__: 1 / 0, raising=True
    )
    with pytest.raises(ZeroDivisionError):
        upgrade_schema(engine)
    monkeypatch.undo()
    assert inspect(engine).get_table_names() == []
    upgrade_schema(engine)
    check_current(engine)
    engine.dispose()
    assert Path(url.removeprefix("sqlite:///")).is_file()


@pytest.mark.parametrize("open_it", [open_database, open_existing])
def test_a_newer_database_is_refused_and_left_alone(url: str, open_it) -> None:
    engine = open_database(url)
    with writing(engine) as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(DatabaseError, match="schema 9999, which is newer than this program"):
        open_it(url)
    with reading(engine) as connection:
        found = connection.execute(text("SELECT version_num FROM alembic_version")).scalar()
    engine.dispose()
    assert found == "9999"


def test_another_programs_database_is_refused_and_left_alone(url: str) -> None:
    engine = open_engine(url, creates=True)
    with writing(engine) as connection:
        connection.execute(text("CREATE TABLE recipes (x INTEGER)"))
    with pytest.raises(DatabaseError, match="belongs to another program"):
        open_database(url)
    assert inspect(engine).get_table_names() == ["recipes"]
    engine.dispose()


def test_reading_never_creates_a_database(url: str, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"no database at .*; run `lungwatch run` first"):
        open_existing(url)
    assert list(tmp_path.iterdir()) == []


def test_a_database_without_a_schema_says_how_to_get_one(url: str, tmp_path: Path) -> None:
    (tmp_path / "lungwatch.db").touch()
    with pytest.raises(DatabaseError, match=r"no schema yet.*`lungwatch run` brings it up to date"):
        open_existing(url)


def test_reading_a_current_database_needs_no_alembic(url: str) -> None:
    """Its import would double the time of every query."""
    open_database(url).dispose()
    program = (
        "import sys; from lungwatch.db import open_existing; open_existing(sys.argv[1]).dispose()\n"
        "sys.exit('alembic' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program, url], check=False, timeout=240)
    assert done.returncode == 0
