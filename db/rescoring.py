"""Rescoring: runs of another model on filed images, and the scores of models side by side."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import Engine, func, or_, select
from sqlalchemy.orm import aliased

from lungwatch.db.audit import AuditEvent, add_events
from lungwatch.db.engine import change_state, insert_if_new, reading, writing
from lungwatch.db.models import Image, Model, Result
from lungwatch.db.queries import ResultFilter, conditions
from lungwatch.db.states import UNFINISHED, State
from lungwatch.errors import Reason

_AT_ONCE = 500

# A run that another model's daemon has cut off is asked for again.
_CUT_OFF = (State.FAILED, Reason.MODEL_CHANGED)


def rescorable(engine: Engine, chosen: ResultFilter, model_id: int) -> list[int]:
    """Return the images in ``done/`` that a model has no result for, the newest first.

    Parameters
    ----------
    chosen
        Which results of other models; `limit` counts images.
    model_id
        The row of the model that is to score them.

    Returns
    -------
    list of int
        Numbers of the images' rows.
    """
    own = aliased(Result)
    has_own = select(own.id).where(
        own.image_id == Image.id,
        own.model_id == model_id,
        or_(own.state != _CUT_OFF[0], own.reason != _CUT_OFF[1], own.reason.is_(None)),
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
    engine: Engine,
    images: Sequence[int],
    model_id: int,
    now: datetime,
    deed: AuditEvent,
) -> int:
    """Ask a model for results of images; the rows that are there stay.

    Parameters
    ----------
    images
        Numbers of the images' rows, those to be taken first at the front.
    deed
        What the audit says of it; written with the first rows, or not at all.

    Returns
    -------
    int
        How many are queued: those that the folder still has, and nobody has asked for meanwhile.
    """
    count = 0
    for start in range(0, len(images), _AT_ONCE):
        some = images[start : start + _AT_ONCE]
        with writing(engine) as connection:
            # Retention may have removed a file since.
            there = set(
                connection.scalars(
                    select(Image.id).where(Image.id.in_(some), Image.path.startswith("done/"))
                )
            )
            for image_id in some:
                if image_id not in there:
                    continue
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
                if not is_new:
                    cut_off = connection.scalar(
                        select(Result.id).where(
                            Result.image_id == image_id,
                            Result.model_id == model_id,
                            Result.state == _CUT_OFF[0],
                            Result.reason == _CUT_OFF[1],
                        )
                    )
                    if cut_off is None:
                        continue
                    change_state(
                        connection,
                        cut_off,
                        current=State.FAILED,
                        target=State.QUEUED,
                        attempts=0,
                        reason=None,
                        message=None,
                        claimed_at=now,
                        finished_at=None,
                    )
                count += 1
            if start == 0:
                add_events(connection, now, [deed])
    return count


def count_unfinished(engine: Engine, model_id: int) -> int:
    """Return how many results a model has still to make: asked for, or cut off on their way."""
    statement = select(func.count()).where(
        Result.model_id == model_id, Result.state.in_(UNFINISHED)
    )
    with reading(engine) as connection:
        return connection.scalar(statement) or 0


@dataclass(frozen=True, kw_only=True)
class ScoredCase:
    """One image that a model has scored, under all the names that it can be called by.

    Attributes
    ----------
    result_ids
        Of every model.
    logit
        The model's, before calibration; None where it has no result that is done.
    """

    image_id: int
    sha256: str
    sop_uid: str | None
    accession: str | None
    patient_id: str | None
    result_ids: tuple[int, ...]
    logit: float | None


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


@dataclass(frozen=True, kw_only=True)
class ModelRow:
    """A model that the record knows."""

    id: int
    name: str
    version: str
    sha256: str

    @property
    def full_name(self) -> str:
        """Name and version, as people write it."""
        return f"{self.name}-{self.version}"


def known_models(engine: Engine) -> list[ModelRow]:
    """Return the models that have been used, the first used first."""
    statement = select(Model.id, Model.name, Model.version, Model.sha256).order_by(Model.id)
    with reading(engine) as connection:
        return [ModelRow(**row._mapping) for row in connection.execute(statement)]  # noqa: SLF001 - SQLAlchemy's public name


def scored_cases(engine: Engine, model_sha256: str) -> list[ScoredCase]:
    """Return every image of the record, oldest first, with one model's logit where it has it."""
    images = select(
        Image.id, Image.sha256, Image.sop_uid, Image.accession, Image.patient_id
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


def scored_pairs(engine: Engine, model_a: int, model_b: int) -> list[ScoredPair]:
    """Return the images that both models, by the numbers of their rows, have scored."""
    a, b = aliased(Result), aliased(Result)
    statement = (
        select(
            Image.sha256,
            a.label.label("label_a"),
            b.label.label("label_b"),
            a.probability.label("probability_a"),
            b.probability.label("probability_b"),
            a.threshold.label("threshold_a"),
        )
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
    with reading(engine) as connection:
        return [ScoredPair(**row._mapping) for row in connection.execute(statement)]  # noqa: SLF001 - as above
