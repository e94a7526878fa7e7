"""Claims and ends of dropped files, state by state, each counted once and none lost."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

import pytest
from sqlalchemy import Engine, func, select

from lungwatch.attributes import RadiographMeta
from lungwatch.db.claims import Claim, ClaimKind, Drop
from lungwatch.db.engine import reading
from lungwatch.db.maintenance import open_database
from lungwatch.db.models import (
    Arrival,
    IllegalTransition,
    Image,
    Model,
    Plausibility,
    Result,
    State,
)
from lungwatch.db.queries import ResultRow, get_result
from lungwatch.db.results import Store
from lungwatch.errors import NotFoundError

T0 = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
SHA = "ab" * 32
MAX_ATTEMPTS = 3
META = RadiographMeta(
    format="DICOM",
    rows=10,
    columns=20,
    bits_stored=12,
    photometric="MONOCHROME1",
    transfer_syntax="1.2.840.10008.1.2.1",
    patient_id="P1",
    accession="A1",
    study_uid="1.2.3",
    series_uid="1.2.3.4",
    sop_uid="1.2.3.4.5",
    modality="CR",
    body_part="CHEST",
    view_position="PA",
    study_date="20260301",
    manufacturer="Maker",
    station="Room 1",
    institution="Clinic",
)


@dataclass
class Desk:
    """A store, a pretended home and a clock, with the arguments that a test does not vary."""

    engine: Engine
    store: Store
    model_id: int
    files: set[str]
    now: datetime = T0

    def claim(self, token: str, path: str | None = None, **other) -> Claim:
        """Put a file at `path` and claim it, a minute later than what was before."""
        self.now += timedelta(minutes=1)
        path = path or f"work/{token}/x.dcm"
        self.files.add(path)
        arguments = {
            "sha256": SHA,
            "size_bytes": 7,
            "source_name": f"{token}.dcm",
            "model_id": self.model_id,
            "max_attempts": MAX_ATTEMPTS,
            "now": self.now,
            "exists": self.files.__contains__,
        } | other
        return self.store.claim(Drop(token=token, path=path, **arguments))

    def record(self, claim: Claim, **other) -> None:
        arguments = {
            "meta": META,
            "label": "COVID",
            "probability": 0.9,
            "logit": 2.2,
            "threshold": 0.5,
            "flags": ["low_contrast"],
            "overlay": "overlays/x.png",
            "duration_ms": 12,
            "now": self.now,
        } | other
        self.store.record(result_id=claim.result_id, **arguments)

    def finish(self, claim: Claim, source: str) -> None:
        self.files.remove(source)
        self.files.add("done/x.dcm")
        self.store.finish(result_id=claim.result_id, path="done/x.dcm", now=self.now)

    def end(self, claim: Claim, state: State, *, source: str) -> None:
        """Reject or fail, and move the file to quarantine."""
        self.store.end(
            state,
            result_id=claim.result_id,
            reason="truncated",
            message="it ends in the middle",
            meta=None,
            duration_ms=3,
            now=self.now,
        )
        self.files.remove(source)
        self.files.add("quarantine/x.dcm")
        self.store.set_path(image_id=claim.image_id, path="quarantine/x.dcm")

    def row(self, claim: Claim) -> ResultRow:
        return get_result(self.engine, claim.result_id)

    def counts(self) -> dict[str, int]:
        with reading(self.engine) as connection:
            return {
                table.__tablename__: connection.scalar(select(func.count()).select_from(table))
                for table in (Image, Model, Result, Arrival)
            }

    def duplicates(self) -> dict[str, bool]:
        with reading(self.engine) as connection:
            return dict(connection.execute(select(Arrival.token, Arrival.duplicate)).all())


def another_model(store: Store) -> int:
    return store.register_model(
        name="other", version="2", sha256="2" * 64, contract_json="{}", now=T0
    )


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'lungwatch.db'}"
    return str(request.getfixturevalue("empty_postgres"))


@pytest.fixture
def desk(url: str) -> Iterator[Desk]:
    engine = open_database(url)
    store = Store(engine)
    model_id = store.register_model(
        name="baseline", version="1.0.0", sha256="1" * 64, contract_json="{}", now=T0
    )
    yield Desk(engine=engine, store=store, model_id=model_id, files=set())
    engine.dispose()


class TestModels:
    def test_the_same_file_is_one_model(self, desk: Desk) -> None:
        again = desk.store.register_model(
            name="renamed", version="9", sha256="1" * 64, contract_json="{}", now=T0
        )
        assert again == desk.model_id
        assert desk.counts()["model"] == 1

    def test_two_builds_of_one_version_are_two_models(self, desk: Desk) -> None:
        other = desk.store.register_model(
            name="baseline", version="1.0.0", sha256="3" * 64, contract_json="{}", now=T0
        )
        assert other != desk.model_id


class TestNew:
    def test_a_new_content_runs(self, desk: Desk) -> None:
        claim = desk.claim("a")
        assert claim == Claim(
            kind=ClaimKind.RUN,
            result_id=claim.result_id,
            image_id=claim.image_id,
            attempt=1,
            state=State.CLAIMED,
            received_at=desk.now,
            file_path=None,
            reason=None,
        )
        row = desk.row(claim)
        assert (row.status, row.attempts, row.file, row.arrivals, row.source_name) == (
            State.CLAIMED,
            1,
            "work/a/x.dcm",
            1,
            "a.dcm",
        )
        assert desk.duplicates() == {"a": False}

    def test_another_content_is_another_image(self, desk: Desk) -> None:
        first, second = desk.claim("a"), desk.claim("b", sha256="cd" * 32)
        assert (first.kind, second.kind) == (ClaimKind.RUN, ClaimKind.RUN)
        assert first.image_id != second.image_id

    def test_a_file_that_nobody_dropped_leaves_no_arrival(self, desk: Desk) -> None:
        claim = desk.claim("a", arrival=False)
        assert claim.kind is ClaimKind.RUN
        assert desk.duplicates() == {}
        assert desk.row(claim).arrivals == 0

    def test_names_that_no_database_can_store_are_escaped(self, desk: Desk) -> None:
        claim = desk.claim("a", source_name="sc\udce4n\0.dcm")
        assert desk.row(claim).source_name == "sc\\udce4n\\x00.dcm"


class TestClaimed:
    def test_after_a_crash_the_same_file_runs_again(self, desk: Desk) -> None:
        first = desk.claim("a")
        again = desk.claim("a")
        assert (again.kind, again.attempt) == (ClaimKind.RUN, 2)
        assert again.received_at == first.received_at
        assert desk.duplicates() == {"a": False}

    def test_what_crashes_repeatedly_is_given_up_and_then_refiled(self, desk: Desk) -> None:
        kinds = [desk.claim("a").kind for _ in range(MAX_ATTEMPTS)]
        assert kinds == [ClaimKind.RUN] * MAX_ATTEMPTS
        given_up = desk.claim("a")
        assert given_up.kind is ClaimKind.GIVE_UP
        assert (given_up.state, given_up.reason) == (State.FAILED, "crashed_repeatedly")
        row = desk.row(given_up)
        assert (row.status, row.reason, row.attempts) == (
            State.FAILED,
            "crashed_repeatedly",
            MAX_ATTEMPTS,
        )
        assert row.finished_at == desk.now
        # A crash before the move to quarantine must not start it all again.
        assert desk.claim("a").kind is ClaimKind.REFILE

    def test_the_same_bytes_under_another_name_are_a_duplicate(self, desk: Desk) -> None:
        first = desk.claim("a")
        second = desk.claim("b")
        assert (second.kind, second.result_id) == (ClaimKind.DUPLICATE, first.result_id)
        assert desk.row(first).file == "work/a/x.dcm"
        assert desk.row(first).attempts == 1
        assert desk.duplicates() == {"a": False, "b": True}

    def test_a_copy_takes_over_where_the_first_is_gone(self, desk: Desk) -> None:
        first = desk.claim("a")
        desk.files.clear()
        second = desk.claim("b")
        assert (second.kind, second.attempt) == (ClaimKind.RUN, 2)
        assert desk.row(first).file == "work/b/x.dcm"

    def test_no_retry_and_no_filing(self, desk: Desk) -> None:
        claim = desk.claim("a")
        with pytest.raises(IllegalTransition):
            desk.store.request_retry(result_id=claim.result_id, now=T0)
        with pytest.raises(IllegalTransition, match=r"is claimed, not recorded"):
            desk.store.finish(result_id=claim.result_id, path="done/x.dcm", now=T0)
        assert desk.row(claim).status is State.CLAIMED


class TestFindings:
    def test_each_is_kept_by_its_name(self, desk: Desk) -> None:
        claim = desk.claim("a")
        assert desk.row(claim).findings is None, "there is no score yet"
        desk.record(claim, findings={"covid": 0.9, "opacity": 0.1234567890123456})
        assert desk.row(claim).findings == {"covid": 0.9, "opacity": 0.1234567890123456}

    def test_a_model_that_tells_none_has_covid(self, desk: Desk) -> None:
        claim = desk.claim("a")
        desk.record(claim)
        assert desk.row(claim).findings == {"covid": 0.9}


class TestRecorded:
    @pytest.fixture
    def recorded(self, desk: Desk) -> Claim:
        claim = desk.claim("a")
        desk.record(claim)
        return claim

    def test_everything_is_written_at_once(self, desk: Desk, recorded: Claim) -> None:
        row = desk.row(recorded)
        assert (row.status, row.label, row.probability, row.logit, row.threshold) == (
            State.RECORDED,
            "COVID",
            0.9,
            2.2,
            0.5,
        )
        assert (row.flags, row.overlay, row.duration_ms) == (
            ("low_contrast",),
            "overlays/x.png",
            12,
        )
        names = META.__dataclass_fields__
        assert row.attributes == {name: getattr(META, name) for name in names}

    def test_nothing_is_written_where_it_is_not_claimed(self, desk: Desk, recorded: Claim) -> None:
        with pytest.raises(IllegalTransition, match="is recorded, not claimed"):
            desk.record(
                recorded,
                label="NEGATIVE",
                meta=replace(META, rows=99),
                now=desk.now + timedelta(seconds=1),
            )
        row = desk.row(recorded)
        assert (row.label, row.attributes["rows"]) == ("COVID", 10)

    def test_after_a_crash_only_the_filing_is_left(self, desk: Desk, recorded: Claim) -> None:
        again = desk.claim("a")
        assert (again.kind, again.state) == (ClaimKind.FILE, State.RECORDED)
        assert desk.duplicates() == {"a": False}

    def test_the_same_bytes_again_are_a_duplicate(self, desk: Desk, recorded: Claim) -> None:
        assert desk.claim("b").kind is ClaimKind.DUPLICATE
        assert desk.duplicates() == {"a": False, "b": True}

    def test_a_copy_is_filed_where_the_first_is_gone(self, desk: Desk, recorded: Claim) -> None:
        desk.files.clear()
        again = desk.claim("b")
        assert (again.kind, again.file_path) == (ClaimKind.FILE, None)
        assert desk.row(recorded).file == "work/b/x.dcm"
        assert desk.duplicates() == {"a": False, "b": True}

    def test_it_can_neither_fail_nor_be_rejected(self, desk: Desk, recorded: Claim) -> None:
        for state in (State.FAILED, State.REJECTED):
            with pytest.raises(IllegalTransition):
                desk.end(recorded, state, source="work/a/x.dcm")
        assert desk.row(recorded).status is State.RECORDED


class TestDone:
    @pytest.fixture
    def done(self, desk: Desk) -> Claim:
        claim = desk.claim("a")
        desk.record(claim)
        desk.finish(claim, "work/a/x.dcm")
        return claim

    def test_it_says_where_and_when(self, desk: Desk, done: Claim) -> None:
        row = desk.row(done)
        assert (row.status, row.file, row.finished_at) == (State.DONE, "done/x.dcm", desk.now)

    def test_the_same_bytes_again_are_a_duplicate(self, desk: Desk, done: Claim) -> None:
        for token in ("b", "c"):
            assert desk.claim(token).kind is ClaimKind.DUPLICATE
        row = desk.row(done)
        assert (row.arrivals, row.attempts, row.file) == (3, 1, "done/x.dcm")
        assert desk.counts() == {"image": 1, "model": 1, "result": 1, "arrival": 3}

    def test_a_duplicate_seen_again_counts_once(self, desk: Desk, done: Claim) -> None:
        assert [desk.claim("b").kind for _ in range(2)] == [ClaimKind.DUPLICATE] * 2
        assert desk.row(done).arrivals == 2

    def test_the_same_bytes_replace_a_lost_file(self, desk: Desk, done: Claim) -> None:
        desk.files.clear()
        again = desk.claim("b")
        assert (again.kind, again.state) == (ClaimKind.REFILE, State.DONE)
        assert desk.row(done).file == "work/b/x.dcm"
        assert desk.duplicates() == {"a": False, "b": True}

    def test_another_model_makes_another_result(self, desk: Desk, done: Claim) -> None:
        other = another_model(desk.store)
        claim = desk.claim("b", model_id=other)
        assert claim.kind is ClaimKind.RUN
        assert (claim.image_id, claim.received_at) == (done.image_id, done.received_at)
        assert claim.result_id != done.result_id
        assert claim.file_path == "done/x.dcm"
        assert desk.row(done).status is State.DONE

    def test_it_is_an_end(self, desk: Desk, done: Claim) -> None:
        with pytest.raises(IllegalTransition):
            desk.store.request_retry(result_id=done.result_id, now=T0)
        assert desk.row(done).status is State.DONE


class TestRejected:
    @pytest.fixture
    def rejected(self, desk: Desk) -> Claim:
        claim = desk.claim("a")
        desk.end(claim, State.REJECTED, source="work/a/x.dcm")
        return claim

    def test_it_says_why(self, desk: Desk, rejected: Claim) -> None:
        row = desk.row(rejected)
        assert (row.status, row.reason, row.message, row.duration_ms, row.label) == (
            State.REJECTED,
            "truncated",
            "it ends in the middle",
            3,
            None,
        )
        assert row.finished_at == desk.now

    def test_what_the_file_says_is_kept_where_it_could_be_read(self, desk: Desk) -> None:
        claim = desk.claim("a")
        desk.store.end(
            State.REJECTED,
            result_id=claim.result_id,
            reason="wrong_body_part",
            message="LEG",
            meta=META,
            duration_ms=3,
            now=T0,
        )
        assert desk.row(claim).attributes["patient_id"] == "P1"

    def test_what_the_gate_measured_is_kept_until_somebody_asks_for_another_run(
        self, desk: Desk
    ) -> None:
        claim = desk.claim("a")
        desk.store.end(
            State.REJECTED,
            result_id=claim.result_id,
            reason="rotated",
            message="",
            meta=META,
            duration_ms=3,
            now=T0,
            plausibility=Plausibility(gate_score=0.125, lung_area=0.25),
        )
        row = desk.row(claim)
        assert (row.gate_score, row.lung_area, row.lung_share) == (0.125, 0.25, None)
        desk.store.request_retry(result_id=claim.result_id, now=T0)
        row = desk.row(claim)
        assert (row.gate_score, row.lung_area, row.lung_share) == (None, None, None)

    def test_before_the_move_to_quarantine_it_is_refiled(self, desk: Desk) -> None:
        claim = desk.claim("a")
        desk.store.end(
            State.REJECTED,
            result_id=claim.result_id,
            reason="truncated",
            message="",
            meta=None,
            duration_ms=3,
            now=T0,
        )
        again = desk.claim("a")
        assert (again.kind, again.state, again.reason) == (
            ClaimKind.REFILE,
            State.REJECTED,
            "truncated",
        )

    def test_the_same_bytes_again_are_a_duplicate(self, desk: Desk, rejected: Claim) -> None:
        assert desk.claim("b").kind is ClaimKind.DUPLICATE

    def test_a_retry_can_be_asked_for(self, desk: Desk, rejected: Claim) -> None:
        desk.store.request_retry(result_id=rejected.result_id, now=T0)
        assert desk.row(rejected).status is State.QUEUED


class TestFailed:
    @pytest.fixture
    def failed(self, desk: Desk) -> Claim:
        claim = desk.claim("a")
        desk.claim("a")
        desk.end(claim, State.FAILED, source="work/a/x.dcm")
        return claim

    def test_dropped_again_it_runs_afresh(self, desk: Desk, failed: Claim) -> None:
        again = desk.claim("b")
        assert (again.kind, again.attempt, again.result_id) == (
            ClaimKind.RUN,
            1,
            failed.result_id,
        )
        assert again.file_path == "quarantine/x.dcm"
        row = desk.row(failed)
        assert (row.status, row.reason, row.message, row.finished_at) == (
            State.CLAIMED,
            None,
            None,
            None,
        )
        assert desk.duplicates() == {"a": False, "b": False}

    def test_before_the_move_to_quarantine_it_is_refiled(self, desk: Desk) -> None:
        claim = desk.claim("a")
        desk.store.end(
            State.FAILED,
            result_id=claim.result_id,
            reason="retries_exhausted",
            message="disk",
            meta=None,
            duration_ms=3,
            now=T0,
        )
        again = desk.claim("a")
        assert (again.kind, again.reason) == (ClaimKind.REFILE, "retries_exhausted")

    def test_a_retry_can_be_asked_for_once(self, desk: Desk, failed: Claim) -> None:
        desk.store.request_retry(result_id=failed.result_id, now=T0)
        with pytest.raises(IllegalTransition):
            desk.store.request_retry(result_id=failed.result_id, now=T0)
        assert desk.row(failed).status is State.QUEUED


class TestQueued:
    @pytest.fixture
    def queued(self, desk: Desk) -> Claim:
        claim = desk.claim("a")
        desk.end(claim, State.FAILED, source="work/a/x.dcm")
        desk.store.request_retry(result_id=claim.result_id, now=desk.now)
        return claim

    def test_the_file_from_quarantine_runs_and_is_no_arrival(
        self, desk: Desk, queued: Claim
    ) -> None:
        desk.files.remove("quarantine/x.dcm")
        again = desk.claim("retry", arrival=False)
        assert (again.kind, again.attempt, again.result_id) == (
            ClaimKind.RUN,
            1,
            queued.result_id,
        )
        assert desk.row(queued).file == "work/retry/x.dcm"
        assert desk.duplicates() == {"a": False}

    def test_a_retry_that_failed_is_refiled_and_not_run_for_ever(
        self, desk: Desk, queued: Claim
    ) -> None:
        """It has no arrival that would show that the file was seen before."""
        desk.files.remove("quarantine/x.dcm")
        kinds = [desk.claim("retry", arrival=False).kind for _ in range(MAX_ATTEMPTS + 2)]
        assert kinds == [ClaimKind.RUN] * MAX_ATTEMPTS + [ClaimKind.GIVE_UP, ClaimKind.REFILE]

    def test_the_same_bytes_dropped_meanwhile_run_and_supersede_it(
        self, desk: Desk, queued: Claim
    ) -> None:
        again = desk.claim("b")
        assert (again.kind, again.file_path) == (ClaimKind.RUN, "quarantine/x.dcm")
        assert desk.duplicates() == {"a": False, "b": False}

    def test_another_model_takes_up_the_request(self, desk: Desk, queued: Claim) -> None:
        """Otherwise the request would wait for ever for a model that is no longer used."""
        desk.files.remove("quarantine/x.dcm")
        again = desk.claim("retry", arrival=False, model_id=another_model(desk.store))
        assert (again.kind, again.result_id) == (ClaimKind.RUN, queued.result_id)
        assert desk.row(queued).model == "other"


class TestModelChangedInTheMiddle:
    """The daemon was stopped, and started again with another model."""

    def test_a_run_that_was_cut_off_becomes_the_new_models(self, desk: Desk) -> None:
        first = desk.claim("a")
        again = desk.claim("a", model_id=another_model(desk.store))
        assert (again.kind, again.attempt, again.result_id) == (
            ClaimKind.RUN,
            2,
            first.result_id,
        )
        assert desk.row(first).model == "other"
        assert desk.counts()["result"] == 1

    def test_what_was_recorded_stays_the_old_models(self, desk: Desk) -> None:
        first = desk.claim("a")
        desk.record(first)
        again = desk.claim("a", model_id=another_model(desk.store))
        assert (again.kind, again.result_id) == (ClaimKind.FILE, first.result_id)
        assert desk.row(first).model == "baseline"

    def test_a_cut_off_run_fails_where_the_new_model_has_a_result(self, desk: Desk) -> None:
        other = another_model(desk.store)
        first = desk.claim("a")
        desk.record(first)
        desk.finish(first, "work/a/x.dcm")
        cut_off = desk.claim("b", model_id=other)
        again = desk.claim("b")
        assert (again.kind, again.result_id) == (ClaimKind.REFILE, first.result_id)
        row = desk.row(cut_off)
        assert (row.status, row.reason) == (State.FAILED, "model_changed")

    @pytest.mark.parametrize("recorded", [False, True])
    def test_the_same_bytes_meanwhile_are_a_duplicate_of_what_was_left(
        self, desk: Desk, recorded: bool
    ) -> None:
        """Else the old model's row would never end."""
        first = desk.claim("a")
        if recorded:
            desk.record(first)
        other = another_model(desk.store)
        again = desk.claim("b", model_id=other)
        assert (again.kind, again.result_id) == (ClaimKind.DUPLICATE, first.result_id)
        resumed = desk.claim("a", model_id=other)
        assert resumed.kind is (ClaimKind.FILE if recorded else ClaimKind.RUN)
        assert desk.counts()["result"] == 1


class TestUnknownRows:
    def test_an_unknown_result_is_said_to_be(self, desk: Desk) -> None:
        with pytest.raises(NotFoundError, match="no result 99"):
            desk.store.finish(result_id=99, path="done/x.dcm", now=T0)
        with pytest.raises(NotFoundError, match="no result 99"):
            desk.store.request_retry(result_id=99, now=T0)

    def test_an_unknown_image_is_said_to_be(self, desk: Desk) -> None:
        with pytest.raises(NotFoundError, match="no image 99"):
            desk.store.set_path(image_id=99, path=None)


_RACER = """
import sys
from datetime import datetime, UTC
from lungwatch.db import Drop, Store, open_database

url, name, model_id = sys.argv[1], sys.argv[2], int(sys.argv[3])
engine = open_database(url)
store = Store(engine)
sys.stdin.read()
for number in range(40):
    claim = store.claim(Drop(
        token=f"{name}-{number}", sha256=f"{number:064x}", size_bytes=1, source_name="x",
        path=f"work/{name}-{number}", model_id=model_id, max_attempts=3,
        now=datetime.now(UTC), exists=lambda path: True,
    ))
    print(claim.kind, claim.result_id)
engine.dispose()
"""


def test_two_processes_that_claim_the_same_contents_start_one_run_each(
    desk: Desk, url: str
) -> None:
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", _RACER, url, name, str(desk.model_id)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in ("left", "right")
    ]
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.close()
        racer.stdin = None
    answers = [
        [line.split() for line in racer.communicate(timeout=240)[0].splitlines()]
        for racer in racers
    ]
    assert [racer.returncode for racer in racers] == [0, 0]
    for left, right in zip(*answers, strict=True):
        assert {left[0], right[0]} == {"run", "duplicate"}
        assert left[1] == right[1]
    assert desk.counts() == {"image": 40, "model": 1, "result": 40, "arrival": 80}
    assert sum(desk.duplicates().values()) == 40


@pytest.mark.parametrize(
    "write",
    [
        lambda desk, claim: desk.record(claim),
        lambda desk, claim: desk.store.end(
            State.FAILED,
            result_id=claim.result_id,
            reason="internal_error",
            message="m",
            meta=META,
            duration_ms=1,
            now=T0,
        ),
    ],
    ids=["record", "fail"],
)
def test_a_write_that_breaks_off_leaves_the_row_as_it_was(
    desk: Desk, write: Callable[[Desk, Claim], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    claim = desk.claim("a")
    before = desk.row(claim)

    def break_off(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lungwatch.db.results._update_image_of", break_off)
    with pytest.raises(KeyboardInterrupt):
        write(desk, claim)
    assert desk.row(claim) == before


class TestLostAnswer:
    """A server that dies between COMMIT and its answer: the transaction is tried once more."""

    def again(self, desk: Desk, claim: Claim, change: Callable[[], None]) -> None:
        change()
        before = desk.row(claim)
        desk.files |= {"work/a/x.dcm", "done/x.dcm"}  # as they were before the try
        change()
        assert desk.row(claim) == before

    def test_recorded_and_finished_twice_is_once(self, desk: Desk) -> None:
        claim = desk.claim("a")
        self.again(desk, claim, lambda: desk.record(claim))
        self.again(desk, claim, lambda: desk.finish(claim, "work/a/x.dcm"))
        assert desk.row(claim).status is State.DONE

    @pytest.mark.parametrize("state", [State.REJECTED, State.FAILED])
    def test_ended_twice_is_once(self, desk: Desk, state: State) -> None:
        claim = desk.claim("a")
        self.again(desk, claim, lambda: desk.end(claim, state, source="work/a/x.dcm"))
        assert desk.row(claim).status is state

    def test_lost_twice_is_once(self, desk: Desk) -> None:
        claim = desk.claim("a")
        fail = partial(desk.store.fail_vanished, result_id=claim.result_id, now=desk.now)
        self.again(desk, claim, fail)
        with pytest.raises(IllegalTransition):
            desk.store.fail_vanished(result_id=claim.result_id, now=desk.now + timedelta(seconds=1))
