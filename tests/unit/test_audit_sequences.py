"""Whatever is done to a home by commands in whatever order, the audit tells each deed once.

What was refused before it began changes nothing and leaves no row; what was begun and failed
leaves one that says so; and no row is ever altered.
"""

import hashlib
import json
import logging
import os
import pwd
import shutil
import socket
import sqlite3
import tempfile
from contextlib import closing
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from lungwatch.attributes import RadiographMeta
from lungwatch.cli.main import main
from lungwatch.daemon.home import Home
from lungwatch.daemon.timekeeping import read_clock
from lungwatch.db import audit
from lungwatch.db.audit import Actor, AuditEvent, audit_rows, record_events
from lungwatch.db.engine import open_engine
from lungwatch.db.maintenance import open_database
from lungwatch.db.models import State
from lungwatch.db.queries import get_result
from lungwatch.db.removals import save_reading
from lungwatch.db.results import Store
from tests.support.rows import drop, record

T0 = datetime(2026, 3, 1, tzinfo=UTC)
DOER = (pwd.getpwuid(os.getuid()).pw_name, os.getuid(), socket.gethostname())
REFUSED, SCORED = 3, 3
META = RadiographMeta(format="PNG", rows=1, columns=1, bits_stored=8, photometric="MONOCHROME2")
RETAIN = {"LUNGWATCH_RETAIN_DONE_DAYS": "1"}
TAMPERING = (
    "UPDATE audit SET actor = 'nobody'",
    "UPDATE audit SET outcome = 'ok' WHERE id = (SELECT max(id) FROM audit)",
    "DELETE FROM audit",
    "DELETE FROM audit WHERE id = (SELECT max(id) FROM audit)",
    "REPLACE INTO audit (id, at, actor, action, detail) SELECT id, at, '', action, '{}' FROM audit",
)


def _digest(path):
    return f"sha256 {hashlib.sha256(path.read_bytes()).hexdigest()}"


@cache
def _filled_home():
    """A home with refused and with long finished results, packed as one archive."""
    with tempfile.TemporaryDirectory() as folder:
        home = Home(Path(folder) / "home")
        home.prepare()
        engine = open_database(f"sqlite:///{home.root / 'lungwatch.db'}")
        store = Store(engine)
        model_id = store.register_model(
            name="m", version="1", sha256="1" * 64, contract_json="{}", now=T0
        )
        for number in range(REFUSED + SCORED):
            _add(home, store, model_id, number)
        save_reading(engine, read_clock(datetime.now(UTC)))
        engine.dispose()
        return Path(shutil.make_archive(f"{folder}/home", "tar", home.root)).read_bytes()


def _add(home, store, model_id, number):
    content = b"%d" % number
    sha256 = hashlib.sha256(content).hexdigest()
    is_refused = number < REFUSED
    path = f"quarantine/unreadable/{sha256}.bin" if is_refused else f"done/{sha256}.bin"
    home.absolute(path).parent.mkdir(exist_ok=True)
    home.absolute(path).write_bytes(content)
    os.utime(home.absolute(path), (T0.timestamp(), T0.timestamp()))
    claim = store.claim(
        drop(token=sha256, sha256=sha256, source_name="x", path=path, model_id=model_id, now=T0)
    )
    if is_refused:
        store.end(State.REJECTED,
            result_id=claim.result_id, reason="unreadable", message="x", meta=None, duration_ms=1,
            now=T0,
        )  # fmt: skip
        return
    record(store, claim.result_id, meta=META, overlay=None, now=T0)
    store.finish(result_id=claim.result_id, path=path, now=T0)


class Administrator(RuleBasedStateMachine):
    """Somebody who runs commands; `expected` is what the audit has to hold, the oldest first."""

    def __init__(self):
        super().__init__()
        memory = Path("/dev/shm")
        self.folder = tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None)
        self.place = Path(self.folder.name)
        archive = self.place / "home.tar"
        archive.write_bytes(_filled_home())
        self.home = Home(self.place / "home")
        shutil.unpack_archive(archive, self.home.root, filter="data")
        self.database = self.home.root / "lungwatch.db"
        self.expected = []
        self.states = dict.fromkeys(range(1, REFUSED + 1), "rejected")
        self.backups = {}
        self.seen = []
        self.number = 0

    def teardown(self):
        self.folder.cleanup()

    def run(self, *words, env=None):
        done = CliRunner().invoke(main, [*words, "--home", str(self.home.root)], env=env)
        assert done.exception is None or isinstance(done.exception, SystemExit), done.output
        return done

    def new_name(self):
        self.number += 1
        return self.place / f"{self.number}"

    def expect(self, action, target, outcome="ok", **detail):
        self.expected.append((action, target, outcome, detail))

    @rule(chosen=st.lists(st.integers(1, REFUSED + SCORED + 1), min_size=1, max_size=3))
    def retry(self, chosen):
        ids = list(dict.fromkeys(chosen))
        done = self.run("retry", *map(str, chosen))
        if all(self.states.get(one) == "rejected" for one in ids):
            assert done.exit_code == 0, done.output
            for one in ids:
                self.states[one] = "queued"
                self.expect("retry", f"result {one}")
        else:
            assert done.exit_code == 1

    @rule(count=st.integers(0, 2))
    def retry_that_breaks_off(self, count):
        """The database is taken away after some of them."""
        ids = [one for one, state in self.states.items() if state == "rejected"]
        if len(ids) <= count:
            return
        ask, asked = Store.request_retry, []

        def breaks(store, *, result_id, now, events):
            if len(asked) == count:
                raise KeyboardInterrupt
            asked.append(result_id)
            ask(store, result_id=result_id, now=now, events=events)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Store, "request_retry", breaks)
            assert self.run("retry", *map(str, ids)).exit_code == 1
        for one in asked:
            self.states[one] = "queued"
            self.expect("retry", f"result {one}")
        self.expect("retry", f"result {ids[count]}", "failed", error="KeyboardInterrupt")

    @rule(kind=st.sampled_from(["csv", "json"]))
    def export(self, kind):
        out = self.new_name().with_suffix(f".{kind}")
        assert self.run("results", "export", "-o", str(out)).exit_code == 0
        self.expect("results export", _digest(out), results=REFUSED + SCORED, format=kind)

    @rule()
    def export_to_nowhere(self):
        listed = self.run("results", "list", "--csv").stdout_bytes
        self.expect("results list", None, results=REFUSED + SCORED, filters=[])
        digest = hashlib.sha256(listed).hexdigest()
        assert self.run("results", "export", "-o", f"{self.place}/no/all.csv").exit_code == 1
        self.expect("results export", f"sha256 {digest}", "failed", error="LungwatchError")

    @rule()
    def look(self):
        """Whoever looks at patients' results leaves that alone; any other question nothing."""
        for words in (
            ("results", "list"), ("results", "stats"), ("reconcile", "--dry-run"),
            ("retention", "run", "--dry-run"), ("backup", "list"), ("audit", "list", "--csv"),
        ):  # fmt: skip
            assert self.run(*words, env=RETAIN).exit_code in (0, 1)
        for action in ("results list", "results stats"):
            self.expect(action, None, results=REFUSED + SCORED, filters=[])

    @rule()
    def retain(self):
        there = [path for path in self.home.done.rglob("*.bin") if path.name != "stray.bin"]
        size_bytes = sum(path.stat().st_blocks * 512 for path in there)
        done = self.run("retention", "run", env=RETAIN)
        assert done.exit_code == 0, done.output
        if there:
            self.expect("retention run", "home", "started", chosen=len(there))
            self.expect("retention run", "done", files=len(there), size_bytes=size_bytes)

    @rule()
    def retain_what_cannot_be_removed(self):
        there = [path for path in self.home.done.rglob("*.bin") if path.name != "stray.bin"]
        if not there:
            return
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("lungwatch.daemon.retention.fsync_dir", _refuse)
            done = self.run("retention", "run", env=RETAIN)
        assert done.exit_code == 1, done.output
        self.expect("retention run", "home", "started", chosen=len(there))
        self.expect("retention run", "done", "failed", files=0, size_bytes=0)

    @rule()
    def backup(self):
        file = self.new_name().with_suffix(".db")
        before = list(self.expected), dict(self.states)
        assert self.run("backup", "create", "-o", str(file)).exit_code == 0
        self.backups[file] = before
        self.expect("backup create", _digest(file), size_bytes=file.stat().st_size, removed=0)
        refused = self.run("backup", "create", "-o", str(file))
        assert refused.exit_code == 1

    @precondition(lambda self: self.backups)
    @rule(rank=st.integers(0, 100))
    def restore(self, rank):
        file = list(self.backups)[rank % len(self.backups)]
        told, states = self.backups[file]
        self.expected, self.states = list(told), dict(states)
        done = self.run("backup", "restore", str(file), "--json")
        assert done.exit_code == 0, done.output
        said = json.loads(done.stdout)
        counts = {name: said[name] for name in ("put_back", "differences")}
        self.expect("backup restore", _digest(file), **counts)
        self.seen = self.seen[: len(told)]
        self.collect()

    @rule()
    def restore_what_is_no_backup(self):
        wrong = self.new_name()
        wrong.write_bytes(b"no database at all")
        assert self.run("backup", "restore", str(wrong)).exit_code == 1

    @rule()
    def reconcile(self):
        (self.home.done / "stray.bin").write_bytes(b"stray %d" % self.number)
        assert self.run("reconcile").exit_code in (0, 1)
        self.expect("reconcile", "home", mended=1, unknown_file=1)
        self.collect()

    @rule()
    def reconcile_that_fails(self):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("lungwatch.daemon.reconcile.Reconciler.run", _refuse)
            CliRunner().invoke(main, ["reconcile", "--home", str(self.home.root)])
        self.expect("reconcile", "home", "failed", error="OSError")

    @precondition(lambda self: self.expected)
    @rule()
    def tamper(self):
        with closing(sqlite3.connect(self.database)) as connection:
            for change in TAMPERING:
                with pytest.raises(sqlite3.IntegrityError, match="only added to"):
                    connection.execute(change)

    def collect(self):
        """Take away what was put back: there is no daemon that would."""
        for path in self.home.incoming.iterdir():
            path.unlink()

    @invariant()
    def each_event_is_written_once_and_no_row_is_altered(self):
        engine = open_engine(f"sqlite:///{self.database}")
        try:
            rows = audit_rows(engine)[::-1]
        finally:
            engine.dispose()
        told = [(row.action, row.target, row.outcome, row.detail) for row in rows]
        assert told == self.expected
        assert {(row.actor, row.uid, row.host) for row in rows} <= {DOER}
        assert rows[: len(self.seen)] == self.seen
        times = [row.at for row in rows]
        assert times == sorted(times)
        self.seen = rows


def _refuse(*_, **__):
    raise OSError(5, "Input/output error")


@pytest.fixture(autouse=True)
def _as_one_user(monkeypatch):
    """No sudo; and the commands set up the log for their process, not for the tests'."""
    monkeypatch.delenv("SUDO_USER", raising=False)
    log = logging.getLogger("lungwatch")
    monkeypatch.setattr(log, "handlers", [])
    monkeypatch.setattr(log, "propagate", True)


TestAdministrator = Administrator.TestCase
TestAdministrator.settings = settings(
    max_examples=8, stateful_step_count=12, deadline=None, derandomize=True, database=None
)


@pytest.fixture
def engine(tmp_path):
    engine = open_database(f"sqlite:///{tmp_path / 'lungwatch.db'}")
    yield engine
    engine.dispose()


def test_what_was_begun_first_is_listed_as_the_older_whoever_wrote_first(engine):
    for minutes in (2, 1, 3, 1):
        record_events(engine, T0 + timedelta(minutes=minutes), [AuditEvent(action=f"a{minutes}")])
    assert [row.action for row in audit_rows(engine)] == ["a3", "a2", "a1", "a1"]
    assert [row.id for row in audit_rows(engine, action="a1")] == [4, 2]
    assert [row.action for row in audit_rows(engine, limit=2)] == ["a3", "a2"]


def test_deeds_are_written_down_together_or_not_at_all(engine):
    events = [AuditEvent(action="a"), AuditEvent(action="b", detail={"no JSON": object()})]
    with pytest.raises(Exception, match="not JSON serializable"):
        record_events(engine, T0, events)
    assert audit_rows(engine) == []


def test_a_retry_that_cannot_be_written_down_does_not_happen(tmp_path):
    archive = tmp_path / "home.tar"
    archive.write_bytes(_filled_home())
    shutil.unpack_archive(archive, tmp_path / "home", filter="data")
    engine = open_database(f"sqlite:///{tmp_path / 'home' / 'lungwatch.db'}")
    events = [AuditEvent(action="retry", detail={"no JSON": object()})]
    with pytest.raises(Exception, match="not JSON serializable"):
        Store(engine).request_retry(result_id=1, now=T0, events=events)
    assert get_result(engine, 1).status == "rejected"
    assert audit_rows(engine) == []
    engine.dispose()


@pytest.mark.parametrize("name", ["\udcff", "a\0b", "\x1b[2J", "\u202e"])
def test_a_deed_is_written_down_whatever_its_doer_is_called(engine, name):
    actor = Actor(uid=os.getuid(), environment={"USER": name})
    record_events(engine, T0, [AuditEvent(action="retry", target=name)], actor)
    (row,) = audit_rows(engine)
    shown = name.replace("\udcff", "\\udcff").replace("\0", "\\x00")
    assert (row.target, row.environment) == (shown, f"USER={shown}")


def test_the_actor_is_the_kernel_s_user_whatever_the_environment_says(engine, monkeypatch):
    for name in ("SUDO_USER", "USER", "LOGNAME"):
        monkeypatch.setenv(name, "somebody-else")
    record_events(engine, T0, [AuditEvent(action="retry")])
    (row,) = audit_rows(engine)
    assert (row.actor, row.uid) == DOER[:2]
    assert row.environment == "SUDO_USER=somebody-else USER=somebody-else LOGNAME=somebody-else"
    assert audit_rows(engine, actor="somebody-else") == [row]
    assert audit_rows(engine, actor=DOER[0]) == [row]


def test_the_login_that_sudo_leaves_as_it_is_is_written_down(engine, monkeypatch):
    monkeypatch.setattr(audit, "login_uid_of", lambda _: 0)
    record_events(engine, T0, [AuditEvent(action="retry")])
    (row,) = audit_rows(engine)
    assert (row.login, row.login_uid) == ("root", 0)


def test_a_user_of_another_process_has_its_own_number(engine):
    """A number without a name, as in a container; larger than PostgreSQL's integers."""
    record_events(engine, T0, [AuditEvent(action="a")], Actor(uid=54_321, login_uid=2**32 - 2))
    (row,) = audit_rows(engine)
    assert (row.actor, row.uid) == ("uid 54321", 54_321)
    assert (row.login, row.login_uid) == ("uid 4294967294", 2**32 - 2)
