"""One evaluation: a model on several data sets, perhaps against another."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lungwatch.training.aim import Aim
from lungwatch.training.assess import (
    Progress,
    Scored,
    aim_threshold,
    assess,
    choose_samples,
    compare,
    score,
)
from lungwatch.training.bootstrap import FIGURES, Bootstrap
from lungwatch.training.data_record import LearntImages, learnt_from
from lungwatch.training.dataset import dataset_name, list_dataset
from lungwatch.training.label_map import LabelMap
from lungwatch.training.lung_share import measure_lungs
from lungwatch.training.samples import Sample, Split
from lungwatch.training.score_cache import ScoreCache
from lungwatch.training.scorers import Judgement, Scorer

# Images that the model learnt from which are named.
_NAMED = 5


@dataclass(frozen=True, kw_only=True)
class ThresholdSource:
    """What a new threshold shall reach, and where it is chosen.

    Attributes
    ----------
    aim
        What it shall reach.
    data, split
        The cases that choose it; they are not tested. None takes the whole data set.
    """

    aim: Aim
    data: Path
    split: Split | None = "val"


@dataclass(frozen=True, kw_only=True)
class EvaluationRequest:
    """What is measured, and how.

    Attributes
    ----------
    data
        Data sets.
    split
        The part of each; None for all of it.
    threshold
        Where a new threshold comes from; None keeps the model's own.
    bootstrap
        How the intervals are made.
    lung_masks
        Folder with `images` and `masks`, against which the maps are held; None for none.
    labels
        What labels mean that are no finding; see `lungwatch.training.dataset.load_dataset`.
    """

    data: Sequence[Path]
    split: Split | None = "test"
    threshold: ThresholdSource | None = None
    bootstrap: Bootstrap = field(default_factory=Bootstrap)
    lung_masks: Path | None = None
    labels: LabelMap | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class SetEvaluation:
    """What came out on one data set.

    Attributes
    ----------
    location
        The data set.
    result
        The figures, plain values for JSON; see `lungwatch.training.assess.assess`.
    scored, other
        The answers of the model, and of the one it is compared with.
    """

    location: Path
    result: dict[str, Any]
    scored: Scored
    other: Scored | None


def run_evaluation(
    scorer: Scorer,
    request: EvaluationRequest,
    *,
    other: Scorer | None = None,
    learnt: LearntImages | None = None,
    caches: Sequence[ScoreCache] | None = None,
    on_total: Callable[[int], Progress] | None = None,
) -> list[SetEvaluation]:
    """Measure a model, and one to compare it with, on each data set.

    Parameters
    ----------
    scorer, other
        The models.
    request
        What is measured, and how.
    learnt
        Images behind the model; None if they are not known.
    caches
        For each model where its answers are kept.
    on_total
        Told the number of images before the first is read; returns what is told of each.

    Raises
    ------
    DatasetError
        If a data set is empty, has no such split, holds one class only, has an unreadable
        file, or shares images with those that choose the threshold; or the lung masks
        cannot be used.
    ModelError
        If a model answers with what is no number.
    """
    sets = [choose_samples(location, request.split, request.labels) for location in request.data]
    models = [scorer] if other is None else [scorer, other]
    progress = on_total(len(models) * sum(map(len, sets))) if on_total else None
    tested = [sample for samples in sets for sample in samples]
    kept: list[ScoreCache | None] = list(caches) if caches else [None] * len(models)
    judged = [
        _judge(model, request, tested, cache, learnt if model is scorer else None)
        for model, cache in zip(models, kept, strict=True)
    ]
    lungs = [
        measure_lungs(model, request.lung_masks, request.bootstrap)
        for model in models
        if request.lung_masks
    ]
    found = []
    for location, samples in zip(request.data, sets, strict=True):
        answers = [
            replace(score(model, samples, progress=progress, cache=cache), judgement=judgement)
            for model, (judgement, _), cache in zip(models, judged, kept, strict=True)
        ]
        result = {
            "model": scorer.judgement.name,
            "data": dataset_name(location),
            "split": request.split or "all",
            "threshold": judged[0][0].decision.threshold,
            **assess(answers[0], request.bootstrap),
            "learnt": _learnt(answers[0], location, learnt, request.bootstrap),
        }
        if request.labels:
            counted = list_dataset(location, request.labels).labels
            result["labels"] = {"mapped": counted.mapped, "ignored": counted.ignored}
        if judged[0][1]:
            result["threshold_choice"] = judged[0][1]
        theirs = answers[1] if other is not None else None
        if theirs is not None:
            result["comparison"] = compare(answers[0], theirs, request.bootstrap)
        if lungs:
            result["lungs"] = lungs[0]
            if len(lungs) > 1:
                result["comparison"]["lungs"] = lungs[1]
        found.append(
            SetEvaluation(location=location, result=result, scored=answers[0], other=theirs)
        )
    return found


def _judge(
    model: Scorer,
    request: EvaluationRequest,
    tested: Sequence[Sample],
    cache: ScoreCache | None,
    learnt: LearntImages | None,
) -> tuple[Judgement, dict[str, Any] | None]:
    source = request.threshold
    if source is None:
        return model.judgement, None
    return aim_threshold(
        model,
        source.aim,
        source.data,
        source.split,
        tested=tested,
        labels=request.labels,
        learnt=learnt,
        cache=cache,
    )


def _learnt(
    scored: Scored, location: Path, learnt: LearntImages | None, bootstrap: Bootstrap
) -> dict[str, Any] | None:
    """Say which images the model learnt from, and measure it without them."""
    if learnt is None:
        return None
    known = learnt_from(scored.samples, learnt)
    root = location if location.is_dir() else location.parent
    names = [
        (s.path.relative_to(root) if s.path.is_relative_to(root) else s.path).as_posix()
        for s, is_known in zip(scored.samples, known, strict=True)
        if is_known
    ]
    rest = [index for index, is_known in enumerate(known) if not is_known]
    without = None
    if names and len({scored.samples[index].positive for index in rest}) == 2:
        samples = [scored.samples[index] for index in rest]
        found = assess(
            Scored(samples=samples, judgement=scored.judgement, logits=scored.logits[rest]),
            bootstrap,
        )
        kept = ("positives", "negatives", *FIGURES, "intervals", "too_few")
        without = {name: found[name] for name in kept}
    return {"images": len(names), "names": names[:_NAMED], "without": without}
