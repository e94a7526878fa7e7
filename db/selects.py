"""The SQL behind the queries: which columns, which conditions."""

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from sqlalchemy import ColumnElement, Select, String, case, cast, func, select

from lungwatch.db.delivery_states import DELIVERY_ORDER
from lungwatch.db.rows import ResultFilter
from lungwatch.db.schema import Arrival, Delivery, Image, Model, Result
from lungwatch.db.states import State

if TYPE_CHECKING:
    AnySelect = Select[*tuple[Any, ...]]


def select_results(chosen: ResultFilter) -> "AnySelect":
    """Select the columns of `ResultRow`, newest first."""
    return _chosen(select(*_result_columns()), chosen)


def select_details() -> "AnySelect":
    """Select the columns of `ResultDetail`."""
    return _joined(
        select(
            *_result_columns(),
            Result.logit,
            Model.sha256.label("model_sha256"),
            Image.size_bytes,
            Result.claimed_at,
            Image.format,
            # `Image.rows` would be a method of the row that comes back.
            Image.rows.label("rows"),
            Image.columns.label("columns"),
            Image.bits_stored,
            Image.photometric,
            Image.transfer_syntax,
            Image.sop_class,
            Image.modality,
            Image.body_part,
            Image.view_position,
            Image.study_date,
            Image.series_date,
            Image.acquisition_date,
            Image.manufacturer,
            Image.manufacturer_model,
            Image.station,
            Image.institution,
            case((Image.path.is_(None), Image.removed_at)).label("file_removed_at"),
            case((Result.overlay.is_(None), Result.overlay_removed_at)).label("overlay_removed_at"),
        )
    )


def select_for_statistics(chosen: ResultFilter) -> "AnySelect":
    """Select the columns that `stats` counts."""
    return _chosen(
        select(
            Image.received_at,
            Result.state,
            Result.label,
            Result.reason,
            Result.flags,
            Result.probability,
            Model.name,
            Model.version,
            _arrivals(),
        ),
        chosen,
    )


def select_tracked() -> "AnySelect":
    """Select the columns of `TrackedFile`, in the order of the results' numbers."""
    return (
        select(
            Result.id.label("result_id"),
            Result.image_id,
            Result.model_id,
            Image.sha256,
            Result.state,
            Result.reason,
            Image.path,
            Image.received_at,
            Result.overlay,
            Image.source_name,
            Image.removed_at,
        )
        .join_from(Result, Image)
        .order_by(Result.id)
    )


def _result_columns() -> tuple[ColumnElement[Any], ...]:
    columns: tuple[Any, ...] = (
        Result.id,
        Image.sha256,
        Image.source_name,
        Result.state.label("status"),
        Result.reason,
        Result.label,
        Result.probability,
        Result.threshold,
        Result.uncertain_from,
        Result.uncertain_to,
        Result.findings,
        Result.calibration,
        Result.flags,
        Result.gate_score,
        Result.lung_area,
        Result.lung_share,
        Model.name.label("model"),
        Model.version.label("model_version"),
        Result.overlay,
        Image.patient_id,
        Image.study_uid,
        Image.series_uid,
        Image.sop_uid,
        Image.accession,
        Image.received_at,
        Result.finished_at,
        Result.duration_ms,
        Result.message,
        Result.attempts,
        Image.path.label("file"),
        _arrivals(),
        _delivery(),
    )
    return columns


def _arrivals() -> ColumnElement[int]:
    counted = select(func.count(Arrival.id)).where(Arrival.result_id == Result.id)
    return counted.correlate(Result).scalar_subquery().label("arrivals")


def _delivery() -> ColumnElement[str | None]:
    """Select the state of what is owed that most wants looking at."""
    rank = {state: number for number, state in enumerate(DELIVERY_ORDER)}
    first = (
        select(Delivery.state)
        .where(Delivery.result_id == Result.id)
        .order_by(case(rank, value=Delivery.state))
        .limit(1)
    )
    return first.correlate(Result).scalar_subquery().label("delivery")


def _joined(statement: "AnySelect") -> "AnySelect":
    return statement.select_from(Result).join(Image).join(Model)


def _chosen(statement: "AnySelect", chosen: ResultFilter) -> "AnySelect":
    return (
        _joined(statement)
        .where(*conditions(chosen))
        .order_by(
            (Image.received_at if chosen.made_since is None else Result.finished_at).desc(),
            Result.id.desc(),
        )
        .limit(chosen.limit)
    )


def _score_conditions(chosen: ResultFilter) -> Iterator[ColumnElement[bool]]:
    score: ColumnElement[float | None] = Result.probability.expression
    if chosen.finding is not None:
        score = Result.findings[chosen.finding].as_float()
        yield score.is_not(None)
    if chosen.min_score is not None:
        yield score >= chosen.min_score
    if chosen.max_score is not None:
        yield score <= chosen.max_score


def conditions(chosen: ResultFilter) -> Iterator[ColumnElement[bool]]:
    """Yield what a filter asks of joined results, images and models."""
    if chosen.since is not None:
        yield Image.received_at >= chosen.since
    if chosen.until is not None:
        yield Image.received_at < chosen.until
    if chosen.made_since is not None:
        yield Result.finished_at >= chosen.made_since
    if chosen.label is not None:
        yield Result.label == chosen.label
    if chosen.status is not None:
        yield Result.state == State(chosen.status)
    if chosen.flag is not None:
        # Both databases keep JSON as the text that was written, codes within quotes.
        yield cast(Result.flags, String).contains(json.dumps(chosen.flag), autoescape=True)
    yield from _score_conditions(chosen)
    if chosen.patient is not None:
        yield Image.patient_id == chosen.patient
    if chosen.accession is not None:
        yield Image.accession == chosen.accession
    if chosen.study is not None:
        yield Image.study_uid == chosen.study
    if chosen.model is not None:
        yield (Model.name == chosen.model) | (Model.name + "-" + Model.version == chosen.model)
