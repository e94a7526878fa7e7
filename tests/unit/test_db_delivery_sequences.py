"""Whatever is sent, refused, killed, asked for and removed in whatever order: nothing is lost."""

import tempfile
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from lungwatch.attributes import RadiographMeta
from lungwatch.db.deliveries import Deliveries, OutboxPlan, due_deliveries, list_deliveries
from lungwatch.db.engine import open_engine
from lungwatch.db.maintenance import open_database
from lungwatch.db.models import UNSENT, DeliveryState, IllegalTransition
from lungwatch.db.queries import iter_all
from lungwatch.db.removals import mark_original_removed, removable_originals
from lungwatch.db.results import Store
from tests.support.rows import drop, record

RESULTS, MOST_REFUSALS = 2, 2
LONGEST = timedelta(hours=1)
DESTINATIONS = ("A@h:1", "B@h:2")
META = RadiographMeta(
    format="DICOM",
    rows=1,
    columns=1,
    bits_stored=8,
    photometric="MONOCHROME2",
    study_uid="1.2",
    sop_uid="1.2.3",
)
RANK = st.integers(0, 2 * RESULTS * len(DESTINATIONS) - 1)


@cache
def _empty_database() -> bytes:
    """A database of today's schema: migrating one for every example would take most of the time."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "lungwatch.db"
        open_database(f"sqlite:///{file}").dispose()
        return file.read_bytes()


class Outbox(RuleBasedStateMachine):
    """A sender, its deaths, an administrator who asks again, and retention, over two results.

    `expected` is what every delivery's state has to be; `tried` those that the sender holds.
    """

    def __init__(self) -> None:
        super().__init__()
        memory = Path("/dev/shm")
        self.folder = tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None)
        file = Path(self.folder.name) / "lungwatch.db"
        file.write_bytes(_empty_database())
        self.engine = open_engine(f"sqlite:///{file}")
        self.now = datetime(2026, 3, 1, tzinfo=UTC)
        plan = OutboxPlan(destinations=DESTINATIONS, kinds=("sc", "sr"))
        store = Store(self.engine, plan)
        model_id = store.register_model(
            name="m", version="1", sha256="1" * 64, contract_json="{}", now=self.now
        )
        for number in range(RESULTS):
            claim = store.claim(
                drop(
                    number,
                    source_name="x",
                    path=f"work/{number}/x",
                    model_id=model_id,
                    now=self.now,
                )
            )
            record(
                store, claim.result_id, meta=replace(META, sop_uid=f"1.2.3.{number}"), now=self.now
            )
            store.finish(result_id=claim.result_id, path=f"done/{number}", now=self.now)
        self.deliveries = Deliveries(self.engine)
        self.ids = [row.id for row in list_deliveries(self.engine)]
        self.expected = dict.fromkeys(self.ids, DeliveryState.QUEUED)
        self.refusals = dict.fromkeys(self.ids, 0)
        self.removed: set[str] = set()

    def teardown(self) -> None:
        self.engine.dispose()
        self.folder.cleanup()

    def _attempt(self, change, delivery_id: int) -> bool:
        """Make a change that only a delivery under way allows; whether it was allowed."""
        is_sending = self.expected[delivery_id] is DeliveryState.SENDING
        try:
            change()
        except IllegalTransition:
            assert not is_sending
            return False
        assert is_sending
        return True

    @rule(destination=st.sampled_from(DESTINATIONS), limit=st.integers(1, 3))
    def start(self, destination: str, limit: int) -> None:
        rows = due_deliveries(self.engine, destination, now=self.now, longest=LONGEST, limit=limit)
        for row in rows:
            assert self.expected[row.id] is DeliveryState.QUEUED
        self.deliveries.start([row.id for row in rows])
        self.expected |= {row.id: DeliveryState.SENDING for row in rows}

    @rule(rank=RANK)
    def sent(self, rank: int) -> None:
        one = self.ids[rank]
        if self._attempt(lambda: self.deliveries.sent(one, self.now), one):
            self.expected[one] = DeliveryState.SENT

    @rule(rank=RANK)
    def invalid(self, rank: int) -> None:
        one = self.ids[rank]
        if self._attempt(lambda: self.deliveries.invalid(one, "x"), one):
            self.expected[one] = DeliveryState.INVALID

    @rule(rank=RANK)
    def not_reached(self, rank: int) -> None:
        one = self.ids[rank]
        later = self.now + timedelta(seconds=5)
        if self._attempt(
            lambda: self.deliveries.requeue([one], error="x", next_attempt_at=later), one
        ):
            self.expected[one] = DeliveryState.QUEUED

    @rule(rank=RANK)
    def refused(self, rank: int) -> None:
        one = self.ids[rank]
        ended = []
        if self._attempt(
            lambda: ended.append(
                self.deliveries.refused(
                    one, error="x", next_attempt_at=self.now, most=MOST_REFUSALS
                )
            ),
            one,
        ):
            self.refusals[one] += 1
            fails = self.refusals[one] >= MOST_REFUSALS
            assert ended == [DeliveryState.FAILED if fails else DeliveryState.QUEUED]
            self.expected[one] = ended[0]

    @rule()
    def die_and_recover(self) -> None:
        self.deliveries.recover(self.now)
        for one, state in self.expected.items():
            if state is DeliveryState.SENDING:
                self.expected[one] = DeliveryState.QUEUED

    @rule(rank=RANK)
    def ask_again(self, rank: int) -> None:
        one = self.ids[rank]
        state = self.expected[one]
        count = self.deliveries.request([one], self.now)
        assert count == (state is not DeliveryState.SENDING)
        if state not in (DeliveryState.SENDING, DeliveryState.QUEUED):
            self.refusals[one] = 0
            self.expected[one] = DeliveryState.QUEUED

    @rule(seconds=st.integers(-60, 7200))
    def time_passes(self, seconds: int) -> None:
        self.now += timedelta(seconds=seconds)

    @rule()
    def clean_up(self) -> None:
        """Retention takes what nothing waits for, and only that."""
        waiting = {row.sha256 for row in list_deliveries(self.engine) if row.state in UNSENT}
        for kept in removable_originals(self.engine):
            if mark_original_removed(self.engine, kept, self.now):
                self.removed.add(kept.path)
                assert f"{int(kept.path.removeprefix('done/')):064x}" not in waiting
        there = {row.path for row in iter_all(self.engine)} - {None}
        assert there == {f"done/{number}" for number in range(RESULTS)} - self.removed

    @invariant()
    def each_is_there_once_and_in_the_state_that_its_story_leads_to(self) -> None:
        rows = list_deliveries(self.engine)
        assert {row.id: row.state for row in rows} == self.expected
        assert len({(row.result_id, row.destination, row.kind) for row in rows}) == len(self.ids)

    @invariant()
    def only_what_was_sent_says_when(self) -> None:
        for row in list_deliveries(self.engine):
            if row.state is DeliveryState.SENT:
                assert row.sent_at is not None
            assert row.refusals <= MOST_REFUSALS


TestOutbox = Outbox.TestCase
TestOutbox.settings = settings(
    max_examples=8, stateful_step_count=20, deadline=None, derandomize=True, database=None
)
