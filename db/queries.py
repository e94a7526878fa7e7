"""Queries of results. Each call reads one snapshot and blocks no writer.

Every function raises `DatabaseError` where the database cannot be read.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from datetime import datetime
from typing import TYPE_CHECKING, Any

from sqlalchemy import ColumnElement, Engine, Select, String, case, cast, func, select
from sqlalchemy.orm import aliased

from lungwatch.attributes import ATTRIBUTES
from lungwatch.db.engine import columns_for, read_rows, reading
from lungwatch.db.models import (
    DELIVERY_ORDER,
    UNFINISHED,
    Arrival,
    Delivery,
    DeliveryState,
    Image,
    Model,
    Result,
    State,
)
from lungwatch.errors import NotFoundError

if TYPE_CHECKING:
    AnySelect = Select[*tuple[Any, ...]]

_PAGE_ROWS = 1000
_SHORTEST_PREFIX = 6
_DIGEST_LENGTH = 64
# Fields of a row that only `results show` tells.
_SHOWN_ONLY = {
    *("logit", "model_sha256", "size_bytes", "claimed_at"),
    *("file_removed_at", "overlay_removed_at", "overlay_sha256"),
}


@dataclass(frozen=True, kw_only=True)
class ResultRow:
    """The outcome of one image with one model.

    Attributes
    ----------
    id
        Number of the result.
    sha256, size_bytes, source_name
        The content, and the name it first came under.
    status
        ``done``, ``rejected``, ``failed``, or the state on the way there.
    reason, message
        Why it was rejected or failed: a stable code and a line for people.
    label
        ``COVID``, ``NEGATIVE`` or ``UNCERTAIN``.
    probability, threshold
        Calibrated, 0..1; `logit` is before calibration.
    uncertain_from, uncertain_to
        Probabilities within [from, to) are ``UNCERTAIN``; equal where the model never abstains.
    findings
        Calibrated probability, 0..1, of each finding by name (``covid``, ``opacity``); None
        where there is no score.
    calibration
        The site calibration that decided; None for the bundle's own.
    flags
        Codes of what is remarkable about the case (`lungwatch.errors.Flag`).
    gate_score, lung_area, lung_share
        Of the content gate, 0..1 (`lungwatch.db.models.Plausibility`); None without one.
    overlay, file
        Paths relative to the home.
    attributes
        What the file states: the fields of `lungwatch.attributes.RadiographMeta`, by name; None
        for each until it is decoded.
    received_at, claimed_at, finished_at
        UTC.
    duration_ms
        From the claim to the result.
    attempts
        Runs started since the last drop or retry.
    arrivals
        Number of times that the content was dropped for this result.
    delivery
        State of what is sent to a PACS: ``failed`` or ``invalid`` if one is, else ``queued``
        or ``sending`` if one is, else ``sent``; None where nothing is sent.
    file_removed_at, overlay_removed_at
        When retention removed them; None if they exist, or are gone for another reason.
    overlay_sha256
        Of the overlay's bytes; None without one, or if an earlier version recorded it.
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
    attributes: Mapping[str, str | int | datetime | None]
    received_at: datetime
    finished_at: datetime | None
    duration_ms: int | None
    message: str | None
    attempts: int
    file: str | None
    arrivals: int
    delivery: DeliveryState | None
    logit: float | None
    model_sha256: str
    size_bytes: int
    claimed_at: datetime | None
    file_removed_at: datetime | None
    overlay_removed_at: datetime | None
    overlay_sha256: str | None

    def listed(self) -> dict[str, object]:
        """Return the values of `results list`, by the keys of its JSON and CSV (`LIST_KEYS`)."""
        values = self.shown()
        return {key: values[key] for key in LIST_KEYS}

    def shown(self) -> dict[str, object]:
        """Return the values of `results show`: all of `listed`, and every attribute by its name."""
        own = {one.name: getattr(self, one.name) for one in fields(self)}
        stated = own.pop("attributes")
        listed = {key: stated[name] for key, name in _LISTED_ATTRIBUTES.items()}
        return {**own, **listed, **stated}


_LISTED_ATTRIBUTES = {
    attribute.listed_as: name for name, attribute in ATTRIBUTES.items() if attribute.listed_as
}

LIST_KEYS = tuple(
    key
    for one in fields(ResultRow)
    if one.name not in _SHOWN_ONLY
    for key in (_LISTED_ATTRIBUTES if one.name == "attributes" else (one.name,))
)
"""Keys of a result in the JSON and CSV of `results list` and `results export`."""


@dataclass(frozen=True, kw_only=True)
class TrackedFile:
    """A result and where its files are.

    Attributes
    ----------
    path, overlay
        Relative to the home; None where there is no file.
    received_at
        UTC; decides the folder in ``done``.
    removed_at
        When retention removed the file, if `path` is None for that reason.
    overlay_sha256
        Of the overlay's bytes; None if an earlier version recorded it.
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
    overlay_sha256: str | None


@dataclass(frozen=True, kw_only=True)
class ResultFilter:
    """Choice of results; a field that is None leaves all.

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


def list_results(engine: Engine, chosen: ResultFilter) -> list[ResultRow]:
    """Return the results that a filter chooses, newest first."""
    return _result_rows(engine, select_chosen(_result_columns(), chosen))


def get_result(engine: Engine, id_or_hash: int | str) -> ResultRow:
    """Return one result.

    Parameters
    ----------
    id_or_hash
        The result's number, its content's SHA-256, or at least the first six characters of it.

    Raises
    ------
    NotFoundError
        If nothing matches, or more than one result does.
    """
    wanted = str(id_or_hash).strip().lower()
    found: list[ResultRow] = []
    # A longer number is no row's, and overflows the column.
    if wanted.isascii() and wanted.isdigit() and len(wanted) <= 9:
        found = _find_results(engine, Result.id == int(wanted))
    is_prefix = _SHORTEST_PREFIX <= len(wanted) <= _DIGEST_LENGTH
    if not found and is_prefix and set(wanted) <= set("0123456789abcdef"):
        found = _find_results(engine, Image.sha256.startswith(wanted))
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


def _find_results(engine: Engine, condition: ColumnElement[bool]) -> list[ResultRow]:
    statement = _joined(select(*_result_columns())).where(condition).order_by(Result.id)
    return _result_rows(engine, statement)


def _result_columns() -> list[ColumnElement[Any]]:
    image, removed = Image.__table__.c, Result.overlay_removed_at
    elsewhere = {
        "status": Result.state,
        "sha256": Image.sha256,
        "size_bytes": Image.size_bytes,
        "source_name": Image.source_name,
        "received_at": Image.received_at,
        "file": Image.path,
        "file_removed_at": case((Image.path.is_(None), Image.removed_at)),
        "overlay_removed_at": case((Result.overlay.is_(None), removed)),
        "model": Model.name,
        "model_version": Model.version,
        "model_sha256": Model.sha256,
        "arrivals": arrivals_of_result(),
        "delivery": _delivery_of_result(),
    }
    own = columns_for(ResultRow, Result, elsewhere, skip=("attributes",))
    return [*own, *(image[name].label(f"image_{name}") for name in ATTRIBUTES)]


def _result_rows(engine: Engine, statement: "AnySelect") -> list[ResultRow]:
    own = [one.name for one in fields(ResultRow) if one.name not in ("flags", "attributes")]
    with reading(engine) as connection:
        return [
            ResultRow(
                **{name: row[name] for name in own},
                flags=tuple(row["flags"]),
                attributes={name: row[f"image_{name}"] for name in ATTRIBUTES},
            )
            for row in connection.execute(statement).mappings()
        ]


def arrivals_of_result() -> ColumnElement[int]:
    """Return a column that counts the arrivals of a selected result."""
    counted = select(func.count(Arrival.id)).where(Arrival.result_id == Result.id)
    return counted.correlate(Result).scalar_subquery()


def _delivery_of_result() -> ColumnElement[DeliveryState | None]:
    """Return the most urgent state of a selected result's deliveries."""
    rank = {state: number for number, state in enumerate(DELIVERY_ORDER)}
    first = (
        select(Delivery.state)
        .where(Delivery.result_id == Result.id)
        .order_by(case(rank, value=Delivery.state))
        .limit(1)
    )
    return first.correlate(Result).scalar_subquery()


def _joined(statement: "AnySelect") -> "AnySelect":
    return statement.select_from(Result).join(Image).join(Model)


def select_chosen(columns: list[ColumnElement[Any]], chosen: ResultFilter) -> "AnySelect":
    """Select columns of the results, images and models that a filter chooses, newest first."""
    newest = Image.received_at if chosen.made_since is None else Result.finished_at
    return (
        _joined(select(*columns))
        .where(*conditions(chosen))
        .order_by(newest.desc(), Result.id.desc())
        .limit(chosen.limit)
    )


def conditions(chosen: ResultFilter) -> Iterator[ColumnElement[bool]]:
    """Yield a filter's conditions on joined results, images and models."""
    image = Image.__table__.c
    for column, value in (
        (Result.label, chosen.label),
        (image.patient_id, chosen.patient),
        (image.accession, chosen.accession),
        (image.study_uid, chosen.study),
    ):
        if value is not None:
            yield column == value
    if chosen.since is not None:
        yield Image.received_at >= chosen.since
    if chosen.until is not None:
        yield Image.received_at < chosen.until
    if chosen.made_since is not None:
        yield Result.finished_at >= chosen.made_since
    if chosen.status is not None:
        yield Result.state == State(chosen.status)
    if chosen.flag is not None:
        # Both databases keep JSON as the text that was written, codes within quotes.
        yield cast(Result.flags, String).contains(json.dumps(chosen.flag), autoescape=True)
    score: ColumnElement[float | None] = Result.probability.expression
    if chosen.finding is not None:
        score = Result.findings[chosen.finding].as_float()
        yield score.is_not(None)
    if chosen.min_score is not None:
        yield score >= chosen.min_score
    if chosen.max_score is not None:
        yield score <= chosen.max_score
    if chosen.model is not None:
        yield (Model.name == chosen.model) | (Model.name + "-" + Model.version == chosen.model)


def unfinished(engine: Engine) -> list[TrackedFile]:
    """Return the results that have not ended yet, oldest first."""
    return _tracked(engine, Result.state.in_(UNFINISHED))


def queued(
    engine: Engine, limit: int, model_id: int | None = None, *, own_only: bool = False
) -> list[TrackedFile]:
    """Return results that are queued for another run and whose file is known.

    Parameters
    ----------
    limit
        At most so many, the first requested.
    model_id
        Only those that this model can take up: its own, and those of other models whose image it
        has no result for; not those queued for rescoring by another model (`lungwatch rescore`),
        whose image has a result that is done.
    own_only
        Only those queued for this model.
    """
    statement = _select_tracked().where(Result.state == State.QUEUED, Image.path.is_not(None))
    if model_id is not None:
        own = aliased(Result)
        scored = select(own.id).where(own.image_id == Result.image_id, own.model_id == model_id)
        of_model = Result.model_id == model_id
        if not own_only:
            of_model |= ~scored.exists() & ~Image.path.startswith("done/")
        statement = statement.where(of_model)
    return read_rows(
        engine, TrackedFile, statement.order_by(Result.claimed_at, Result.id).limit(limit)
    )


def rows_in_work(engine: Engine) -> list[TrackedFile]:
    """Return the results, ended or not, whose file should be in ``work/``.

    Also those in process whose file is recorded to be nowhere.
    """
    is_lost = Image.path.is_(None) & Result.state.in_((State.CLAIMED, State.RECORDED))
    return _tracked(engine, Image.path.startswith("work/") | is_lost)


def iter_all(engine: Engine) -> Iterator[TrackedFile]:
    """Yield every result in order of its number, read in pages so that no lock is held."""
    last_id = 0
    while page := _tracked(engine, Result.id > last_id, limit=_PAGE_ROWS):
        yield from page
        last_id = page[-1].result_id


def _tracked(
    engine: Engine, condition: ColumnElement[bool], limit: int | None = None
) -> list[TrackedFile]:
    statement = _select_tracked().where(condition).order_by(Result.id).limit(limit)
    return read_rows(engine, TrackedFile, statement)


def _select_tracked() -> "AnySelect":
    image = Image.__table__.c
    names = ("sha256", "path", "received_at", "source_name", "removed_at")
    elsewhere = {"result_id": Result.id, **{name: image[name] for name in names}}
    return select(*columns_for(TrackedFile, Result, elsewhere)).join_from(Result, Image)


def has_result(engine: Engine, sha256: str, reason: str) -> bool:
    """Return whether a content has a result that ended for this reason."""
    return _exists(engine, _results_of(sha256).where(Result.reason == reason))


def is_known(engine: Engine, sha256: str) -> bool:
    """Return whether a content has ever been claimed."""
    return _exists(engine, select(Image.id).where(Image.sha256 == sha256))


def digest_at(engine: Engine, path: str) -> str | None:
    """Return the SHA-256 of the content that is recorded at a path; None if none is."""
    with reading(engine) as connection:
        return connection.scalar(select(Image.sha256).where(Image.path == path))


def is_unfinished(engine: Engine, sha256: str) -> bool:
    """Return whether a content has a result that has not ended yet."""
    return _exists(engine, _results_of(sha256).where(Result.state.in_(UNFINISHED)))


def _results_of(sha256: str) -> Select[int]:
    return select(Result.id).join(Image).where(Image.sha256 == sha256)


def _exists(engine: Engine, statement: Select[int]) -> bool:
    with reading(engine) as connection:
        return connection.execute(statement.limit(1)).first() is not None
