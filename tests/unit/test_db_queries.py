"""Queries: filters, order, one result by number or digest, counts."""

import shutil
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest
from sqlalchemy import Engine

from lungwatch.attributes import RadiographMeta
from lungwatch.db import queries
from lungwatch.db.maintenance import open_database
from lungwatch.db.models import State
from lungwatch.db.queries import (
    ResultFilter,
    get_result,
    iter_all,
    list_results,
    queued,
    rows_in_work,
    unfinished,
)
from lungwatch.db.results import Store
from lungwatch.db.statistics import stats
from lungwatch.errors import NotFoundError
from tests.support.rows import drop, record

T0 = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
DIGESTS = ["111111" + "a" * 58, "111111" + "b" * 58, "222222" + "c" * 58, "3333" + "4" * 60]


@pytest.fixture
def engine(template: Path, tmp_path: Path) -> Iterator[Engine]:
    path = tmp_path / "lungwatch.db"
    shutil.copyfile(template, path)
    engine = open_database(f"sqlite:///{path}")
    yield engine
    engine.dispose()


TWO = {"covid": 0.05, "opacity": 0.625}


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six results: two scored, one rejected, one failed, one claimed, one by another model.

    1 COVID 0.95 (two drops), 2 NEGATIVE 0.05, 3 rejected, 4 failed, all a day apart; 5 is the
    first content with another model, UNCERTAIN 0.5; 6 the second, still claimed.
    """
    path = tmp_path_factory.mktemp("template") / "lungwatch.db"
    engine = open_database(f"sqlite:///{path}")
    store = Store(engine)
    first, second = (
        store.register_model(
            name=name, version="1.0", sha256=name[0] * 64, contract_json="{}", now=T0
        )
        for name in ("baseline", "transfer")
    )

    def claim(number: int, token: str, model_id: int, now: datetime) -> int:
        return store.claim(
            drop(
                token=token,
                sha256=DIGESTS[number],
                size_bytes=100,
                source_name=f"{number}.dcm",
                path=f"work/{token}/{number}.dcm",
                model_id=model_id,
                now=now,
            )
        ).result_id

    def score(
        result_id: int,
        label: str,
        probability: float,
        flags: list[str],
        findings: dict[str, float] | None = None,
    ) -> None:
        record(
            store,
            result_id,
            meta=RadiographMeta(
                format="DICOM",
                rows=1,
                columns=1,
                bits_stored=12,
                photometric="MONOCHROME2",
                patient_id=f"P{result_id}",
                accession=f"A{result_id}",
                study_uid=f"1.2.{result_id}",
            ),
            label=label,
            probability=probability,
            logit=0.0,
            flags=flags,
            findings=findings,
            overlay=f"overlays/{result_id}.png",
            duration_ms=5,
            now=T0,
        )
        store.finish(result_id=result_id, path=f"done/{result_id}.dcm", now=T0)

    def end(result_id: int, *, rejected: bool) -> None:
        store.end(
            State.REJECTED if rejected else State.FAILED,
            result_id=result_id,
            reason="truncated" if rejected else "retries_exhausted",
            message="m",
            meta=None,
            duration_ms=1,
            now=T0,
        )

    day = timedelta(days=1)
    score(claim(0, "a", first, T0), "COVID", 0.95, ["low_contrast", "old_model"])
    score(claim(1, "b", first, T0 + day), "NEGATIVE", 0.05, [], TWO)
    end(claim(2, "c", first, T0 + 2 * day), rejected=True)
    end(claim(3, "d", first, T0 + 3 * day), rejected=False)
    claim(0, "e", first, T0 + 4 * day)
    score(claim(0, "f", second, T0 + 4 * day), "UNCERTAIN", 0.5, ["low_contrast"])
    claim(1, "g", second, T0 + 5 * day)
    engine.dispose()
    return path


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        (ResultFilter(), [4, 3, 6, 2, 5, 1]),
        (ResultFilter(limit=2), [4, 3]),
        (ResultFilter(since=T0 + timedelta(days=1)), [4, 3, 6, 2]),
        (ResultFilter(until=T0 + timedelta(days=1)), [5, 1]),
        (
            # The same instant in another zone.
            ResultFilter(until=(T0 + timedelta(days=1)).astimezone(timezone(timedelta(hours=7)))),
            [5, 1],
        ),
        (ResultFilter(label="COVID"), [1]),
        (ResultFilter(status="done"), [2, 5, 1]),
        (ResultFilter(status="claimed"), [6]),
        (ResultFilter(flag="low_contrast"), [5, 1]),
        (ResultFilter(flag="low"), []),
        (ResultFilter(flag="low%"), []),
        (ResultFilter(flag="old_model"), [1]),
        (ResultFilter(flag="oldxmodel"), []),
        (ResultFilter(min_score=0.5), [5, 1]),
        (ResultFilter(max_score=0.5), [2, 5]),
        (ResultFilter(min_score=0.1, max_score=0.9), [5]),
        (ResultFilter(finding="opacity"), [2]),
        (ResultFilter(finding="opacity", min_score=0.625), [2]),
        (ResultFilter(finding="opacity", min_score=0.626), []),
        (ResultFilter(finding="opacity", max_score=0.1), []),
        (ResultFilter(finding="covid", max_score=0.1), [2]),
        (ResultFilter(finding="covid"), [2, 5, 1]),
        (ResultFilter(finding="nodule"), []),
        (ResultFilter(patient="P2"), [2]),
        (ResultFilter(accession="A2"), [2]),
        (ResultFilter(study="1.2.2"), [2]),
        (ResultFilter(model="baseline"), [4, 3, 2, 1]),
        (ResultFilter(model="transfer-1.0"), [6, 5]),
        (ResultFilter(model="base"), []),
        (ResultFilter(model="baseline", label="NEGATIVE", status="done"), [2]),
    ],
    ids=str,
)
def test_a_filter_chooses_and_the_newest_come_first(
    engine: Engine, chosen: ResultFilter, expected: list[int]
) -> None:
    # Contents 0 and 1 have two results each, whose image is the later model's by now.
    if chosen.patient or chosen.accession or chosen.study:
        expected = [6, *expected]
    assert [row.id for row in list_results(engine, chosen)] == expected


def test_a_row_says_everything(engine: Engine) -> None:
    row = get_result(engine, 1)
    assert (row.sha256, row.source_name, row.status, row.label) == (
        DIGESTS[0],
        "0.dcm",
        State.DONE,
        "COVID",
    )
    assert (row.model, row.model_version, row.flags, row.arrivals) == (
        "baseline",
        "1.0",
        ("low_contrast", "old_model"),
        2,
    )
    assert (row.received_at, row.finished_at, row.duration_ms, row.attempts) == (T0, T0, 5, 1)


class TestOneResult:
    def test_by_number(self, engine: Engine) -> None:
        assert get_result(engine, "3").id == get_result(engine, 3).id == 3

    @pytest.mark.parametrize("text", [DIGESTS[2], DIGESTS[2][:6], DIGESTS[2][:20].upper()])
    def test_by_digest_or_its_beginning(self, engine: Engine, text: str) -> None:
        assert get_result(engine, text).id == 3

    def test_by_digits_that_are_no_number(self, engine: Engine) -> None:
        assert get_result(engine, DIGESTS[3][:6]).id == 4

    @pytest.mark.parametrize("text", ["", "22222", "99", "abcdef", "zzzzzz", "%%%%%%", "1; DROP"])
    def test_none(self, engine: Engine, text: str) -> None:
        with pytest.raises(NotFoundError, match=f"no result '{text}'"):
            get_result(engine, text)

    def test_several_are_listed(self, engine: Engine) -> None:
        with pytest.raises(NotFoundError, match=r"'111111' matches 4 results: 1 \(baseline-1.0\)"):
            get_result(engine, "111111")
        with pytest.raises(NotFoundError, match=r"2 results: 1 .baseline-1.0., 5 .transfer-1.0."):
            get_result(engine, DIGESTS[0])


class TestCounts:
    def test_every_result_is_counted_once(self, engine: Engine) -> None:
        counted = stats(engine, zone=UTC)
        assert (counted.results, counted.arrivals) == (6, 7)
        assert counted.by_day == {
            "2026-03-01": 2,
            "2026-03-02": 2,
            "2026-03-03": 1,
            "2026-03-04": 1,
        }
        assert counted.by_label == {"COVID": 1, "NEGATIVE": 1, "UNCERTAIN": 1}
        assert counted.by_status == {"done": 3, "rejected": 1, "failed": 1, "claimed": 1}
        assert counted.by_flag == {"low_contrast": 2, "old_model": 1}
        assert counted.by_reason == {"truncated": 1, "retries_exhausted": 1}
        assert counted.by_model == {"baseline-1.0": 4, "transfer-1.0": 2}
        assert counted.scores == (1, 0, 0, 0, 0, 1, 0, 0, 0, 1)

    def test_days_are_those_of_the_zone(self, engine: Engine) -> None:
        counted = stats(engine, zone=timezone(timedelta(hours=13)))
        assert list(counted.by_day) == ["2026-03-02", "2026-03-03", "2026-03-04", "2026-03-05"]

    def test_a_filter_chooses(self, engine: Engine) -> None:
        assert stats(engine, ResultFilter(model="transfer")).results == 2

    def test_an_empty_database_counts_nothing(self, tmp_path: Path) -> None:
        engine = open_database(f"sqlite:///{tmp_path / 'empty.db'}")
        counted = stats(engine)
        engine.dispose()
        assert (counted.results, counted.by_day, sum(counted.scores)) == (0, {}, 0)


class TestForTheDaemon:
    def test_unfinished_are_those_without_an_end(self, engine: Engine) -> None:
        Store(engine).request_retry(result_id=4, now=T0)
        assert [(row.result_id, row.state) for row in unfinished(engine)] == [
            (4, State.QUEUED),
            (6, State.CLAIMED),
        ]

    def test_all_rows_come_page_by_page_in_order(
        self, engine: Engine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(queries, "_PAGE_ROWS", 2)
        rows = list(iter_all(engine))
        assert [row.result_id for row in rows] == [1, 2, 3, 4, 5, 6]
        assert (rows[2].sha256, rows[2].state, rows[2].reason, rows[2].path) == (
            DIGESTS[2],
            State.REJECTED,
            "truncated",
            "work/c/2.dcm",
        )

    def test_rows_in_work_are_those_whose_file_is(self, engine: Engine) -> None:
        assert [row.result_id for row in rows_in_work(engine)] == [2, 3, 4, 6]

    def test_the_first_asked_for_comes_first(self, engine: Engine) -> None:
        store = Store(engine)
        store.request_retry(result_id=4, now=T0)
        store.request_retry(result_id=3, now=T0 + timedelta(seconds=1))
        assert [row.result_id for row in queued(engine, 10)] == [4, 3]
        assert [row.result_id for row in queued(engine, 1)] == [4]

    def test_a_request_whose_file_is_nowhere_is_left_out(self, engine: Engine) -> None:
        store = Store(engine)
        store.request_retry(result_id=4, now=T0)
        store.set_path(image_id=4, path=None)
        assert queued(engine, 10) == []

    def test_a_model_gets_what_it_can_take_up(self, engine: Engine) -> None:
        """A request of another model for an image that this one has scored would never end."""
        store = Store(engine)
        store.end(
            State.FAILED,
            result_id=6,
            reason="internal_error",
            message="m",
            meta=None,
            duration_ms=1,
            now=T0,
        )
        store.request_retry(result_id=4, now=T0)
        store.request_retry(result_id=6, now=T0)
        assert [row.result_id for row in queued(engine, 10, model_id=1)] == [4]
        assert [row.result_id for row in queued(engine, 10, model_id=2)] == [4, 6]
