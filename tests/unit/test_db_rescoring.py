"""Requests for another model's results: what is asked for, and by whom it is taken up."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from sqlalchemy import Engine

from lungwatch.attributes import RadiographMeta
from lungwatch.db.audit import AuditEvent
from lungwatch.db.claims import Claim, ClaimKind
from lungwatch.db.maintenance import open_database
from lungwatch.db.models import State
from lungwatch.db.queries import ResultFilter, list_results, queued
from lungwatch.db.rescoring import (
    count_unfinished,
    queue_rescoring,
    rescorable,
    scored_cases,
    scored_pairs,
)
from lungwatch.db.results import Store
from tests.support.rows import drop, record

T0 = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
DEED = AuditEvent(action="rescore", target="model b-1")
META = RadiographMeta(
    format="PNG", rows=9, columns=9, bits_stored=8, photometric="MONOCHROME2", transfer_syntax=None
)


@dataclass
class Desk:
    """A record of one home with the models A, B and C."""

    engine: Engine
    store: Store
    models: dict[str, int]
    files: set[str] = field(default_factory=set)

    def claim(self, name: str, model: str, *, token: str, arrival: bool = True) -> Claim:
        path = f"work/{token}/{name}"
        self.files.discard(f"done/{name}" if not arrival else "")
        self.files.add(path)
        return self.store.claim(
            drop(
                token=token,
                sha256=f"{ord(name):02x}" * 32,
                source_name=name,
                path=path,
                model_id=self.models[model],
                now=T0 + timedelta(minutes=ord(name)),
                exists=self.files.__contains__,
                arrival=arrival,
            )
        )

    def score(self, claim: Claim, name: str, probability: float = 0.9) -> None:
        record(
            self.store,
            claim.result_id,
            meta=META,
            label="COVID" if probability >= 0.5 else "NEGATIVE",
            probability=probability,
            logit=probability - 0.5,
            overlay=f"overlays/{name}.{claim.result_id}.png",
            now=T0 + timedelta(hours=claim.result_id),
            calibration="site",
        )
        self.store.finish(
            result_id=claim.result_id,
            path=f"done/{name}",
            now=T0 + timedelta(hours=claim.result_id),
        )
        self.files = {f"done/{name}"} | {path for path in self.files if name not in path}

    def ask(self, model: str, **chosen: object) -> int:
        number = self.models[model]
        images = rescorable(self.engine, ResultFilter(**chosen), number)
        return queue_rescoring(self.engine, images, number, T0 + timedelta(days=1), DEED)

    def states(self) -> dict[tuple[str, str], State]:
        rows = list_results(self.engine, ResultFilter())
        return {(row.source_name, row.model): row.status for row in rows}

    def queued(self, model: str, *, own_only: bool = False) -> list[str]:
        rows = queued(self.engine, 10, self.models[model], own_only=own_only)
        return [row.source_name for row in rows]


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    engine = open_database(f"sqlite:///{tmp_path / 'lungwatch.db'}")
    store = Store(engine)
    models = {
        name: store.register_model(
            name=name, version="1", sha256=name * 64, contract_json="{}", now=T0
        )
        for name in "abc"
    }
    desk = Desk(engine=engine, store=store, models=models)
    for name in "xyz":
        desk.score(desk.claim(name, "a", token=f"drop-{name}"), name)
    yield desk
    engine.dispose()


def test_each_filed_image_is_asked_for_once_the_newest_first(desk):
    assert desk.ask("b", limit=2) == 2
    assert desk.queued("b") == ["z", "y"]
    assert desk.ask("b") == 1
    assert desk.ask("b") == 0
    assert count_unfinished(desk.engine, desk.models["b"]) == 3
    assert desk.ask("a") == 0


def test_what_is_refused_gone_or_in_hand_is_not_asked_for(desk):
    desk.store.set_path(image_id=1, path=None)
    refused = desk.claim("w", "a", token="drop-w")
    desk.store.end(
        State.REJECTED,
        result_id=refused.result_id,
        reason="truncated",
        message="it ends",
        meta=None,
        duration_ms=1,
        now=T0,
    )
    desk.store.set_path(image_id=refused.image_id, path="quarantine/w")
    desk.claim("v", "a", token="drop-v")
    assert desk.ask("b") == 2
    assert desk.queued("b") == ["z", "y"]


def test_a_file_that_retention_removed_meanwhile_is_left_out(desk):
    images = rescorable(desk.engine, ResultFilter(), desk.models["b"])
    desk.store.set_path(image_id=images[0], path=None)
    assert queue_rescoring(desk.engine, images, desk.models["b"], T0, DEED) == 2


def test_another_model_takes_no_request_for_a_second_result(desk):
    desk.ask("b", limit=1)
    assert desk.queued("a") == desk.queued("c") == []
    assert desk.queued("b") == desk.queued("b", own_only=True) == ["z"]
    # Dropped again while C runs: a result of its own, and the request stands.
    dropped = desk.claim("z", "c", token="again")
    assert dropped.kind is ClaimKind.RUN
    assert desk.states()["z", "b"] is State.QUEUED
    assert desk.states()["z", "c"] is State.CLAIMED


def test_the_model_that_was_asked_runs_and_both_rows_stay(desk):
    desk.ask("b", limit=1)
    claim = desk.claim("z", "b", token="retry-1", arrival=False)
    assert claim.kind is ClaimKind.RUN
    desk.score(claim, "z", 0.1)
    assert desk.states()["z", "a"] is desk.states()["z", "b"] is State.DONE
    (pair,) = scored_pairs(desk.engine, desk.models["a"], desk.models["b"])
    assert (pair.label_a, pair.label_b) == ("COVID", "NEGATIVE")
    assert (pair.probability_a, pair.probability_b, pair.threshold_a) == (0.9, 0.1, 0.5)
    case = scored_cases(desk.engine, "b" * 64)[-1]
    assert (case.logit, len(case.result_ids)) == (-0.4, 2)


@pytest.mark.parametrize("model", ["a", "c"])
def test_a_run_that_was_cut_off_is_put_back_by_another_model_and_asked_for_again(desk, model):
    desk.ask("b", limit=1)
    desk.claim("z", "b", token="retry-1", arrival=False)
    resumed = desk.claim("z", model, token="retry-1", arrival=False)
    assert (resumed.kind, resumed.state) == (ClaimKind.REFILE, State.DONE)
    desk.store.set_path(image_id=resumed.image_id, path="done/z")
    assert desk.states()["z", "b"] is State.FAILED
    assert ("z", "c") not in desk.states()
    assert desk.ask("b") == 3  # the two that were never asked for, and this one


@pytest.mark.parametrize("model", ["a", "c"])
def test_moved_and_not_yet_claimed_it_is_put_back_by_another_model(desk, model):
    desk.ask("b", limit=1)
    moved = desk.claim("z", model, token="retry-1", arrival=False)
    assert (moved.kind, moved.state) == (ClaimKind.REFILE, State.DONE)
    assert desk.states()["z", "b"] is State.QUEUED
    assert ("z", "c") not in desk.states()


def test_rows_are_found_by_when_they_were_made(desk):
    desk.ask("b", limit=2)
    for name in ("y", "z"):
        desk.score(desk.claim(name, "b", token=f"retry-{name}", arrival=False), name)
    rows = list_results(desk.engine, ResultFilter(made_since=T0 + timedelta(hours=4)))
    assert [(row.source_name, row.model) for row in rows] == [("y", "b"), ("z", "b")]
    assert {row.calibration for row in rows} == {"site"}
    finished = [row.finished_at for row in rows]
    assert finished == sorted(finished, reverse=True)


def test_an_image_counts_as_filed_while_one_result_is_done(desk):
    desk.ask("b", limit=1)
    claim = desk.claim("z", "b", token="retry-1", arrival=False)
    assert desk.store.filed_as_done(claim.image_id) == T0 + timedelta(minutes=ord("z"))
    new = desk.claim("w", "a", token="drop-w")
    assert desk.store.filed_as_done(new.image_id) is None
