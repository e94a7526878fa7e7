"""The outbox's rows: owed with the result, in one piece, changed by compare-and-set alone."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from sqlalchemy import Engine, event

from lungwatch.attributes import RadiographMeta
from lungwatch.db.deliveries import (
    Deliveries,
    DeliveryRow,
    OutboxPlan,
    deliveries_of,
    destination_statuses,
    due_deliveries,
    is_unsent,
    list_deliveries,
    unsent_uids,
)
from lungwatch.db.maintenance import open_database
from lungwatch.db.models import DeliveryState, IllegalTransition
from lungwatch.db.queries import ResultFilter, get_result, list_results
from lungwatch.db.results import Store
from lungwatch.errors import NotFoundError
from tests.support.rows import drop, record

T0 = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
ONE, OTHER = "ONE@localhost:104", "OTHER@localhost:105+tls"
PLAN = OutboxPlan(destinations=(ONE, OTHER), kinds=("sc", "sr"))
DICOM = RadiographMeta(
    format="DICOM",
    rows=1,
    columns=1,
    bits_stored=12,
    photometric="MONOCHROME2",
    study_uid="1.2.3",
    sop_uid="1.2.3.4",
)
LONGEST = timedelta(minutes=15)


@dataclass
class Desk:
    engine: Engine
    store: Store
    deliveries: Deliveries
    model_id: int

    def record(self, number: int = 0, meta: RadiographMeta | None = None) -> int:
        claim = self.store.claim(drop(number, model_id=self.model_id, now=T0))
        record(
            self.store,
            claim.result_id,
            meta=meta or replace(DICOM, sop_uid=f"1.2.3.4.{number}"),
            now=T0,
        )
        return claim.result_id

    def finish(self, number: int = 0, meta: RadiographMeta | None = None) -> int:
        result_id = self.record(number, meta)
        self.store.finish(result_id=result_id, path="done/x.dcm", now=T0)
        return result_id

    def due(self, destination: str = ONE, now: datetime = T0) -> list[DeliveryRow]:
        return due_deliveries(self.engine, destination, now=now, longest=LONGEST, limit=100)

    def one(self) -> DeliveryRow:
        """The first delivery of the first result."""
        return list_deliveries(self.engine)[0]


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    engine = open_database(f"sqlite:///{tmp_path / 'lungwatch.db'}")
    store = Store(engine, PLAN)
    model_id = store.register_model(
        name="m", version="1", sha256="1" * 64, contract_json="{}", now=T0
    )
    yield Desk(engine, store, Deliveries(engine), model_id)
    engine.dispose()


class TestOwing:
    def test_a_result_that_is_done_owes_each_object_to_each_destination_once(
        self, desk: Desk
    ) -> None:
        result_id = desk.finish()
        rows = deliveries_of(desk.engine, result_id)
        assert {(row.destination, row.kind) for row in rows} == {
            (ONE, "sc"),
            (ONE, "sr"),
            (OTHER, "sc"),
            (OTHER, "sr"),
        }
        assert {(row.state, row.attempts, row.next_attempt_at) for row in rows} == {
            (DeliveryState.QUEUED, 0, T0)
        }
        assert desk.deliveries.queue(result_id, PLAN, T0) == 0
        assert len(deliveries_of(desk.engine, result_id)) == 4

    def test_a_copy_of_the_same_instance_owes_no_second_answer(self, desk: Desk) -> None:
        """Another encoding of one SOP instance: a result of its own, one answer in the PACS."""
        desk.finish(1, DICOM)
        copy = desk.finish(2, DICOM)
        assert deliveries_of(desk.engine, copy) == []
        assert desk.deliveries.queue(copy, PLAN, T0) == 0
        other = replace(PLAN, destinations=("NEW@localhost:106",), kinds=("sc",))
        assert desk.deliveries.queue(copy, other, T0) == 1

    @pytest.mark.parametrize("field", ["study_uid", "sop_uid"])
    def test_another_instance_or_study_has_its_answer(self, desk: Desk, field: str) -> None:
        desk.finish(1, DICOM)
        assert len(deliveries_of(desk.engine, desk.finish(2, replace(DICOM, **{field: "9"})))) == 4

    def test_another_model_answers_the_same_instance_once_more(self, desk: Desk) -> None:
        desk.finish(1, DICOM)
        desk.model_id = desk.store.register_model(
            name="m", version="2", sha256="2" * 64, contract_json="{}", now=T0
        )
        assert len(deliveries_of(desk.engine, desk.finish(2, DICOM))) == 4

    def test_what_was_refused_or_invalid_is_no_answer(self, desk: Desk) -> None:
        first = desk.finish(1, DICOM)
        ids = [row.id for row in deliveries_of(desk.engine, first)]
        desk.deliveries.start(ids)
        desk.deliveries.invalid(ids[0], "x")
        desk.deliveries.refused(ids[1], error="x", next_attempt_at=T0, most=1)
        for delivery_id in ids[2:]:
            desk.deliveries.sent(delivery_id, T0)
        assert len(deliveries_of(desk.engine, desk.finish(2, DICOM))) == 2

    def test_before_it_is_done_nothing_is_owed(self, desk: Desk) -> None:
        assert deliveries_of(desk.engine, desk.record()) == []

    @pytest.mark.parametrize("missing", ["study_uid", "sop_uid"])
    def test_an_image_in_no_study_owes_nothing(self, desk: Desk, missing: str) -> None:
        result_id = desk.finish(meta=replace(DICOM, **{missing: None}))
        assert deliveries_of(desk.engine, result_id) == []
        assert get_result(desk.engine, result_id).delivery is None

    def test_without_destinations_nothing_is_owed(self, desk: Desk) -> None:
        desk.store = Store(desk.engine)
        assert deliveries_of(desk.engine, desk.finish()) == []

    def test_a_result_is_not_done_unless_what_it_owes_is_written(self, desk: Desk) -> None:
        result_id = desk.record()

        @event.listens_for(desk.engine, "before_cursor_execute")
        def fail(_connection, _cursor, statement, *_):
            if statement.startswith("INSERT INTO delivery"):
                raise OSError("power loss")

        with pytest.raises(OSError, match="power loss"):
            desk.store.finish(result_id=result_id, path="done/x.dcm", now=T0)
        event.remove(desk.engine, "before_cursor_execute", fail)
        assert get_result(desk.engine, result_id).status == "recorded"
        desk.store.finish(result_id=result_id, path="done/x.dcm", now=T0)
        assert len(deliveries_of(desk.engine, result_id)) == 4


class TestSending:
    def test_sent_is_the_end_and_is_not_due_again(self, desk: Desk) -> None:
        desk.finish()
        row = desk.one()
        desk.deliveries.start([row.id])
        assert row.id not in {other.id for other in desk.due()}
        desk.deliveries.sent(row.id, T0)
        row = desk.one()
        assert (row.state, row.attempts, row.sent_at, row.error) == ("sent", 1, T0, None)
        assert row.id not in {other.id for other in desk.due(now=T0 + timedelta(days=999))}

    def test_one_that_is_being_sent_is_not_started_again_nor_its_companion(
        self, desk: Desk
    ) -> None:
        desk.finish()
        first, second = desk.due()
        desk.deliveries.start([first.id])
        with pytest.raises(IllegalTransition, match="is sending, not queued"):
            desk.deliveries.start([second.id, first.id])
        assert {row.id for row in desk.due()} == {second.id}

    @pytest.mark.parametrize("call", ["sent", "invalid", "requeue"])
    def test_what_is_not_being_sent_cannot_end(self, desk: Desk, call: str) -> None:
        desk.finish()
        arguments = {
            "sent": {"now": T0},
            "invalid": {"error": "x"},
            "requeue": {"error": "x", "next_attempt_at": T0},
        }[call]
        named = [desk.one().id] if call == "requeue" else desk.one().id
        with pytest.raises(IllegalTransition, match="is queued, not sending"):
            getattr(desk.deliveries, call)(named, **arguments)

    def test_an_unknown_delivery_is_said_to_be(self, desk: Desk) -> None:
        for call in (lambda: desk.deliveries.sent(9, T0), lambda: desk.deliveries.request([9], T0)):
            with pytest.raises(NotFoundError, match="no delivery 9"):
                call()

    def test_one_not_reached_waits_and_counts_no_refusal(self, desk: Desk) -> None:
        desk.finish()
        row = desk.one()
        desk.deliveries.start([row.id])
        later = T0 + timedelta(seconds=5)
        desk.deliveries.requeue([row.id], error="connection refused", next_attempt_at=later)
        row = desk.one()
        assert (row.state, row.attempts, row.refusals) == ("queued", 1, 0)
        assert row.error == "connection refused"
        assert row.id not in {other.id for other in desk.due(now=later - timedelta(seconds=1))}
        assert row.id in {other.id for other in desk.due(now=later)}

    def test_what_waits_is_due_when_the_clock_was_set_back(self, desk: Desk) -> None:
        desk.finish()
        assert len(desk.due(now=T0 - timedelta(minutes=1))) == 0
        assert len(desk.due(now=T0 - timedelta(days=365))) == 2

    def test_a_refusal_is_tried_again_so_often_and_has_failed_then(self, desk: Desk) -> None:
        desk.finish()
        delivery_id = desk.one().id
        states = []
        for _ in range(3):
            desk.deliveries.start([delivery_id])
            states.append(
                desk.deliveries.refused(delivery_id, error="0xA900", next_attempt_at=T0, most=3)
            )
        assert states == ["queued", "queued", "failed"]
        row = desk.one()
        assert (row.refusals, row.error, row.next_attempt_at) == (3, "0xA900", None)

    def test_what_a_dead_process_was_sending_is_sent_again_and_nothing_else(
        self, desk: Desk
    ) -> None:
        desk.finish()
        first, second = desk.due()
        desk.deliveries.start([first.id, second.id])
        desk.deliveries.sent(second.id, T0)
        assert desk.deliveries.recover(T0) == 1
        assert {row.id for row in desk.due()} == {first.id}

    def test_all_destinations_get_the_same_object(self, desk: Desk) -> None:
        result_id = desk.finish()
        desk.deliveries.built(result_id, "sc", "2.25.1")
        uids = {(row.kind, row.sop_instance_uid) for row in deliveries_of(desk.engine, result_id)}
        assert uids == {("sc", "2.25.1"), ("sr", None)}
        assert unsent_uids(desk.engine) == {"2.25.1"}

    def test_an_object_is_kept_until_its_last_destination_has_it(self, desk: Desk) -> None:
        result_id = desk.finish()
        desk.deliveries.built(result_id, "sc", "2.25.1")
        for row in deliveries_of(desk.engine, result_id):
            if row.kind == "sc":
                assert is_unsent(desk.engine, "2.25.1")
                desk.deliveries.start([row.id])
                desk.deliveries.sent(row.id, T0)
        assert not is_unsent(desk.engine, "2.25.1")


class TestAskingAgain:
    @pytest.mark.parametrize("end", ["sent", "failed", "invalid"])
    def test_an_ended_one_starts_anew(self, desk: Desk, end: str) -> None:
        desk.finish()
        delivery_id = desk.one().id
        desk.deliveries.start([delivery_id])
        if end == "sent":
            desk.deliveries.sent(delivery_id, T0)
        elif end == "invalid":
            desk.deliveries.invalid(delivery_id, "x")
        else:
            desk.deliveries.refused(delivery_id, error="x", next_attempt_at=T0, most=1)
        assert desk.one().state == end
        assert desk.deliveries.request([delivery_id], T0) == 1
        row = desk.one()
        assert (row.state, row.attempts, row.refusals, row.error) == ("queued", 0, 0, None)

    def test_one_that_is_being_sent_is_left_alone(self, desk: Desk) -> None:
        desk.finish()
        delivery_id = desk.one().id
        desk.deliveries.start([delivery_id])
        assert desk.deliveries.request([delivery_id], T0) == 0
        assert desk.one().state == "sending"


class TestQueries:
    def test_a_result_says_what_most_wants_looking_at(self, desk: Desk) -> None:
        result_id = desk.finish()
        rows = deliveries_of(desk.engine, result_id)
        seen = [get_result(desk.engine, result_id).delivery]
        desk.deliveries.start([row.id for row in rows])
        seen.append(get_result(desk.engine, result_id).delivery)
        for row in rows[1:]:
            desk.deliveries.sent(row.id, T0)
        desk.deliveries.requeue([rows[0].id], error="x", next_attempt_at=T0)
        seen.append(get_result(desk.engine, result_id).delivery)
        desk.deliveries.start([rows[0].id])
        desk.deliveries.invalid(rows[0].id, "x")
        seen.append(list_results(desk.engine, ResultFilter())[0].delivery)
        desk.deliveries.request([rows[0].id], T0)
        desk.deliveries.start([rows[0].id])
        desk.deliveries.sent(rows[0].id, T0)
        seen.append(get_result(desk.engine, result_id).delivery)
        assert seen == ["queued", "sending", "queued", "invalid", "sent"]

    def test_how_things_stand_with_each_destination(self, desk: Desk) -> None:
        for number in range(2):
            desk.finish(number)
        first, second, third, fourth = [
            row for row in list_deliveries(desk.engine) if row.destination == ONE
        ]
        desk.deliveries.start([first.id, second.id, third.id, fourth.id])
        desk.deliveries.sent(first.id, T0)
        desk.deliveries.invalid(second.id, "x")
        desk.deliveries.refused(third.id, error="x", next_attempt_at=T0, most=1)
        desk.deliveries.requeue([fourth.id], error="host down", next_attempt_at=T0)
        one, other = destination_statuses(desk.engine)
        assert (one.destination, one.queued, one.failed, one.invalid) == (ONE, 1, 1, 1)
        assert (one.oldest_at, one.error) == (T0, "host down")
        assert (other.queued, other.failed, other.error) == (4, 0, None)
