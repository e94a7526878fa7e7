"""The sender with pretended destinations: who is asked how often, and what the rows say after."""

import importlib.util
import sys
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import ClassVar

import pytest

from lungwatch.attributes import RadiographMeta
from lungwatch.daemon.configfile import load_config
from lungwatch.daemon.home import Home
from lungwatch.daemon.pacs import destination as destination_module
from lungwatch.daemon.pacs import outbox
from lungwatch.daemon.pacs.destination import MAX_REFUSALS, CannotBuildError
from lungwatch.daemon.pacs.outbox import Sender
from lungwatch.daemon.pacs.scu import (
    Answer,
    OutgoingObject,
    StorageScu,
    StoreVerdict,
    UnreachableError,
)
from lungwatch.daemon.retry import Outages
from lungwatch.daemon.stage import DatabaseWriter, Progress
from lungwatch.db.deliveries import Deliveries, DeliveryRow, OutboxPlan, is_unsent, list_deliveries
from lungwatch.db.maintenance import open_database
from lungwatch.db.results import Store
from lungwatch.errors import ConfigError, MissingExtraError
from tests.support.clock import ManualClock
from tests.support.rows import drop, record
from tests.support.waits import PATIENCE_S, wait_for

T0 = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
UP, DOWN = "UP@localhost:104", "DOWN@localhost:105"
RESULTS = 30
DAYS, LOOKS_A_DAY = 4, 12
STORED = Answer(verdict=StoreVerdict.STORED, text="C-STORE status 0x0000")


class Network:
    """Destinations that answer as told; `calls` are the associations asked for."""

    def __init__(self, *_: object):
        self.calls: Counter[str] = Counter()
        self.received: list[tuple[str, str]] = []
        self.down = {DOWN}
        self.answer = STORED

    def send(self, destination, objects):
        self.calls[destination.name] += 1
        if destination.name in self.down:
            raise UnreachableError("connection refused")
        for item in objects:
            if self.answer.verdict is StoreVerdict.STORED:
                self.received.append((destination.name, item.path.stem))
            yield item, self.answer

    def abort(self):
        return False


class Packer:
    """Builds nothing; of the `broken` results no object can be made."""

    broken: ClassVar[set[int]] = set()

    def __init__(self, *, home, engine, **_: object):
        self._home = home
        self._engine = engine

    def path(self, uid):
        return self._home.outbox / f"{uid}.dcm"

    def sweep(self):
        pass

    def remove_if_unneeded(self, uid):
        if not is_unsent(self._engine, uid):
            self.path(uid).unlink(missing_ok=True)

    def pack(self, row: DeliveryRow, note):
        if row.result_id in self.broken:
            raise CannotBuildError("invalid SC: Modality is missing or empty")
        uid = f"2.25.{row.result_id}"
        note(row, uid)
        self.path(uid).touch()
        return OutgoingObject(row=row, path=self.path(uid), sop_class_uid="1.2")


class Bench:
    """A sender over a database with `RESULTS` results owed to both destinations."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch):
        config = load_config(
            home=root,
            environ={"LUNGWATCH_PACS_DESTINATIONS": f"{DOWN},{UP}", "LUNGWATCH_PACS_SEND": "sc"},
        )
        self.home = Home(root)
        self.home.prepare()
        self.engine = open_database(config.database_url)
        self.clock = ManualClock(T0)
        self.network = Network()
        self.crashes: list[tuple[str, BaseException]] = []
        monkeypatch.setattr(destination_module, "StorageScu", lambda *_: self.network)
        monkeypatch.setattr(outbox, "ObjectStore", Packer)
        monkeypatch.setattr(Packer, "broken", set())
        self.writer = DatabaseWriter(Outages(), self.on_crash, Progress(self.clock))
        self.writer.start()
        self.sender = Sender(
            config=config,
            home=self.home,
            engine=self.engine,
            writer=self.writer,
            outages=Outages(),
            clock=self.clock,
            on_crash=self.on_crash,
        )
        self._fill(OutboxPlan(destinations=config.pacs_destinations, kinds=config.pacs_send))

    def _fill(self, plan: OutboxPlan):
        store = Store(self.engine, plan)
        model_id = store.register_model(
            name="m", version="1", sha256="1" * 64, contract_json="{}", now=T0
        )
        for number in range(RESULTS):
            meta = RadiographMeta(
                format="DICOM",
                rows=1,
                columns=1,
                bits_stored=8,
                photometric="MONOCHROME2",
                study_uid="1.2",
                sop_uid=f"1.3.{number}",
            )
            claim = store.claim(drop(number, model_id=model_id, now=T0))
            record(store, claim.result_id, meta=meta, now=T0)
            store.finish(result_id=claim.result_id, path="done/x.dcm", now=T0)

    def on_crash(self, name: str, error: BaseException):
        self.crashes.append((name, error))

    def states(self, destination: str):
        rows = list_deliveries(self.engine, destination=destination)
        return Counter(str(row.state) for row in rows)

    def later(self, **delta: float):
        self.clock.time += timedelta(**delta)
        self.sender.work_off()


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    bench = Bench(tmp_path, monkeypatch)
    yield bench
    bench.writer.stop()
    bench.engine.dispose()


def test_a_destination_that_is_down_costs_one_attempt_and_hinders_no_other(bench: Bench):
    bench.sender.work_off()
    assert bench.network.calls[DOWN] == 1
    assert bench.states(UP) == {"sent": RESULTS}
    assert bench.states(DOWN) == {"queued": RESULTS}
    bench.later(seconds=4)
    assert bench.network.calls[DOWN] == 1
    bench.later(seconds=1)
    assert bench.network.calls[DOWN] == 2


def test_down_for_days_it_is_asked_ever_more_seldom_and_gets_all_once_in_the_end(bench: Bench):
    for _ in range(DAYS * LOOKS_A_DAY):
        bench.later(hours=24 / LOOKS_A_DAY)
    assert bench.states(DOWN) == {"queued": RESULTS}
    assert 0 < bench.network.calls[DOWN] <= DAYS * LOOKS_A_DAY
    bench.network.down.clear()
    bench.later(minutes=15)
    assert bench.states(DOWN) == {"sent": RESULTS}
    assert set(Counter(bench.network.received).values()) == {1}
    assert list(bench.home.outbox.iterdir()) == []


def test_a_file_stays_until_the_last_destination_has_it(bench: Bench):
    bench.sender.work_off()
    # The destination that is down was only offered the first of them.
    names = {path.stem for path in bench.home.outbox.iterdir()}
    waiting = {row.sop_instance_uid for row in list_deliveries(bench.engine, destination=DOWN)} - {
        None
    }
    assert names == waiting
    assert len(names) > 0


def test_what_is_refused_has_failed_after_a_bounded_number_of_times(bench: Bench):
    bench.network.answer = Answer(verdict=StoreVerdict.REFUSED, text="C-STORE status 0xA900")
    bench.sender.work_off()
    assert bench.states(UP) == {"queued": RESULTS}
    for _ in range(MAX_REFUSALS + 3):
        bench.later(minutes=15)
    assert bench.states(UP) == {"failed": RESULTS}
    rows = list_deliveries(bench.engine, destination=UP)
    assert {(row.refusals, row.error) for row in rows} == {(MAX_REFUSALS, "C-STORE status 0xA900")}


def test_a_destination_without_room_is_left_alone_and_refuses_nothing(bench: Bench):
    bench.network.answer = Answer(
        verdict=StoreVerdict.OUT_OF_RESOURCES, text="0xA700: out of resources"
    )
    for _ in range(MAX_REFUSALS + 3):
        bench.later(minutes=15)
    assert bench.network.calls[UP] <= MAX_REFUSALS + 3
    rows = list_deliveries(bench.engine, destination=UP)
    assert {(str(row.state), row.refusals) for row in rows} == {("queued", 0)}
    bench.network.answer = STORED
    bench.later(minutes=15)
    assert bench.states(UP) == {"sent": RESULTS}


def test_an_invalid_object_is_never_sent_and_the_others_are(bench: Bench):
    Packer.broken.update({3, 7})
    bench.network.down.clear()
    bench.sender.work_off()
    for destination in (UP, DOWN):
        assert bench.states(destination) == {"sent": RESULTS - 2, "invalid": 2}
    assert {uid for _, uid in bench.network.received}.isdisjoint({"2.25.3", "2.25.7"})


def test_what_a_dead_process_was_sending_is_sent_under_the_same_uid(bench: Bench):
    first = list_deliveries(bench.engine, destination=UP)[0]
    Deliveries(bench.engine).start([first.id])
    bench.sender.recover()
    bench.sender.work_off()
    assert bench.states(UP) == {"sent": RESULTS}
    assert (UP, f"2.25.{first.result_id}") in bench.network.received


def test_a_sender_that_dies_is_reported(bench: Bench, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(destination_module, "due_deliveries", lambda *_, **__: 1 / 0)
    bench.sender.start()
    wait_for(lambda: len(bench.crashes) == 2)
    assert {name for name, _ in bench.crashes} == {f"outbox {UP}", f"outbox {DOWN}"}
    bench.sender.stop(PATIENCE_S)


def test_a_stopped_sender_begins_nothing_more(bench: Bench):
    bench.sender.cancel()
    bench.sender.work_off()
    assert bench.network.calls == {}
    assert bench.states(UP) == {"queued": RESULTS}


@pytest.mark.parametrize("missing", ["pynetdicom", "highdicom"])
def test_a_missing_extra_is_named_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
):
    config = load_config(home=tmp_path, environ={})
    engine = open_database(config.database_url)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *_: None if name == missing else find_spec(name)
    )
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(MissingExtraError, match=r"pip install 'lungwatch\[pacs\]'"):
        _real_parts(config, engine)
    engine.dispose()


def _real_parts(config, engine):
    outbox.ObjectStore(config=config, home=Home(config.home), engine=engine)
    StorageScu(config)


@pytest.mark.parametrize(
    ("content", "says"), [(None, "cannot be read"), (b"short", "fewer than 16 bytes")]
)
def test_a_secret_that_is_none_stops_the_start(tmp_path: Path, content: bytes | None, says: str):
    key = tmp_path / "key"
    if content is not None:
        key.write_bytes(content)
    config = load_config(
        home=tmp_path,
        environ={
            "LUNGWATCH_PACS_DEIDENTIFY": "true",
            "LUNGWATCH_PACS_DEIDENTIFY_KEY": str(key),
        },
    )
    engine = open_database(config.database_url)
    with pytest.raises(ConfigError, match=says):
        outbox.ObjectStore(config=config, home=Home(config.home), engine=engine)
    engine.dispose()
