"""Queries of results. Each call reads one snapshot and blocks no writer."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

from sqlalchemy import ColumnElement, Engine, Select, String, case, cast, func, select
from sqlalchemy.orm import aliased

from lungwatch.db.engine import reading
from lungwatch.db.models import Arrival, Delivery, Image, Model, Result
from lungwatch.db.states import DELIVERY_ORDER, UNFINISHED, DeliveryState, State
from lungwatch.errors import NotFoundError

if TYPE_CHECKING:
    from sqlalchemy import Row


@dataclass(frozen=True, kw_only=True)
class ResultRow:
    """What became of one image with one model.

    Attributes
    ----------
    id
        Number of the result.
    sha256, source_name
        The content, and the name it first came under.
    status
        ``done``, ``rejected``, ``failed``, or the state on the way there.
    reason, message
        Why it was rejected or failed: a stable code and a line for people.
    label
        ``COVID``, ``NEGATIVE`` or ``UNCERTAIN``.
    probability, threshold
        Calibrated, 0..1.
    uncertain_from, uncertain_to
        Probabilities within [from, to) are ``UNCERTAIN``; equal where the model never abstains.
    findings
        Calibrated probability, 0..1, of each finding by name (``covid``, ``opacity``); None
        where there is no score.
    calibration
        The site calibration whose probability, threshold and band these are; None: the bundle's.
    flags
        Codes of what is remarkable about the case (`lungwatch.errors`).
    gate_score, lung_area, lung_share
        Of the content gate, 0..1 (`lungwatch.contract.Plausibility`); None without one.
    model, model_version
        Who scored it.
    overlay, file
        Paths relative to the home.
    patient_id, study_uid, series_uid, sop_uid, accession
        As the file says.
    received_at, finished_at
        UTC.
    duration_ms
        From the claim to the result.
    attempts
        Runs started since the last drop or retry.
    arrivals
        How many times the content was dropped for this result.
    delivery
        State of what is sent to a PACS: ``failed`` or ``invalid`` if one is, else ``queued``
        or ``sending`` if one is, else ``sent``; None where nothing is sent.
    """

    id: int
    sha256: str
    source_name: str
    status: State
    reason: str | None
    label: str | None
    probability: float | None
    threshold: float | None
    uncertain_from: float | None
    uncertain_to: float | None
    findings: Mapping[str, float] | None
    calibration: str | None
    flags: tuple[str, ...]
    gate_score: float | None
    lung_area: float | None
    lung_share: float | None
    model: str
    model_version: str
    overlay: str | None
    patient_id: str | None
    study_uid: str | None
    series_uid: str | None
    sop_uid: str | None
    accession: str | None
    received_at: datetime
    finished_at: datetime | None
    duration_ms: int | None
    message: str | None
    attempts: int
    file: str | None
    arrivals: int
    delivery: DeliveryState | None


@dataclass(frozen=True, kw_only=True)
class ResultDetail(ResultRow):
    """A result whole, with what the file says about the image.

    The fields after `claimed_at` are those of `lungwatch.attributes.RadiographMeta`, and then:

    Attributes
    ----------
    file_removed_at, overlay_removed_at
        When retention removed them; None for what is there, or gone otherwise.
    """

    logit: float | None
    model_sha256: str
    size_bytes: int
    claimed_at: datetime | None
    format: str | None
    rows: int | None
    columns: int | None
    bits_stored: int | None
    photometric: str | None
    transfer_syntax: str | None
    sop_class: str | None
    modality: str | None
    body_part: str | None
    view_position: str | None
    study_date: str | None
    series_date: str | None
    acquisition_date: str | None
    manufacturer: str | None
    manufacturer_model: str | None
    station: str | None
    institution: str | None
    file_removed_at: datetime | None
    overlay_removed_at: datetime | None


@dataclass(frozen=True, kw_only=True)
class TrackedFile:
    """A result as the folders see it.

    Attributes
    ----------
    path, overlay
        Relative to the home; None where there is no file.
    received_at
        UTC; decides the folder in ``done``.
    removed_at
        When retention removed the file, should `path` be None for that.
    """

    result_id: int
    image_id: int
    model_id: int
    sha256: str
    state: State
    reason: str | None
    path: str | None
    received_at: datetime
    overlay: str | None
    source_name: str
    removed_at: datetime | None


@dataclass(frozen=True, kw_only=True)
class ResultFilter:
    """Which results are meant; a field that is None leaves all.

    Attributes
    ----------
    since, until
        ``since <= received_at < until``, with a zone.
    made_since
        ``made_since <= finished_at``; the results then come in the order of that time.
    min_score, max_score
        ``min_score <= probability <= max_score``; results without one never match.
    finding
        Whose probability that is; results that were not scored for it never match. None: COVID.
    flag
        One that the result carries.
    patient, accession, study
        Whole values of patient ID, accession number and study UID.
    model
        A name ("baseline") or a name and version ("baseline-1.1.0").
    limit
        At most so many, the newest.
    """

    since: datetime | None = None
    until: datetime | None = None
    made_since: datetime | None = None
    label: str | None = None
    status: str | None = None
    flag: str | None = None
    finding: str | None = None
    min_score: float | None = None
    max_score: float | None = None
    patient: str | None = None
    accession: str | None = None
    study: str | None = None
    model: str | None = None
    limit: int | None = None


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


_PAGE_ROWS = 1000

_SHORTEST_PREFIX = 6

_DIGEST_LENGTH = 64


def list_results(engine: Engine, chosen: ResultFilter) -> list[ResultRow]:
    """Return the results that a filter chooses, newest first.

    Raises
    ------
    DatabaseError
        If the database cannot be read.
    """
    with reading(engine) as connection:
        return [ResultRow(**_values(row)) for row in connection.execute(select_results(chosen))]


def get_result(engine: Engine, id_or_hash: int | str) -> ResultDetail:
    """Return one result whole.

    Parameters
    ----------
    id_or_hash
        The result's number, its content's SHA-256, or the beginning of that, from six
        characters on.

    Raises
    ------
    NotFoundError
        If nothing matches, or more than one result does.
    """
    wanted = str(id_or_hash).strip().lower()
    found = _details(engine, Result.id == int(wanted)) if _is_number(wanted) else []
    if not found and _is_prefix(wanted):
        found = _details(engine, Image.sha256.startswith(wanted))
    if not found:
        raise NotFoundError(
            f"no result '{id_or_hash}': give a number, or the first {_SHORTEST_PREFIX} or more "
            "characters of a SHA-256"
        )
    if len(found) > 1:
        listed = ", ".join(f"{row.id} ({row.model}-{row.model_version})" for row in found[:5])
        more = ", …" if len(found) > 5 else ""
        raise NotFoundError(f"'{id_or_hash}' matches {len(found)} results: {listed}{more}")
    return found[0]


def unfinished(engine: Engine) -> list[TrackedFile]:
    """Return the results that have no end yet, oldest first."""
    return _tracked(engine, select_tracked().where(Result.state.in_(UNFINISHED)))


def queued(
    engine: Engine, limit: int, model_id: int | None = None, *, own_only: bool = False
) -> list[TrackedFile]:
    """Return results that somebody asked to run again and whose file is known.

    Parameters
    ----------
    limit
        At most so many, the first asked for.
    model_id
        Only those that this model can take up: its own, and those of other models whose
        image it has no result for; not those that another model is to score beside a result
        that is done (`lungwatch rescore`).
    own_only
        Only those that this very model was asked for.
    """
    statement = select_tracked().where(Result.state == State.QUEUED, Image.path.is_not(None))
    if model_id is not None:
        own = aliased(Result)
        scored = select(own.id).where(own.image_id == Result.image_id, own.model_id == model_id)
        of_model = Result.model_id == model_id
        if not own_only:
            of_model |= ~scored.exists() & ~Image.path.startswith("done/")
        statement = statement.where(of_model)
    ordered = statement.order_by(None).order_by(Result.claimed_at, Result.id)
    return _tracked(engine, ordered.limit(limit))


def has_result(engine: Engine, sha256: str, reason: str) -> bool:
    """Whether a content has a result that ended for this reason."""
    statement = select(Result.id).join(Image)
    with reading(engine) as connection:
        found = connection.execute(
            statement.where(Image.sha256 == sha256, Result.reason == reason).limit(1)
        )
        return found.first() is not None


def is_known(engine: Engine, sha256: str) -> bool:
    """Whether a content has ever been claimed."""
    with reading(engine) as connection:
        found = connection.execute(select(Image.id).where(Image.sha256 == sha256))
        return found.first() is not None


def is_unfinished(engine: Engine, sha256: str) -> bool:
    """Whether some result of a content has no end yet."""
    statement = select(Result.id).join(Image).where(Image.sha256 == sha256)
    with reading(engine) as connection:
        found = connection.execute(statement.where(Result.state.in_(UNFINISHED)).limit(1))
        return found.first() is not None


def rows_in_work(engine: Engine) -> list[TrackedFile]:
    """Return the results, finished or not, whose file should be in ``work/``.

    Also those on their way of which it is recorded that the file is nowhere.
    """
    is_lost = Image.path.is_(None) & Result.state.in_((State.CLAIMED, State.RECORDED))
    return _tracked(engine, select_tracked().where(Image.path.startswith("work/") | is_lost))


def iter_all(engine: Engine) -> Iterator[TrackedFile]:
    """Return every result in order of its number, read in pages so that no lock is held."""
    last_id = 0
    while page := _tracked(engine, select_tracked().where(Result.id > last_id).limit(_PAGE_ROWS)):
        yield from page
        last_id = page[-1].result_id


def _tracked(engine: Engine, statement: "AnySelect") -> list[TrackedFile]:
    with reading(engine) as connection:
        return [TrackedFile(**row._mapping) for row in connection.execute(statement)]  # noqa: SLF001 - SQLAlchemy's public name


def _details(engine: Engine, condition: ColumnElement[bool]) -> list[ResultDetail]:
    with reading(engine) as connection:
        rows = connection.execute(select_details().where(condition).order_by(Result.id))
        return [ResultDetail(**_values(row)) for row in rows]


def _values(row: "Row[*tuple[Any, ...]]") -> dict[str, Any]:
    values = dict(row._mapping)  # noqa: SLF001 - SQLAlchemy's public name
    return {**values, "flags": tuple(values["flags"])}


def _is_number(text: str) -> bool:
    # Longer ones are no numbers of rows and overflow the column.
    return text.isascii() and text.isdigit() and len(text) <= 9


def _is_prefix(text: str) -> bool:
    return _SHORTEST_PREFIX <= len(text) <= _DIGEST_LENGTH and all(
        character in "0123456789abcdef" for character in text
    )
