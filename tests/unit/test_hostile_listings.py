"""Every command that lists or exports, over a home in which all text is hostile.

Each record is one line at a terminal, nothing steers it, no cell of a CSV file is a formula, and
JSON gives every value back.
"""

import csv
import io
import json
import logging
import os
import shutil
import unicodedata
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from click.testing import CliRunner

from lungwatch import RESEARCH_USE_ONLY
from lungwatch.attributes import ATTRIBUTES, RadiographMeta
from lungwatch.cli.main import main
from lungwatch.daemon.doctor import CheckOutcome
from lungwatch.daemon.home import Home
from lungwatch.daemon.timekeeping import read_clock
from lungwatch.db.audit import AuditEvent, record_events
from lungwatch.db.deliveries import Deliveries, OutboxPlan, deliveries_of
from lungwatch.db.engine import clean
from lungwatch.db.maintenance import open_database
from lungwatch.db.models import State
from lungwatch.db.removals import save_reading
from lungwatch.db.results import Store
from tests.support.rows import drop, record

T0 = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
TEXTS = [
    "new\nline action=ready",
    "carriage\rreturn",
    "tab\tstop",
    "clear\x1b[2J\x1b[31mscreen\x07",
    "\x1b]8;;https://example.org\x1b\\link\x1b]8;;\x1b\\",
    "C1\x9b31m\x85next\x90",
    "\u202egnp.exe",
    "\u2066isolated\u2069\u200e",
    "zero\u200bwidth\ufeff\u2060",
    "\u2028line\u2029paragraph",
    os.fsdecode(b"not \xff\xfe UTF-8"),
    "=cmd|' C calc'!A0",
    "+1+1",
    "-1+1",
    "@SUM(1+1)",
    "\t=1+1",
    "\uff1d1+1",
    '","=1+1',
    "<script>alert(1)<img src=x>",
    "n" * 251 + ".png",
    "%s%n{0}{home.root}",
    "'; DROP TABLE result; --",
    "DEL\x7f\b\b",
    "tag\U000e0041",
]
COUNT = len(TEXTS)
FORMULA_STARTS = tuple("=+-@\t\r\n\uff1d\uff0b\uff0d\uff20")
NUMBERS = ("probability", "logit", "threshold")
PLAN = OutboxPlan(destinations=("PACS@host:104",), kinds=("sc",))


def add_result(store, number, text):
    """A result all of whose text is hostile: scored, or refused."""
    model_id = store.register_model(
        name=text, version="1", sha256=f"{number:064x}", contract_json="{}", now=T0
    )
    claim = store.claim(
        drop(
            number,
            token=str(number),
            source_name=text,
            path=f"work/{number}/x",
            model_id=model_id,
            now=T0 + timedelta(minutes=number),
        )
    )
    hostile = {"number": 1, "instant": None}
    stated = {name: hostile.get(one.kind, text) for name, one in ATTRIBUTES.items()}
    meta = RadiographMeta(**stated | {"format": "DICOM"})
    if number % 2:
        record(
            store,
            claim.result_id,
            meta=meta,
            logit=-2.0,
            flags=[clean(text)],
            overlay=f"overlays/{number}.png",
            now=T0,
        )
        store.finish(result_id=claim.result_id, path=f"done/{number}", now=T0)
        return claim.result_id
    store.end(State.REJECTED,
        result_id=claim.result_id, reason="unreadable", message=text, meta=meta, duration_ms=1,
        now=T0,
    )  # fmt: skip
    store.set_path(image_id=claim.image_id, path=f"quarantine/unreadable/{number}.bin")
    return claim.result_id


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    """A home with rows and files called all that; nobody changes it."""
    patch = pytest.MonkeyPatch()
    home = Home(tmp_path_factory.mktemp("filled") / "home")
    home.prepare()
    engine = open_database(f"sqlite:///{home.root / 'lungwatch.db'}")
    store = Store(engine, PLAN)
    deliveries = Deliveries(engine)
    for number, text in enumerate(TEXTS):
        result_id = add_result(store, number, text)
        for sent in deliveries_of(engine, result_id):
            deliveries.start([sent.id])
            deliveries.requeue([sent.id], error=text, next_attempt_at=T0)
        # Whoever runs a command chooses both.
        patch.setenv("LOGNAME", text)
        patch.setenv("SUDO_USER", text)
        at = T0 + timedelta(minutes=number)
        record_events(engine, at, [AuditEvent(action="retry", target=text, detail={"error": text})])
        name = text.replace("/", "-")
        (home.done / name).write_bytes(b"done " + os.fsencode(name))
        (home.overlays / name).touch()
        (home.incoming / name).touch()
        home.backups.mkdir(exist_ok=True)
        (home.backups / f"lungwatch-{name[:200]}.db").touch()
    for number in range(0, COUNT, 2):
        (home.quarantine / "unreadable").mkdir(exist_ok=True)
        path = home.quarantine / "unreadable" / f"{number}.bin"
        path.write_bytes(b"x")
        os.utime(path, (T0.timestamp(), T0.timestamp()))
    save_reading(engine, read_clock(datetime.now(UTC)))
    engine.dispose()
    patch.undo()
    return home


@pytest.fixture
def copied(filled, tmp_path):
    """A copy of it, to be changed."""
    return Home(shutil.copytree(filled.root, tmp_path / "home"))


@pytest.fixture(autouse=True)
def _own_log(monkeypatch):
    """The commands set up the log for their process; the tests' stays as it is."""
    log = logging.getLogger("lungwatch")
    monkeypatch.setattr(log, "handlers", [])
    monkeypatch.setattr(log, "propagate", True)


def run(home, *words, status=0, env=None):
    """Run a command; what it said, which steers nothing and is valid UTF-8."""
    done = CliRunner().invoke(main, [*words, "--home", str(home.root)], env=env)
    assert done.exit_code == status, (done.output, done.exception)
    for said in (done.stdout_bytes, done.stderr_bytes):
        assert_steers_nothing(said.decode("utf-8"))
    return done.stdout_bytes.decode("utf-8")


def assert_steers_nothing(text):
    unseen = {char for char in text if not char.isprintable() and char != "\n"}
    assert {char for char in unseen if unicodedata.category(char) != "Zs"} == set()


def cells_of(text):
    """The rows of a CSV text, one on each line, in which no cell is a formula."""
    rows = list(csv.DictReader(io.StringIO(text, newline="")))
    assert text.count("\n") == len(rows) + 1
    for row in rows:
        for name, value in row.items():
            is_number = name in NUMBERS and value != ""
            assert is_number or not value.startswith(FORMULA_STARTS), (name, value)
    return rows


def table_of(text):
    """The lines of a table, between its rule and the empty line or the end after it."""
    lines = text.split("\n")
    (start,) = [index for index, line in enumerate(lines) if line and not line.strip("- ")]
    return lines[start + 1 : lines.index("", start)]


def test_results_are_listed_a_line_each(filled):
    text = run(filled, "results", "list")
    assert len(table_of(text)) == COUNT
    assert text.count("\n") == COUNT + 4
    assert text.endswith(f"\n\n{RESEARCH_USE_ONLY}\n")


def test_results_as_csv_and_json_hold_every_name(filled):
    rows = cells_of(run(filled, "results", "list", "--csv"))
    listed = json.loads(run(filled, "results", "list", "--json"))
    assert [row["source_name"] for row in listed] == [clean(text) for text in TEXTS[::-1]]
    assert [row["patient_id"] for row in listed] == [clean(text) for text in TEXTS[::-1]]
    assert len(rows) == COUNT
    assert len({row["source_name"] for row in rows}) == COUNT


@pytest.mark.parametrize("kind", ["csv", "json"])
def test_an_export_holds_every_result_and_no_formula(copied, tmp_path, kind):
    out = tmp_path / f"=\u202e\x1b[2J.{kind}"
    said = run(copied, "results", "export", "-o", str(out))
    assert said.count("\n") == 1
    text = out.read_bytes().decode("utf-8")
    rows = cells_of(text) if kind == "csv" else json.loads(text)
    assert len(rows) == COUNT
    assert_steers_nothing(text)


def test_each_result_is_shown_a_line_a_field(filled):
    for number in range(COUNT):
        text = run(filled, "results", "show", str(number + 1))
        deliveries = number % 2
        shown = json.loads(run(filled, "results", "show", str(number + 1), "--json"))
        fields_shown = len(shown) - 1  # without the list of deliveries
        assert text.count("\n") == fields_shown + deliveries + 2
        assert shown["institution"] == clean(TEXTS[number])
        assert len(shown["deliveries"]) == deliveries


def test_statistics_count_each_name_on_a_line(filled):
    counted = json.loads(run(filled, "results", "stats", "--json"))
    assert len(counted["by_model"]) == COUNT
    assert len(counted["by_flag"]) == COUNT // 2
    kinds = [
        counted[f"by_{name}"] for name in ("day", "status", "label", "reason", "flag", "model")
    ]
    # Each with its head, its rule and an empty line; the scores' ten bins too.
    tables = [*map(len, kinds), 10]
    text = run(filled, "results", "stats")
    assert text.count("\n") == 2 + sum(rows + 3 for rows in tables) + 1


def test_the_audit_is_listed_a_line_a_deed(filled):
    # Of the other tests' listings there are rows too.
    assert len(table_of(run(filled, "audit", "list", "--action", "retry"))) == COUNT
    listed = json.loads(run(filled, "audit", "list", "--action", "retry", "--json"))
    assert [row["target"] for row in listed] == [clean(text) for text in TEXTS[::-1]]
    for row, text in zip(listed, TEXTS[::-1], strict=True):
        shown = clean(text[:256])
        assert row["environment"].startswith(f"SUDO_USER={shown}")
        assert row["environment"].endswith(f"LOGNAME={shown}")
        assert row["detail"] == {"error": text}
    rows = cells_of(run(filled, "audit", "list", "--action", "retry", "--csv"))
    assert len({row["target"] for row in rows}) == COUNT


def test_the_outbox_is_listed_a_line_a_delivery(filled):
    listed = json.loads(run(filled, "pacs", "queue", "--json"))
    assert Counter(row["error"] for row in listed) == Counter(map(clean, TEXTS[1::2]))
    assert len(table_of(run(filled, "pacs", "queue"))) == COUNT // 2


def test_differences_are_listed_a_line_each_and_mended_whatever_they_are_called(copied):
    found = json.loads(run(copied, "reconcile", "--dry-run", "--json", status=1))["differences"]
    strange = {item["path"] for item in found if item["kind"] == "unknown_file"}
    names = [text.replace("/", "-") for text in TEXTS]
    assert strange >= {f"done/{name}" for name in names}
    text = run(copied, "reconcile", "--dry-run", status=1)
    assert text.count("\n") == len(found) + 3
    # What has no file stays a difference.
    text = run(copied, "reconcile", status=1)
    assert "put back into incoming/" in text
    assert not [path for path in copied.done.rglob("*") if path.is_file()]
    assert not any(copied.overlays.iterdir())
    back = Counter(path.read_bytes() for path in copied.incoming.iterdir())
    assert back >= Counter(b"done " + os.fsencode(name) for name in names)


def test_a_stranger_beside_the_backups_is_never_taken_for_the_newest(copied):
    """It would be kept in its place, and restored."""
    strangers = sorted(copied.backups.iterdir())
    assert max(path.name for path in strangers) > "lungwatch-9"
    assert json.loads(run(copied, "backup", "list", "--json")) == []
    made = [json.loads(run(copied, "backup", "create", "--keep", "1", "--json")) for _ in range(2)]
    assert made[1]["removed"] == [made[0]["path"]]
    listed = json.loads(run(copied, "backup", "list", "--json"))
    assert [row["path"] for row in listed] == [made[1]["path"]]
    limit = {"LUNGWATCH_RETAIN_BACKUPS_GB": "0.000001"}
    assert run(copied, "retention", "run", env=limit).startswith("0 files")
    assert sorted(copied.backups.iterdir()) == sorted([*strangers, Path(made[1]["path"])])
    assert f"restored from {made[1]['path']};" in run(copied, "backup", "restore")


def test_a_backup_may_be_called_anything(copied):
    strange = str(copied.root / "=\x1b[2J\u202e.db")
    assert run(copied, "backup", "create", "-o", strange).count("\n") == 1
    done = CliRunner().invoke(main, ["backup", "verify", strange])
    assert done.exit_code == 0, done.output
    assert done.stdout.count("\n") == 1
    assert_steers_nothing(done.stdout)
    assert run(copied, "backup", "restore", strange).count("\n") == 1
    refused = CliRunner().invoke(main, ["backup", "verify", str(copied.incoming / TEXTS[3])])
    assert refused.exit_code == 1
    assert refused.stderr.count("\n") == 1
    assert_steers_nothing(refused.stderr)


def test_removals_are_listed_a_line_each(copied):
    limit = {"LUNGWATCH_RETAIN_QUARANTINE_DAYS": "1"}
    text = run(copied, "retention", "run", "--dry-run", env=limit)
    assert text.count("\n") == COUNT // 2 + 4  # header, rule, sum, and share of the folder
    dry = json.loads(run(copied, "retention", "run", "--dry-run", "--json", env=limit))
    assert len(dry["removals"]) == COUNT // 2
    assert run(copied, "retention", "run", "--yes", env=limit).count("\n") == 1


def test_what_was_refused_is_retried_whatever_it_is_called(copied):
    ids = [str(number + 1) for number in range(0, COUNT, 2)]
    assert run(copied, "retry", *ids) == f"{len(ids)} queued for another attempt\n"
    states = {
        row["id"]: row["status"] for row in json.loads(run(copied, "results", "list", "--json"))
    }
    assert all(states[int(one)] == "queued" for one in ids)


def test_a_name_that_is_not_there_is_refused_in_one_line(filled):
    for text in TEXTS:
        done = CliRunner().invoke(main, ["results", "show", "--home", str(filled.root), "--", text])
        assert done.exit_code == 1
        assert done.stderr.count("\n") == 1
        assert_steers_nothing(done.stderr)


@pytest.mark.parametrize("as_json", [False, True])
def test_a_check_up_is_a_line_a_check(filled, monkeypatch, as_json):
    checks = [CheckOutcome(name=text, ok=None, detail=text) for text in TEXTS]
    monkeypatch.setattr("lungwatch.daemon.monitor.health.run_checks", lambda *_, **__: iter(checks))
    text = run(filled, "doctor", *(["--json"] if as_json else []))
    if as_json:
        assert [check["detail"] for check in json.loads(text)] == TEXTS
    else:
        assert text.count("\n") == COUNT
