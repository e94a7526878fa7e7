"""Scores of one model, and of two models on the same images; only for reading."""

from dataclasses import dataclass

from sqlalchemy import Engine, select
from sqlalchemy.orm import aliased

from lungwatch.db.engine import reading
from lungwatch.db.schema import Image, Model, Result
from lungwatch.db.states import State


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
class Pair:
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
class KnownModel:
    """A model that the record knows."""

    id: int
    name: str
    version: str
    sha256: str

    @property
    def full_name(self) -> str:
        """Name and version, as people write it."""
        return f"{self.name}-{self.version}"


def known_models(engine: Engine) -> list[KnownModel]:
    """Return the models that have been used, the first used first."""
    statement = select(Model.id, Model.name, Model.version, Model.sha256).order_by(Model.id)
    with reading(engine) as connection:
        return [KnownModel(**row._mapping) for row in connection.execute(statement)]  # noqa: SLF001 - SQLAlchemy's public name


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


def scored_pairs(engine: Engine, model_a: int, model_b: int) -> list[Pair]:
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
        return [Pair(**row._mapping) for row in connection.execute(statement)]  # noqa: SLF001 - as above
