"""Every released schema, filled with rows of every kind, reaches the present one unaltered."""

import signal
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest
from alembic import command
from sqlalchemy import Engine, MetaData, Table, inspect, select, text
from sqlalchemy.exc import DBAPIError

from lungwatch.db.engine import open_engine, reading, writing
from lungwatch.db.maintenance import REVISIONS, alembic_config, open_database, open_existing
from lungwatch.db.maintenance import upgrade as upgrade_schema
from lungwatch.db.models import DeliveryState, State
from lungwatch.db.queries import ResultFilter, list_results
from lungwatch.errors import DatabaseError

pytestmark = pytest.mark.slow

OLDER = REVISIONS[:-1]
LONG = "ä\N{PILE OF POO}'\"\\ \n" * 2000


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'lungwatch.db'}"
    return str(request.getfixturevalue("empty_postgres"))


def build(url: str, revision: str) -> Engine:
    """Make a database of an earlier release, filled."""
    engine = open_engine(url, creates=True)
    with writing(engine) as connection:
        command.upgrade(alembic_config(connection), revision)
        fill(connection)
    return engine


def fill(connection) -> None:
    """Rows in every table: every state, with every optional column empty, and with all filled."""
    states = {"result": list(State), "delivery": list(DeliveryState)}
    metadata = MetaData()
    metadata.reflect(connection)
    for table in metadata.sorted_tables:
        if table.name == "alembic_version":
            continue
        for number, state in enumerate(states.get(table.name, ["-", "-"]), 1):
            for is_full in (False, True):
                row_id = number * 2 - is_full
                values = {
                    column.name: value_of(table, column, row_id, state)
                    for column in table.columns
                    if is_full or not column.nullable
                }
                names = ", ".join(f'"{name}"' for name in values)
                places = ", ".join(f":{name}" for name in values)
                connection.execute(
                    text(f"INSERT INTO {table.name} ({names}) VALUES ({places})"), values
                )


def value_of(table, column, row_id, state):
    kind = str(column.type).upper()
    if column.primary_key:
        return row_id
    if column.foreign_keys:
        # Each of the rows that every table has; no pair twice, for the constraints' sake.
        return 1 + (row_id - 1) % 4 if column.name != "model_id" else 1 + (row_id - 1) // 4
    if column.name == "state":
        return str(state)
    if kind.startswith(("DATETIME", "TIMESTAMP")):
        return f"2024-01-02 03:04:{row_id:02}.123456"
    if kind == "JSON":
        return '["low_contrast"]' if table.name == "result" else '{"n": 1}'
    if kind == "BOOLEAN":
        return bool(row_id % 2)
    if kind in ("INTEGER", "BIGINT"):
        return row_id * 1000
    if kind.startswith(("DOUBLE", "FLOAT")):
        return row_id / 7
    length = getattr(column.type, "length", None)
    return f"{row_id}-{LONG}"[: length or None]


def rows(engine: Engine, tables: dict[str, list[str]] | None = None):
    """All rows of some tables and columns, of all if none are named."""
    with reading(engine) as connection:
        tables = tables or {
            name: [column["name"] for column in inspect(connection).get_columns(name)]
            for name in inspect(connection).get_table_names()
            if name != "alembic_version"
        }
        found = {}
        for name, columns in tables.items():
            table = Table(name, MetaData(), autoload_with=connection)
            chosen = select(*(table.c[column] for column in columns)).order_by(table.c.id)
            found[name] = [tuple(map(str, row)) for row in connection.execute(chosen)]
    return tables, found


@pytest.mark.parametrize("revision", OLDER)
def test_a_filled_database_keeps_every_row_and_value(url: str, revision: str) -> None:
    engine = build(url, revision)
    tables, before = rows(engine)
    engine.dispose()
    assert all(before.values()), "a table that is empty would prove nothing"
    engine = open_database(url)
    try:
        assert rows(engine, tables)[1] == before
        if url.startswith("sqlite"):
            kept = open_engine(f"{url}.schema-{revision}")
            assert rows(kept) == (tables, before), "the way back is the copy"
            kept.dispose()
    finally:
        engine.dispose()


_CRASHING = """
import os, signal, sys
import sqlalchemy
from sqlalchemy import event
from lungwatch.db import open_database

url, first = sys.argv[1], int(sys.argv[2])
seen = 0

def count(_connection, _cursor, statement, *_):
    global seen
    seen += statement.lstrip().upper().startswith(("CREATE", "ALTER", "UPDATE ALEMBIC"))
    if seen > first:
        os.kill(os.getpid(), signal.SIGKILL)

event.listen(sqlalchemy.Engine, "after_cursor_execute", count)
open_database(url).dispose()
"""


def test_a_crash_in_the_middle_leaves_the_old_schema_and_the_next_start_goes_on(
    url: str,
) -> None:
    engine = build(url, "0003")
    tables, before = rows(engine)
    engine.dispose()
    ended = subprocess.run([sys.executable, "-c", _CRASHING, url, "5"], check=False, timeout=240)
    assert ended.returncode == -signal.SIGKILL
    with pytest.raises(DatabaseError, match="schema 0003, this program uses"):
        open_existing(url)
    engine = open_database(url)
    found = rows(engine, tables)[1]
    upgrade_schema(engine)
    engine.dispose()
    assert found == before


def test_the_audit_is_only_added_to(url: str) -> None:
    engine = build(url, "0004")
    engine.dispose()
    engine = open_database(url)
    changes = ["UPDATE audit SET actor = 'nobody'", "DELETE FROM audit"]
    if url.startswith("sqlite"):
        changes.append(
            "REPLACE INTO audit (id, at, actor, action, detail) "
            "VALUES (1, '2024-01-01', 'nobody', 'x', '{}')"
        )
    else:
        changes.append("TRUNCATE audit")
    for change in changes:
        with (
            pytest.raises((DatabaseError, DBAPIError), match=r"only added to|cannot be"),
            writing(engine) as connection,
        ):
            connection.execute(text(change))
    with reading(engine) as connection:
        assert connection.execute(text("SELECT count(*) FROM audit")).scalar() == 4
        assert connection.execute(text("SELECT min(actor) FROM audit")).scalar() != "nobody"
    engine.dispose()


def test_the_negative_class_is_renamed_and_old_results_get_their_models_band(url: str) -> None:
    engine = build(url, "0005")
    contract = '{"contract": 1, "decision": {"uncertain_low": 0.25, "uncertain_high": 0.75}}'
    with writing(engine) as connection:
        for change in (
            "UPDATE result SET label = 'NORMAL' WHERE id = 1",
            "UPDATE result SET label = 'COVID' WHERE id = 2",
            "UPDATE result SET label = NULL, threshold = NULL WHERE id = 3",
            "UPDATE result SET threshold = 0.5 WHERE id IN (1, 2)",
            "UPDATE result SET model_id = 1 WHERE id IN (1, 2, 3)",
        ):
            connection.execute(text(change))
        told = text("UPDATE model SET contract = :told WHERE id = 1")
        connection.execute(told, {"told": contract})
    engine.dispose()

    engine = open_database(url)
    columns = "label, threshold, uncertain_from, uncertain_to, gate_score, lung_area, lung_share"
    query = text(f"SELECT {columns} FROM result WHERE id IN (1, 2, 3) ORDER BY id")
    with reading(engine) as connection:
        found = [tuple(row) for row in connection.execute(query)]
        labels = set(connection.execute(text("SELECT label FROM result")).scalars())
        others = text("SELECT count(uncertain_from) FROM result WHERE model_id <> 1")
        assert connection.execute(others).scalar() == 0, "their contracts tell no band"
    assert found == [
        ("NEGATIVE", 0.5, 0.25, 0.75, None, None, None),
        ("COVID", 0.5, 0.25, 0.75, None, None, None),
        (None, None, None, None, None, None, None),
    ]
    assert "NORMAL" not in labels

    with writing(engine) as connection:
        command.downgrade(alembic_config(connection), "0005")
    with reading(engine) as connection:
        query = text("SELECT label FROM result WHERE id IN (1, 2) ORDER BY id")
        assert list(connection.execute(query).scalars()) == ["NORMAL", "COVID"]
        kept = {column["name"] for column in inspect(connection).get_columns("result")}
    engine.dispose()
    assert kept.isdisjoint({"findings"})
    assert kept.isdisjoint({"uncertain_from", "uncertain_to", "gate_score", "lung_share"})


def test_old_results_get_covid_as_their_only_finding_and_unscored_ones_none(url: str) -> None:
    """To the last bit, and past the number of rows that are changed at once."""
    engine = build(url, "0006")
    with writing(engine) as connection:
        connection.execute(text("UPDATE result SET probability = NULL WHERE id = 2"))
        connection.execute(text("UPDATE result SET probability = 0.1234567890123456 WHERE id = 1"))
        before = dict(tuple(row) for row in connection.execute(_PROBABILITIES))
    engine.dispose()

    engine = open_database(url)
    with reading(engine) as connection:
        table = Table("result", MetaData(), autoload_with=connection)
        found = dict(tuple(row) for row in connection.execute(select(table.c.id, table.c.findings)))
        nulls = text("SELECT id FROM result WHERE findings IS NULL AND probability IS NOT NULL")
        assert connection.execute(nulls).all() == []
        assert dict(tuple(row) for row in connection.execute(_PROBABILITIES)) == before
    assert found == {row: p if p is None else {"covid": p} for row, p in before.items()}
    assert found[1] == {"covid": 0.1234567890123456}
    assert found[2] is None
    chosen = ResultFilter(finding="covid", max_score=0.124)
    assert [row.id for row in list_results(engine, chosen)] == [1]
    assert list_results(engine, ResultFilter(finding="opacity")) == []

    with writing(engine) as connection:
        command.downgrade(alembic_config(connection), "0006")
    with reading(engine) as connection:
        kept = {column["name"] for column in inspect(connection).get_columns("result")}
        assert dict(tuple(row) for row in connection.execute(_PROBABILITIES)) == before
    engine.dispose()
    assert "findings" not in kept


_PROBABILITIES = text("SELECT id, probability FROM result")


def test_more_rows_than_are_changed_at_once_all_get_their_finding(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'lungwatch.db'}"
    engine = build(url, "0006")
    more = text(
        "WITH RECURSIVE n(i) AS (SELECT 100 UNION ALL SELECT i + 1 FROM n WHERE i < 20200) "
        "INSERT INTO result (id, image_id, model_id, state, attempts, probability, flags) "
        "SELECT i, i, 1, 'done', 1, i / 20200.0, '[]' FROM n"
    )
    with writing(engine) as connection:
        connection.execute(
            text(
                "WITH RECURSIVE n(i) AS (SELECT 100 UNION ALL SELECT i + 1 FROM n WHERE i < 20200) "
                "INSERT INTO image (id, sha256, size_bytes, source_name, received_at) "
                "SELECT i, 'h' || i, 1, 'x', '2024-01-02 03:04:05.000000' FROM n"
            )
        )
        connection.execute(more)
    engine.dispose()
    engine = open_database(url)
    with reading(engine) as connection:
        table = Table("result", MetaData(), autoload_with=connection)
        chosen = select(table.c.probability, table.c.findings).where(table.c.id >= 100)
        found = connection.execute(chosen).all()
    engine.dispose()
    assert len(found) == 20101
    assert all(row.findings == {"covid": row.probability} for row in found)


def test_the_attributes_of_schema_0010_are_null_for_old_rows_and_go_again(url: str) -> None:
    engine = build(url, "0009")
    tables, before = rows(engine)
    engine.dispose()

    engine = open_database(url)
    added = ("patient_sex", "patient_age", "study_time", "sending_ae")
    listed = [row.listed() for row in list_results(engine, ResultFilter())]
    assert len(listed) == len(before["result"])
    assert {listed_row[name] for listed_row in listed for name in added} == {None}
    change = text("UPDATE image SET patient_sex = 'F', study_time = '2014-01-31 09:15:00.000000'")
    with writing(engine) as connection:
        connection.execute(change)
    (first, *_) = list_results(engine, ResultFilter(limit=1))
    assert first.attributes["patient_sex"] == "F"
    if url.startswith("sqlite"):  # a server takes the text to be of its own zone
        assert first.attributes["study_time"] == datetime(2014, 1, 31, 9, 15, tzinfo=UTC)

    with writing(engine) as connection:
        command.downgrade(alembic_config(connection), "0009")
    assert rows(engine) == (tables, before)
    engine.dispose()
