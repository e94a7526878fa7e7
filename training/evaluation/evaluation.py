"""Evaluation of a model on data sets: metrics, intervals, sources, comparison of models."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lungwatch.contract import OPACITY
from lungwatch.errors import DatasetError, ModelError
from lungwatch.training.data.dataset import (
    ImageClass,
    LabelMap,
    Sample,
    Split,
    dataset_name,
    list_dataset,
    load_dataset,
    of_split,
    relative_name,
    select,
)
from lungwatch.training.data.duplicates import patient_numbers
from lungwatch.training.data.pixels import FloatArray, read_pixels, targets
from lungwatch.training.data.splits import LearntImages, learnt_from
from lungwatch.training.evaluation.calibration import Aim, apply_calibration, choose_threshold
from lungwatch.training.evaluation.maps import measure_lungs
from lungwatch.training.evaluation.metrics import (
    FIGURES,
    Bootstrap,
    Patients,
    area_interval,
    delong_test,
    figures,
    intervals,
    paired_differences,
    roc_auc,
    too_few,
    uncomputable,
    weighted_figures,
)
from lungwatch.training.evaluation.scorers import Judgement, ScoreCache, Scorer

# Which finding should score higher than which; all of it by the score for COVID.
_PROBES: tuple[tuple[ImageClass, ImageClass], ...] = (
    ("COVID", "OTHER_PNEUMONIA"),
    ("COVID", "NORMAL"),
    ("OTHER_PNEUMONIA", "NORMAL"),
)
# An area under the curve of fewer images than this on one side says nothing.
_FEWEST = 5
Progress = Callable[[int], None]
_UNKNOWN = "unknown"
# Images that the model learnt from which are named.
_NAMED = 5


def evaluate_pixels(
    scorer: Scorer, samples: Sequence[Sample], pixels: FloatArray
) -> dict[str, Any]:
    """Measure a network on preprocessed samples, without intervals.

    Returns
    -------
    dict
        The fields of `Figures`, the share that is `uncertain`, and `probes`: ROC-AUC of one
        class against another, over all sources and within each. Each finding beside COVID that
        the labels tell is measured too, under `findings`.
    """
    found = evaluate_logits(scorer.judgement, samples, scorer.logits(pixels))
    if scorer.judgement.findings:
        found["findings"] = evaluate_findings(scorer, samples, pixels)
    return found


def evaluate_findings(
    scorer: Scorer, samples: Sequence[Sample], pixels: FloatArray
) -> dict[str, Any]:
    """Measure each finding beside COVID that the labels tell, by name."""
    logits, found = scorer.finding_logits(pixels), {}
    for index, one in enumerate(scorer.judgement.findings):
        truth = finding_truth(one.name, samples)
        if truth is None:
            continue
        probabilities = apply_calibration(one.calibration, logits[:, index])
        found[one.name] = figures(truth, probabilities, one.threshold).to_dict()
    return found


def finding_truth(name: str, samples: Sequence[Sample]) -> FloatArray | None:
    """Return which images show a finding beside COVID, 0 and 1, (N,).

    An opacity is what is labelled COVID, OTHER_PNEUMONIA or OPACITY. None where the labels do
    not tell a finding, or say the same of all images.
    """
    if name != OPACITY:
        return None
    truth = np.array([sample.opaque for sample in samples], dtype=np.float32)
    return truth if 0 < truth.sum() < len(truth) else None


def evaluate_logits(
    judgement: Judgement, samples: Sequence[Sample], logits: FloatArray
) -> dict[str, Any]:
    """Measure binary logits, shape (N,), of samples in their order; see `evaluate_pixels`."""
    decision = judgement.decision
    probabilities = apply_calibration(judgement.calibration, logits)
    uncertain = (probabilities >= decision.uncertain_low) & (
        probabilities < decision.uncertain_high
    )
    return {
        **figures(targets(samples), probabilities, decision.threshold).to_dict(),
        "uncertain": round(float(uncertain.mean()), 6),
        "probes": {
            name: {
                "roc_auc": round(roc_auc(is_high, logits[chosen]), 6),
                "positives": int(is_high.sum()),
                "negatives": int((~is_high).sum()),
            }
            for name, (chosen, is_high) in probes(samples).items()
        },
    }


def probes(samples: Sequence[Sample]) -> dict[str, tuple[list[int], NDArray[np.bool_]]]:
    """List what is compared: one finding against another, over all sources and within each.

    Returns
    -------
    dict
        Name -> the indices of the samples, and for each whether it should score higher.
    """
    found = {}
    sources = sorted({s.source for s in samples if s.source})
    for source in [None, *sources]:
        for high, low in _PROBES:
            chosen = [
                i
                for i, s in enumerate(samples)
                if s.finding in (high, low) and source in (None, s.source)
            ]
            is_high = np.array([samples[i].finding == high for i in chosen], dtype=bool)
            if min(is_high.sum(), (~is_high).sum()) < _FEWEST:
                continue
            name = f"{high} vs {low}" + (f" within {source}" if source else "")
            found[name] = (chosen, is_high)
    return found


@dataclass(frozen=True, kw_only=True, eq=False)
class Scored:
    """A model's answers on one set.

    Attributes
    ----------
    samples
        The cases.
    judgement
        How the logits are read: calibration, threshold, band of abstention.
    logits
        Binary, float32, shape (N,), in the order of `samples`.
    """

    samples: Sequence[Sample]
    judgement: Judgement
    logits: FloatArray

    @property
    def targets(self) -> FloatArray:
        """1 for COVID and 0 for the rest, float32, shape (N,)."""
        return targets(self.samples)

    @property
    def calibrated(self) -> FloatArray:
        """Logits after Platt scaling, float32, shape (N,)."""
        calibration = self.judgement.calibration
        return calibration.slope * self.logits + calibration.intercept

    @property
    def probabilities(self) -> NDArray[np.float64]:
        """Calibrated, 0..1, shape (N,)."""
        return apply_calibration(self.judgement.calibration, self.logits)

    @property
    def called(self) -> NDArray[np.bool_]:
        """True where the probability reaches the threshold, (N,); abstention ignored."""
        return self.probabilities >= self.judgement.decision.threshold


@dataclass(frozen=True, kw_only=True)
class ThresholdSource:
    """Target of a new threshold, and the data that choose it.

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


def choose_samples(
    location: Path, split: Split | None, labels: LabelMap | None = None
) -> list[Sample]:
    """Take one split of a data set (all of it for None), both classes occurring.

    Raises
    ------
    DatasetError
        If there are no images, no such split, or one class only: it says which figures
        cannot be computed then.
    """
    chosen = of_split(load_dataset(location, labels), split, dataset_name(location))
    positives = sum(s.positive for s in chosen)
    if missing := uncomputable(positives, len(chosen) - positives):
        where = f"{location}: split '{split}'" if split else str(location)
        only = ", ".join(sorted({s.finding for s in chosen}))
        raise DatasetError(
            f"{where} holds one class only ({only}): {', '.join(missing)} cannot be computed; "
            "COVID and others are needed"
        )
    return chosen


def score(
    scorer: Scorer,
    samples: Sequence[Sample],
    *,
    progress: Progress | None = None,
    cache: ScoreCache | None = None,
) -> Scored:
    """Read images and run a model, or take its cached scores of these files.

    Raises
    ------
    DatasetError
        If a file is unreadable; it is named.
    ModelError
        If the model answers with what is no number.
    """
    spec = scorer.judgement.preprocess
    known = cache.read(samples, spec) if cache else None
    if known is not None:
        if progress:
            progress(len(samples))
        return Scored(samples=samples, judgement=scorer.judgement, logits=known)
    logits = scorer.logits(read_pixels(samples, spec, progress=progress))
    if not np.isfinite(logits).all():
        raise ModelError(f"{scorer.judgement.name} answers with what is no finite number")
    if cache:
        cache.write(samples, spec, logits)
    return Scored(samples=samples, judgement=scorer.judgement, logits=logits)


def aim_threshold(
    scorer: Scorer,
    source: ThresholdSource,
    *,
    tested: Sequence[Sample],
    labels: LabelMap | None = None,
    learnt: LearntImages | None = None,
    cache: ScoreCache | None = None,
) -> tuple[Judgement, dict[str, Any]]:
    """Choose a model's threshold on cases that it is not tested on.

    Returns
    -------
    judgement, about
        The model's judgement with the new threshold and without abstention; and the aim, the
        data and what was reached there.

    Raises
    ------
    DatasetError
        If these cases are among those that are tested, or cannot be used.
    """
    location, name = source.data, dataset_name(source.data)
    samples = select(load_dataset(location, labels), source.split, name)
    shared = {s.path.resolve() for s in samples} & {s.path.resolve() for s in tested}
    if shared:
        raise DatasetError(
            f"{location}: {len(shared)} of the images that choose the threshold are among those "
            f"to be evaluated ({min(shared)}); choose it on another split"
        )
    scored = score(scorer, samples, cache=cache)
    decision = choose_threshold(scored.targets, scored.calibrated, source.aim)
    judgement = replace(scorer.judgement, decision=decision)
    reached = evaluate_logits(judgement, samples, scored.logits)
    return judgement, {
        "aim": str(source.aim),
        "data": name,
        "split": source.split or "all",
        "threshold": decision.threshold,
        "sensitivity": reached["sensitivity"],
        "specificity": reached["specificity"],
        "images": len(samples),
        "learnt_from": None if learnt is None else sum(learnt_from(samples, learnt)),
    }


def evaluate_scored(scored: Scored, bootstrap: Bootstrap) -> dict[str, Any]:
    """Measure answers with intervals and by source.

    Returns
    -------
    dict
        The fields of `evaluate_pixels`, and `intervals` (95 %, by figure), `probe_intervals` (by
        probe), `sources` (by source; a figure that has no meaning there is None), `patients`
        (how many of either class; None if they are unknown), `bootstrap` (over patients where
        they are known) and what has `too_few` of them (`metrics.FEWEST`).
        Without resamples, no intervals.
    """
    threshold = scored.judgement.decision.threshold
    patients = patient_numbers(scored.samples)
    compared = probes(scored.samples)
    found = {
        **evaluate_logits(scored.judgement, scored.samples, scored.logits),
        "sources": {
            source: _of_source(scored, indices, bootstrap)
            for source, indices in _sources(scored.samples).items()
        },
        "patients": _count(scored.targets, patients) if patients is not None else None,
        "bootstrap": {
            "resamples": bootstrap.resamples,
            "seed": bootstrap.seed,
            "over": "images" if patients is None else "patients",
        },
        "too_few": too_few(scored.targets, patients),
        "probe_too_few": [
            name
            for name, (chosen, is_high) in compared.items()
            if "roc_auc" in too_few(is_high, _of(patients, chosen))
        ],
        "intervals": {},
        "probe_intervals": {},
    }
    if bootstrap.resamples:
        found["intervals"] = intervals(
            scored.targets, scored.probabilities, threshold, bootstrap, patients
        )
        found["probe_intervals"] = {
            name: area_interval(is_high, scored.logits[chosen], bootstrap, _of(patients, chosen))
            for name, (chosen, is_high) in compared.items()
        }
    return found


def compare(scored: Scored, other: Scored, bootstrap: Bootstrap) -> dict[str, Any]:
    """Compare two models on the same cases.

    Returns
    -------
    dict
        The other model's name, threshold and `figures`; the test of DeLong on the areas under
        the ROC curve (None with a single case of a class); `differences` (first less
        second) and their 95 % `intervals`, by paired resampling.
    """
    mine = evaluate_logits(scored.judgement, scored.samples, scored.logits)
    its = evaluate_logits(other.judgement, other.samples, other.logits)
    enough = min(mine["positives"], mine["negatives"]) >= 2
    systems = [(s.probabilities, s.judgement.decision.threshold) for s in (scored, other)]
    return {
        "model": other.judgement.name,
        "threshold": other.judgement.decision.threshold,
        "figures": {name: its[name] for name in (*FIGURES, "tp", "fp", "tn", "fn")},
        "delong": (
            asdict(delong_test(scored.targets, scored.logits, other.logits)) if enough else None
        ),
        "differences": {name: round(mine[name] - its[name], 6) for name in FIGURES},
        "intervals": (
            paired_differences(scored.targets, systems, bootstrap, patient_numbers(scored.samples))
        ),
    }


def rows(scored: Scored, location: Path, other: Scored | None = None) -> list[dict[str, Any]]:
    """List what was answered for each image, with paths relative to the data set."""
    answers = scored.probabilities
    others = other.probabilities if other else None
    decision = scored.judgement.decision
    listed = []
    for index, sample in enumerate(scored.samples):
        row = {
            "path": relative_name(sample.path, location),
            "label": sample.finding,
            "source": sample.source,
            "probability": float(answers[index]),
            "decision": decision.label(float(answers[index])),
        }
        if others is not None:
            row["other_probability"] = float(others[index])
        listed.append(row)
    return listed


def _sources(samples: Sequence[Sample]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for index, sample in enumerate(samples):
        found.setdefault(sample.source or _UNKNOWN, []).append(index)
    return dict(sorted(found.items()))


def _of_source(scored: Scored, indices: list[int], bootstrap: Bootstrap) -> dict[str, Any]:
    y, p = scored.targets[indices], scored.probabilities[indices]
    patients = patient_numbers([scored.samples[index] for index in indices])
    threshold = scored.judgement.decision.threshold
    once = weighted_figures(y, p, threshold, np.ones((1, len(indices))))
    positives = int(y.sum())
    said, true = scored.called[indices], y > 0.5
    values = {name: None if np.isnan(v[0]) else round(float(v[0]), 6) for name, v in once.items()}
    return {
        "positives": positives,
        "negatives": len(indices) - positives,
        **values,
        "tp": int(np.sum(said & true)),
        "fp": int(np.sum(said & ~true)),
        "tn": int(np.sum(~said & ~true)),
        "fn": int(np.sum(~said & true)),
        "not_computable": uncomputable(positives, len(indices) - positives),
        "too_few": too_few(y, patients),
        "intervals": (intervals(y, p, threshold, bootstrap, patients)),
    }


def _count(truth: FloatArray, patients: Patients) -> dict[str, int]:
    positive = truth > 0.5
    kinds = {"positives": positive, "negatives": ~positive}
    return {name: len(np.unique(patients[kind])) for name, kind in kinds.items()}


def _of(patients: Patients | None, chosen: Sequence[int]) -> Patients | None:
    return None if patients is None else patients[list(chosen)]


@dataclass(frozen=True, kw_only=True)
class EvaluationRequest:
    """Request of an evaluation: data sets, threshold, intervals.

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
        What labels mean that are no finding; see `dataset.load_dataset`.
    """

    data: Sequence[Path]
    split: Split | None = "test"
    threshold: ThresholdSource | None = None
    bootstrap: Bootstrap = field(default_factory=Bootstrap)
    lung_masks: Path | None = None
    labels: LabelMap | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class SetEvaluation:
    """Result of an evaluation on one data set.

    Attributes
    ----------
    location
        The data set.
    result
        The figures, plain values for JSON; see `evaluate_scored`.
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
        Called with the number of images before the first is read; returns the progress callback.

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
    judged: list[tuple[Judgement, dict[str, Any] | None]] = [
        aim_threshold(
            model,
            request.threshold,
            tested=tested,
            labels=request.labels,
            learnt=learnt if model is scorer else None,
            cache=cache,
        )
        if request.threshold
        else (model.judgement, None)
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
            **evaluate_scored(answers[0], request.bootstrap),
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


def _learnt(
    scored: Scored, location: Path, learnt: LearntImages | None, bootstrap: Bootstrap
) -> dict[str, Any] | None:
    """Say which images the model learnt from, and measure it without them."""
    if learnt is None:
        return None
    known = learnt_from(scored.samples, learnt)
    names = [
        relative_name(s.path, location)
        for s, is_known in zip(scored.samples, known, strict=True)
        if is_known
    ]
    rest = [index for index, is_known in enumerate(known) if not is_known]
    without = None
    if names and len({scored.samples[index].positive for index in rest}) == 2:
        samples = [scored.samples[index] for index in rest]
        found = evaluate_scored(
            Scored(samples=samples, judgement=scored.judgement, logits=scored.logits[rest]),
            bootstrap,
        )
        kept = ("positives", "negatives", *FIGURES, "intervals", "too_few")
        without = {name: found[name] for name in kept}
    return {"images": len(names), "names": names[:_NAMED], "without": without}
