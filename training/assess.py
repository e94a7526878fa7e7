"""All that is said of a model on a data set: figures, intervals, sources, comparison."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lungwatch.errors import DatasetError, ModelError
from lungwatch.training.aim import Aim, choose_threshold
from lungwatch.training.bootstrap import (
    FIGURES,
    Bootstrap,
    Patients,
    area_interval,
    intervals,
    paired_differences,
    too_few,
    uncomputable,
    weighted_figures,
)
from lungwatch.training.data_record import LearntImages, learnt_from
from lungwatch.training.dataset import dataset_name, load_dataset, of_split, select
from lungwatch.training.delong import delong_test
from lungwatch.training.evaluate import probes, summarise
from lungwatch.training.groups import patient_numbers
from lungwatch.training.label_map import LabelMap
from lungwatch.training.metrics import sigmoid
from lungwatch.training.pixels import FloatArray, read_pixels, targets
from lungwatch.training.samples import Sample, Split
from lungwatch.training.score_cache import ScoreCache
from lungwatch.training.scorers import Judgement, Scorer

Progress = Callable[[int], None]
_UNKNOWN = "unknown"


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
        return sigmoid(self.calibrated)

    @property
    def called(self) -> NDArray[np.bool_]:
        """Whether the probability reaches the threshold, (N,); abstention ignored."""
        return self.probabilities >= self.judgement.decision.threshold


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
    """Read images and ask a model, or take what it said of these very files before.

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
    aim: Aim,
    location: Path,
    split: Split | None,
    *,
    tested: Sequence[Sample],
    labels: LabelMap | None = None,
    learnt: LearntImages | None = None,
    progress: Progress | None = None,
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
    samples = select(load_dataset(location, labels), split, dataset_name(location))
    shared = {s.path.resolve() for s in samples} & {s.path.resolve() for s in tested}
    if shared:
        raise DatasetError(
            f"{location}: {len(shared)} of the images that choose the threshold are among those "
            f"to be evaluated ({min(shared)}); choose it on another split"
        )
    scored = score(scorer, samples, progress=progress, cache=cache)
    decision = choose_threshold(scored.targets, scored.calibrated, aim)
    judgement = replace(scorer.judgement, decision=decision)
    reached = summarise(judgement, samples, scored.logits)
    return judgement, {
        "aim": str(aim),
        "data": dataset_name(location),
        "split": split or "all",
        "threshold": decision.threshold,
        "sensitivity": reached["sensitivity"],
        "specificity": reached["specificity"],
        "images": len(samples),
        "learnt_from": None if learnt is None else sum(learnt_from(samples, learnt)),
    }


def assess(scored: Scored, bootstrap: Bootstrap) -> dict[str, Any]:
    """Measure answers: what `summarise` gives, with intervals and by source.

    Returns
    -------
    dict
        The fields of `summarise`, and `intervals` (95 %, by figure), `probe_intervals` (by
        probe), `sources` (by source; a figure that has no meaning there is None), `patients`
        (how many of either class; None if they are unknown), `bootstrap` (over patients where
        they are known) and what has `too_few` of them (`lungwatch.training.bootstrap.FEWEST`).
        Without resamples, no intervals.
    """
    threshold = scored.judgement.decision.threshold
    patients = patient_numbers(scored.samples)
    compared = probes(scored.samples)
    found = {
        **summarise(scored.judgement, scored.samples, scored.logits),
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
    mine = summarise(scored.judgement, scored.samples, scored.logits)
    its = summarise(other.judgement, other.samples, other.logits)
    enough = min(mine["positives"], mine["negatives"]) >= 2
    systems = [(s.probabilities, s.judgement.decision.threshold) for s in (scored, other)]
    return {
        "model": other.judgement.name,
        "threshold": other.judgement.decision.threshold,
        "figures": {name: its[name] for name in (*FIGURES, "tp", "fp", "tn", "fn")},
        "delong": (
            delong_test(scored.targets, scored.logits, other.logits).to_dict() if enough else None
        ),
        "differences": {name: round(mine[name] - its[name], 6) for name in FIGURES},
        "intervals": (
            paired_differences(scored.targets, systems, bootstrap, patient_numbers(scored.samples))
            if bootstrap.resamples
            else {}
        ),
    }


def rows(scored: Scored, location: Path, other: Scored | None = None) -> list[dict[str, Any]]:
    """List what was answered for each image, with paths relative to the data set."""
    root = location if location.is_dir() else location.parent
    answers = scored.probabilities
    others = other.probabilities if other else None
    decision = scored.judgement.decision
    listed = []
    for index, sample in enumerate(scored.samples):
        path = sample.path
        inside = path.relative_to(root) if path.is_relative_to(root) else path
        row = {
            "path": inside.as_posix(),
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
        "intervals": (
            intervals(y, p, threshold, bootstrap, patients) if bootstrap.resamples else {}
        ),
    }


def _count(truth: FloatArray, patients: Patients) -> dict[str, int]:
    positive = truth > 0.5
    kinds = {"positives": positive, "negatives": ~positive}
    return {name: len(np.unique(patients[kind])) for name, kind in kinds.items()}


def _of(patients: Patients | None, chosen: Sequence[int]) -> Patients | None:
    return None if patients is None else patients[list(chosen)]
