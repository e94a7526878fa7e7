"""How far the figures of merit would move with other cases of the same kind.

A resample is a vector of how often each case was drawn, so that a thousand of them are one
matrix, and every figure of merit is a product or a cumulative sum of it. Images of one patient
resemble each other, so where patients are known it is patients that are drawn, with all their
images (Field & Welsh 2007, the cluster bootstrap).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

FIGURES = (
    "accuracy",
    "sensitivity",
    "specificity",
    "f1",
    "roc_auc",
    "pr_auc",
    "ece",
    "brier",
)
# Without cases of one class these have no meaning; NaN here, null in files.
NEEDS_POSITIVES = frozenset({"sensitivity", "f1", "roc_auc", "pr_auc"})
NEEDS_NEGATIVES = frozenset({"specificity", "f1", "roc_auc", "pr_auc"})

# Percentiles of fewer patients (images, where patients are unknown) of a class say little: an
# interval is given all the same, and marked.
FEWEST = 10

_Array = NDArray[np.float64]
Patients = NDArray[np.intp]
# Bounds the memory of a block of resamples to some tens of megabytes.
_BLOCK_CELLS = 2_000_000
_ECE_BINS = 10


@dataclass(frozen=True, kw_only=True)
class Bootstrap:
    """How resampling is done.

    Attributes
    ----------
    resamples
        How many; 0 switches the intervals off.
    seed
        The same seed draws the same resamples.
    """

    resamples: int = 1000
    seed: int = 1


def uncomputable(positives: int, negatives: int) -> list[str]:
    """Name the figures that have no meaning with so many cases of either class."""
    missing = set() if positives else set(NEEDS_POSITIVES)
    missing |= set() if negatives else set(NEEDS_NEGATIVES)
    return [name for name in FIGURES if name in missing]


def too_few(targets: ArrayLike, patients: Patients | None = None) -> list[str]:
    """Name the figures behind which fewer than `FEWEST` patients of a class stand.

    Parameters
    ----------
    targets
        0 and 1, shape (N,).
    patients
        A number for each image's patient, shape (N,); None counts images.
    """
    y = _vector(targets) > 0.5
    units = np.arange(len(y)) if patients is None else patients
    positives, negatives, both = (len(np.unique(units[kind])) for kind in (y, ~y, y | ~y))
    few = set() if positives >= FEWEST else set(NEEDS_POSITIVES)
    few |= set() if negatives >= FEWEST else set(NEEDS_NEGATIVES)
    few |= set() if both >= FEWEST else set(FIGURES)
    return [name for name in FIGURES if name in few]


def weighted_figures(
    targets: ArrayLike, probabilities: ArrayLike, threshold: float, weights: _Array
) -> dict[str, _Array]:
    """Measure many resamples at once.

    Parameters
    ----------
    targets
        0 and 1, shape (N,).
    probabilities
        0..1, shape (N,).
    threshold
        Probability from which a case is called positive.
    weights
        How often each case occurs in each resample, shape (B, N).

    Returns
    -------
    dict
        `FIGURES`, float64, shape (B,); NaN where a class is missing.
    """
    y, p = _vector(targets), _vector(probabilities)
    said = p >= threshold
    positives, total = weights @ y, weights.sum(axis=1)
    negatives = total - positives
    tp, fp = weights @ (said * y), weights @ (said * (1 - y))
    tn = negatives - fp
    bins = np.minimum((p * _ECE_BINS).astype(np.intp), _ECE_BINS - 1)
    gaps = weights @ (np.eye(_ECE_BINS)[bins] * (p - y)[:, np.newaxis])
    roc_auc, pr_auc = weighted_areas(y, p, weights)
    found = {
        "accuracy": (tp + tn) / total,
        "sensitivity": _ratio(tp, positives),
        "specificity": _ratio(tn, negatives),
        "f1": _ratio(2 * tp, tp + fp + positives),
        "roc_auc": roc_auc,
        "pr_auc": pr_auc,
        "ece": np.abs(gaps).sum(axis=1) / total,
        "brier": weights @ (p - y) ** 2 / total,
    }
    for name in uncomputable(int(y.sum()), int(len(y) - y.sum())):
        found[name] = np.full(len(weights), np.nan)
    return found


def weighted_areas(targets: ArrayLike, scores: ArrayLike, weights: _Array) -> tuple[_Array, _Array]:
    """Areas under the ROC and the precision-recall curve of many resamples, each (B,)."""
    y, s = _vector(targets), _vector(scores)
    order = np.argsort(-s, kind="stable")
    # Cases of equal score are one point of the curve.
    last = np.append(np.flatnonzero(np.diff(s[order])), len(s) - 1)
    drawn = weights[:, order]
    tp = np.cumsum(drawn * y[order], axis=1)[:, last]
    called = np.cumsum(drawn, axis=1)[:, last]
    fp = called - tp
    tpr, fpr = _ratio(tp, tp[:, -1:]), _ratio(fp, fp[:, -1:])
    new_tpr, new_fpr = np.diff(tpr, prepend=0.0), np.diff(fpr, prepend=0.0)
    # A trapezium's mean height is its right side less half of what is new in it.
    roc_auc = np.sum(new_fpr * (tpr - new_tpr / 2), axis=1)
    precision = np.divide(tp, called, out=np.zeros_like(tp), where=called > 0)
    return roc_auc, np.sum(new_tpr * precision, axis=1)


def resample(
    targets: ArrayLike,
    measure: Callable[[_Array], dict[str, _Array]],
    bootstrap: Bootstrap,
    patients: Patients | None = None,
) -> dict[str, _Array]:
    """Draw resamples with as many cases of either class as there are, and measure them.

    Of patients, as many with and without a positive image as there are.

    Parameters
    ----------
    targets
        0 and 1, shape (N,).
    measure
        From weights, shape (B, N), to named figures, each (B,).
    bootstrap
        How many, and the seed.
    patients
        A number for each image's patient, shape (N,); None draws images.

    Returns
    -------
    dict
        The named figures, each (resamples,).
    """
    y = _vector(targets)
    rng = np.random.default_rng(bootstrap.seed)
    units = np.unique(patients, return_inverse=True)[1] if patients is not None else None
    drawn = y > 0.5 if units is None else np.bincount(units, weights=y) > 0
    strata = [np.flatnonzero(drawn), np.flatnonzero(~drawn)]
    block = max(1, _BLOCK_CELLS // max(1, len(y)))
    parts = []
    for start in range(0, bootstrap.resamples, block):
        size = min(block, bootstrap.resamples - start)
        weights = np.zeros((size, len(drawn)))
        for stratum in strata:
            weights[:, stratum] = _draw(rng, size, len(stratum))
        parts.append(measure(weights if units is None else weights[:, units]))
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def intervals(
    targets: ArrayLike,
    probabilities: ArrayLike,
    threshold: float,
    bootstrap: Bootstrap,
    patients: Patients | None = None,
) -> dict[str, list[float] | None]:
    """Return the 95 % percentile interval of each figure; None where it has no meaning."""
    found = resample(
        targets,
        lambda w: weighted_figures(targets, probabilities, threshold, w),
        bootstrap,
        patients,
    )
    return {name: interval(values) for name, values in found.items()}


def area_interval(
    targets: ArrayLike,
    scores: ArrayLike,
    bootstrap: Bootstrap,
    patients: Patients | None = None,
) -> list[float] | None:
    """Return the 95 % percentile interval of the area under the ROC curve."""
    found = resample(
        targets, lambda w: {"roc_auc": weighted_areas(targets, scores, w)[0]}, bootstrap, patients
    )
    return interval(found["roc_auc"])


def paired_differences(
    targets: ArrayLike,
    systems: Sequence[tuple[ArrayLike, float]],
    bootstrap: Bootstrap,
    patients: Patients | None = None,
) -> dict[str, list[float] | None]:
    """Return the 95 % intervals of the first system's figures less the second's.

    Both are measured on the same resamples, which is what makes the comparison paired.

    Parameters
    ----------
    targets
        0 and 1, shape (N,).
    systems
        Two pairs of probabilities, shape (N,), and threshold.
    bootstrap
        How many resamples, and the seed.
    patients
        A number for each image's patient, shape (N,); None draws images.
    """
    (p, t), (other_p, other_t) = systems

    def measure(weights: _Array) -> dict[str, _Array]:
        first = weighted_figures(targets, p, t, weights)
        second = weighted_figures(targets, other_p, other_t, weights)
        return {name: first[name] - second[name] for name in FIGURES}

    return {
        name: interval(values)
        for name, values in resample(targets, measure, bootstrap, patients).items()
    }


def interval(values: _Array) -> list[float] | None:
    """Return the 2.5th and 97.5th percentile, rounded to six decimals; None if any is NaN."""
    if np.isnan(values).any():
        return None
    low, high = np.percentile(values, (2.5, 97.5))
    return [round(float(low), 6), round(float(high), 6)]


def _draw(rng: np.random.Generator, resamples: int, cases: int) -> _Array:
    if not cases:
        return np.zeros((resamples, 0))
    drawn = rng.integers(0, cases, (resamples, cases)) + cases * np.arange(resamples)[:, np.newaxis]
    counts = np.bincount(drawn.ravel(), minlength=resamples * cases)
    return np.asarray(counts.reshape(resamples, cases), dtype=np.float64)


def _ratio(part: _Array, whole: _Array) -> _Array:
    whole = np.broadcast_to(whole, part.shape)
    found = np.full(part.shape, np.nan)
    np.divide(part, whole, out=found, where=whole > 0)
    return found


def _vector(values: ArrayLike) -> _Array:
    return np.asarray(values, dtype=np.float64).ravel()
