"""Rescoring: runs of another model on filed images, and the scores of models side by side."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime

from sqlalchemy import Connection, Engine, func, or_, select
from sqlalchemy.orm import aliased

from lungwatch.db.audit import AuditEvent, add_events
from lungwatch.db.engine import (
    change_state,
    columns_for,
    insert_if_new,
    read_rows,
    reading,
    writing,
)
from lungwatch.db.models import UNFINISHED, Image, Model, Result, State
from lungwatch.db.queries import ResultFilter, conditions
from lungwatch.db.results import REQUEUED
from lungwatch.errors import Reason

_BATCH_ROWS = 500


@dataclass(frozen=True, kw_only=True)
class ModelRow:
    """A model that has been used."""

    id: int
    name: str
    version: str
    sha256: str

    @property
    def full_name(self) -> str:
        """Name and version, as people write it."""
        return f"{self.name}-{self.version}"


@dataclass(frozen=True, kw_only=True)
class ScoredCase:
    """One image, with every identifier that a list of known truths may use for it.

    Attributes
    ----------
    result_ids
        Of every model.
    logit
        Of the chosen model, before calibration; None where it has no result that is done.
    """

    image_id: int
    sha256: str
    sop_uid: str | None
    accession: str | None
    patient_id: str | None
    result_ids: tuple[int, ...]
    logit: float | None

    def identifiers(self, kind: str) -> tuple[str, ...]:
        """Return its identifiers of one kind: sha256, sop_uid, accession, or id (of results)."""
        if kind == "id":
            return tuple(map(str, self.result_ids))
        value: str | None = getattr(self, kind)
        return () if value is None else (value,)


@dataclass(frozen=True, kw_only=True)
class KnownCases:
    """Cases with a known truth and a logit, one of each patient.

    Attributes
    ----------
    covid, logits
        Truth and logit of each case, in the order of receipt.
    unscored
        Number of images with a known truth but no logit.
    repeated
        Number of further images of the same patients, left out.
    """

    covid: list[bool]
    logits: list[float]
    unscored: int
    repeated: int


@dataclass(frozen=True, kw_only=True)
class ScoredPair:
    """One image that two models have scored.

    Attributes
    ----------
    probability_a, probability_b
        Calibrated, 0..1, as they decided.
    threshold_a
        Of the first model's row.
    """

    sha256: str
    label_a: str
    label_b: str
    probability_a: float
    probability_b: float
    threshold_a: float


def rescorable(engine: Engine, chosen: ResultFilter, model_id: int) -> list[int]:
    """Return the row numbers of images in ``done/`` that a model has no result for, newest first.

    A run that was interrupted by a daemon with another model counts as none.

    Parameters
    ----------
    chosen
        Which results of other models; `limit` counts images.
    model_id
        The row of the model that is to score them.
    """
    own = aliased(Result)
    has_own = select(own.id).where(
        own.image_id == Image.id,
        own.model_id == model_id,
        or_(
            own.state != State.FAILED,
            own.reason != Reason.MODEL_CHANGED,
            own.reason.is_(None),
        ),
    )
    statement = (
        select(Image.id)
        .join_from(Image, Result)
        .join(Model)
        .where(
            *conditions(chosen),
            Result.state == State.DONE,
            Result.label.is_not(None),
            Image.path.startswith("done/"),
            ~has_own.exists(),
        )
        .group_by(Image.id, Image.received_at)
        .order_by(Image.received_at.desc(), Image.id.desc())
        .limit(chosen.limit)
    )
    with reading(engine) as connection:
        return list(connection.scalars(statement))


def queue_rescoring(
    engine: Engine, images: Sequence[int], model_id: int, now: datetime, audit: AuditEvent
) -> int:
    """Queue a run of a model on images; their present results are kept.

    Parameters
    ----------
    images
        Row numbers, those to be scored first at the front.
    audit
        Written with the first rows, or not at all.

    Returns
    -------
    int
        Number of queued runs: of images that are still in the folder, and not queued by somebody
        else meanwhile.
    """
    count = 0
    for start in range(0, len(images), _BATCH_ROWS):
        batch = images[start : start + _BATCH_ROWS]
        with writing(engine) as connection:
            # Retention may have removed a file since.
            present = set(
                connection.scalars(
                    select(Image.id).where(Image.id.in_(batch), Image.path.startswith("done/"))
                )
            )
            count += sum(
                _queue_run(connection, image_id, model_id, now)
                for image_id in batch
                if image_id in present
            )
            if start == 0:
                add_events(connection, now, [audit])
    return count


def _queue_run(connection: Connection, image_id: int, model_id: int, now: datetime) -> bool:
    is_new = insert_if_new(
        connection,
        Result,
        ("image_id", "model_id"),
        {
            "image_id": image_id,
            "model_id": model_id,
            "state": State.QUEUED,
            "attempts": 0,
            "flags": [],
            "claimed_at": now,
        },
    )
    if is_new:
        return True
    interrupted = connection.scalar(
        select(Result.id).where(
            Result.image_id == image_id,
            Result.model_id == model_id,
            Result.state == State.FAILED,
            Result.reason == Reason.MODEL_CHANGED,
        )
    )
    return interrupted is not None and change_state(
        connection,
        Result,
        interrupted,
        current=State.FAILED,
        target=State.QUEUED,
        claimed_at=now,
        **REQUEUED,
    )


def count_unfinished(engine: Engine, model_id: int) -> int:
    """Return how many results of a model have not ended yet."""
    statement = select(func.count()).where(
        Result.model_id == model_id, Result.state.in_(UNFINISHED)
    )
    with reading(engine) as connection:
        return connection.scalar(statement) or 0


def known_models(engine: Engine) -> list[ModelRow]:
    """Return the models that have been used, in the order of their first use."""
    statement = select(*columns_for(ModelRow, Model)).order_by(Model.id)
    return read_rows(engine, ModelRow, statement)


def scored_cases(engine: Engine, model_sha256: str) -> list[ScoredCase]:
    """Return every image, oldest first, with one model's logit where its result is done."""
    image = Image.__table__.c
    images = select(
        Image.id, Image.sha256, image.sop_uid, image.accession, image.patient_id
    ).order_by(Image.received_at, Image.id)
    results = select(Result.id, Result.image_id, Result.logit, Result.state, Model.sha256).join(
        Model
    )
    numbers: dict[int, list[int]] = {}
    logits: dict[int, float] = {}
    with reading(engine) as connection:
        for result_id, image_id, logit, state, sha256 in connection.execute(results):
            numbers.setdefault(image_id, []).append(result_id)
            if sha256 == model_sha256 and state is State.DONE and logit is not None:
                logits[image_id] = logit
        return [
            ScoredCase(
                image_id=image_id,
                sha256=sha256,
                sop_uid=sop_uid,
                accession=accession,
                patient_id=patient_id,
                result_ids=tuple(numbers.get(image_id, ())),
                logit=logits.get(image_id),
            )
            for image_id, sha256, sop_uid, accession, patient_id in connection.execute(images)
        ]


def identify(cases: Sequence[ScoredCase], kind: str) -> dict[str, list[ScoredCase]]:
    """Return the cases of each identifier of a kind; see `ScoredCase.identifiers`."""
    named: dict[str, list[ScoredCase]] = {}
    for case in cases:
        for name in case.identifiers(kind):
            named.setdefault(name, []).append(case)
    return named


def known_cases(cases: Sequence[ScoredCase], covid: Mapping[int, bool]) -> KnownCases:
    """Select the cases for a calibration.

    Parameters
    ----------
    cases
        In the order of receipt.
    covid
        Truth by image number.
    """
    found = KnownCases(covid=[], logits=[], unscored=0, repeated=0)
    unscored, repeated, patients = 0, 0, set()
    for case in cases:
        if case.image_id not in covid:
            continue
        if case.logit is None:
            unscored += 1
        elif case.patient_id is not None and case.patient_id in patients:
            # Conformal prediction assumes independent cases; images of one patient are not.
            repeated += 1
        else:
            patients.add(case.patient_id)
            found.covid.append(covid[case.image_id])
            found.logits.append(case.logit)
    return replace(found, unscored=unscored, repeated=repeated)


def scored_pairs(engine: Engine, model_a: int, model_b: int) -> list[ScoredPair]:
    """Return the images that both models, given by their row numbers, have scored."""
    a, b = aliased(Result), aliased(Result)
    scores = {
        "label_a": a.label,
        "label_b": b.label,
        "probability_a": a.probability,
        "probability_b": b.probability,
        "threshold_a": a.threshold,
    }
    statement = (
        select(*columns_for(ScoredPair, Image, scores))
        .join_from(Image, a, a.image_id == Image.id)
        .join(b, b.image_id == Image.id)
        .where(
            a.model_id == model_a,
            b.model_id == model_b,
            a.state == State.DONE,
            b.state == State.DONE,
            a.probability.is_not(None),
            b.probability.is_not(None),
        )
        .order_by(Image.id)
    )
    return read_rows(engine, ScoredPair, statement)
