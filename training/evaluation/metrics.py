"""Metrics of a binary score with confidence intervals.

ROC and precision-recall, calibration error, bootstrap, DeLong's test.

NumPy only: `lungwatch calibrate` and `lungwatch evaluate` of a bundle run in the base install,
and no library measures many weighted resamples at once.

A resample is a vector of how often each case was drawn, so that a thousand of them are one
matrix, and every metric is a product or a cumulative sum of it. Images of one patient resemble
each other, so where patients are known it is patients that are drawn, with all their images
(Field & Welsh 2007, the cluster bootstrap).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

FIGURES = ("accuracy", "sensitivity", "specificity", "f1", "roc_auc", "pr_auc", "ece", "brier")
# Without cases of one class these are undefined: NaN here, null in files.
_NEEDS_POSITIVES = frozenset({"sensitivity", "f1", "roc_auc", "pr_auc"})
_NEEDS_NEGATIVES = frozenset({"specificity", "f1", "roc_auc", "pr_auc"})
FEWEST = 10
"""Patients (images, where patients are unknown) of a class below which an interval is marked."""
Patients = NDArray[np.intp]
_Array = NDArray[np.float64]
# Bounds the memory of a block of resamples to some tens of megabytes.
_BLOCK_CELLS = 2_000_000
_ECE_BINS = 10


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Metrics of a classifier on one set, COVID being positive.

    Attributes
    ----------
    positives, negatives
        Images of either class.
    roc_auc, pr_auc
        Areas under the ROC curve and the precision-recall curve (average precision).
    accuracy, sensitivity, specificity, f1
        At the decision threshold, abstention ignored.
    ece, brier
        Expected calibration error (ten bins of equal width; Naeini et al. 2015, for the
        probability of the positive class) and mean squared error of the probability.
    tp, fp, tn, fn
        The confusion matrix at the threshold.
    """

    positives: int
    negatives: int
    roc_auc: float
    pr_auc: float
    accuracy: float
    sensitivity: float
    specificity: float
    f1: float
    ece: float
    brier: float
    tp: int
    fp: int
    tn: int
    fn: int

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, rounded to the sixth decimal; None for what is undefined."""
        return {
            name: value
            if isinstance(value, int)
            else None
            if math.isnan(value)
            else round(value, 6)
            for name, value in asdict(self).items()
        }


@dataclass(frozen=True, kw_only=True)
class Bootstrap:
    """Number of resamples, 0 for no intervals, and the seed that draws them."""

    resamples: int = 1000
    seed: int = 1


@dataclass(frozen=True, kw_only=True)
class DeLong:
    """Paired comparison of two areas under the ROC curve.

    Attributes
    ----------
    roc_auc, other
        The two areas.
    difference, low, high
        First minus second, and its 95 % interval.
    standard_error
        Of the difference.
    z, p_value
        Of the difference against 0, two-sided; z is None where the standard error is 0.
    """

    roc_auc: float
    other: float
    difference: float
    low: float
    high: float
    standard_error: float
    z: float | None
    p_value: float


def figures(targets: ArrayLike, probabilities: ArrayLike, threshold: float) -> Figures:
    """Measure probabilities in 0..1, shape (N,), against targets of 0 and 1, shape (N,)."""
    y, p = _vector(targets), _vector(probabilities)
    said, true = p >= threshold, y > 0.5
    found = weighted_figures(y, p, threshold, np.ones((1, len(y))))
    return Figures(
        positives=int(true.sum()),
        negatives=int((~true).sum()),
        tp=int((said & true).sum()),
        fp=int((said & ~true).sum()),
        tn=int((~said & ~true).sum()),
        fn=int((~said & true).sum()),
        **{name: float(values[0]) for name, values in found.items()},
    )


def roc_curve(targets: ArrayLike, scores: ArrayLike) -> tuple[_Array, _Array, _Array]:
    """Return false-positive rates, true-positive rates and thresholds, scores descending.

    One point for each distinct score, beginning with (0, 0) at an infinite threshold.
    """
    y, s = _vector(targets), _vector(scores)
    order = np.argsort(-s, kind="stable")
    y, s = y[order], s[order]
    last_of_score = np.append(np.flatnonzero(np.diff(s)), len(s) - 1)
    tp = np.cumsum(y)[last_of_score]
    fp = last_of_score + 1 - tp
    tpr = np.concatenate([[0.0], tp / y.sum()])
    fpr = np.concatenate([[0.0], fp / (len(y) - y.sum())])
    return fpr, tpr, np.concatenate([[np.inf], s[last_of_score]])


def roc_auc(targets: ArrayLike, scores: ArrayLike) -> float:
    """Probability that a positive scores above a negative, ties counting one half."""
    y = _vector(targets)
    return float(weighted_areas(y, scores, np.ones((1, len(y))))[0][0])


def log_loss(targets: ArrayLike, logits: ArrayLike) -> float:
    """Mean binary cross-entropy of logits, in nats; exact for large ones."""
    y, z = _vector(targets), _vector(logits)
    return float(np.mean(np.logaddexp(0.0, z) - y * z))


def sigmoid(logits: ArrayLike) -> _Array:
    """Logistic function, float64, without overflow."""
    return np.asarray(np.exp(-np.logaddexp(0.0, -_vector(logits))))


def uncomputable(positives: int, negatives: int) -> list[str]:
    """Name the metrics that are undefined with so many cases of either class."""
    missing = (_NEEDS_POSITIVES if not positives else frozenset()) | (
        _NEEDS_NEGATIVES if not negatives else frozenset()
    )
    return [name for name in FIGURES if name in missing]


def too_few(targets: ArrayLike, patients: Patients | None = None) -> list[str]:
    """Name the metrics that rest on fewer than `FEWEST` patients of a class.

    Parameters
    ----------
    targets
        0 and 1, shape (N,).
    patients
        A number for each image's patient, shape (N,); None counts images.
    """
    y = _vector(targets) > 0.5
    units = np.arange(len(y)) if patients is None else patients
    enough = [len(np.unique(units[kind])) >= FEWEST for kind in (y, ~y)]
    if len(np.unique(units)) < FEWEST:
        return list(FIGURES)
    return uncomputable(*enough)


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
    bins = np.minimum((p * _ECE_BINS).astype(np.intp), _ECE_BINS - 1)
    gaps = weights @ (np.eye(_ECE_BINS)[bins] * (p - y)[:, np.newaxis])
    roc_auc, pr_auc = weighted_areas(y, p, weights)
    found = {
        "accuracy": (tp + negatives - fp) / total,
        "sensitivity": _ratio(tp, positives),
        "specificity": _ratio(negatives - fp, negatives),
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
    # A trapezium's mean height is its right side minus half of what is new in it.
    roc_auc = np.sum(new_fpr * (tpr - new_tpr / 2), axis=1)
    precision = np.divide(tp, called, out=np.zeros_like(tp), where=called > 0)
    return roc_auc, np.sum(new_tpr * precision, axis=1)


def resample(
    targets: ArrayLike,
    measure: Callable[[_Array], dict[str, _Array]],
    bootstrap: Bootstrap,
    patients: Patients | None = None,
) -> dict[str, _Array]:
    """Draw stratified resamples and measure them.

    Each has as many cases of either class as there are; of patients, as many with and without
    a positive image as there are.

    Parameters
    ----------
    targets
        0 and 1, shape (N,).
    measure
        From weights, shape (B, N), to named metrics, each (B,).
    bootstrap
        How many, and the seed.
    patients
        A number for each image's patient, shape (N,); None draws images.

    Returns
    -------
    dict
        The named metrics, each (resamples,).
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
    """Return the 95 % percentile interval of each metric; None where it is undefined.

    {} without resamples.
    """
    if not bootstrap.resamples:
        return {}
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
    """Return the 95 % percentile interval of the area under the ROC curve; None without any."""
    if not bootstrap.resamples:
        return None
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
    """Return the 95 % intervals of the first system's metrics minus the second's.

    Both are measured on the same resamples, which is what makes the comparison paired.

    Parameters
    ----------
    targets
        0 and 1, shape (N,).
    systems
        Two pairs of probabilities, shape (N,), and threshold.
    bootstrap, patients
        See `resample`.

    Returns
    -------
    dict
        {} without resamples.
    """
    if not bootstrap.resamples:
        return {}

    def measure(weights: _Array) -> dict[str, _Array]:
        first, second = (weighted_figures(targets, p, t, weights) for p, t in systems)
        return {name: first[name] - second[name] for name in FIGURES}

    return {
        name: interval(values)
        for name, values in resample(targets, measure, bootstrap, patients).items()
    }


def mean_interval(
    values: ArrayLike, rng: np.random.Generator, resamples: int
) -> list[float] | None:
    """Return the 95 % percentile interval of the mean of values, (N,), N at least 1."""
    known = _vector(values)
    draws = rng.integers(0, len(known), (resamples, len(known)))
    return interval(known[draws].mean(axis=1))


def interval(values: _Array) -> list[float] | None:
    """Return the 2.5th and 97.5th percentile, rounded to six decimals; None if any is NaN."""
    if np.isnan(values).any():
        return None
    low, high = np.percentile(values, (2.5, 97.5))
    return [round(float(low), 6), round(float(high), 6)]


def delong_test(targets: ArrayLike, scores: ArrayLike, other: ArrayLike) -> DeLong:
    """Compare the areas under the ROC curve of two scores of the same cases.

    Parameters
    ----------
    targets
        0 and 1, shape (N,); at least two of either.
    scores, other
        Shape (N,); a higher score means 1.

    Source: DeLong, DeLong & Clarke-Pearson 1988, in the O(N log N) form of Sun & Xu 2014.
    """
    areas, covariance = delong_covariance(targets, np.stack([_vector(scores), _vector(other)]))
    difference = float(areas[0] - areas[1])
    variance = float(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1])
    error = math.sqrt(max(variance, 0.0))
    reach = NormalDist().inv_cdf(0.975) * error
    # Rounding leaves a trace of variance where two scores order all cases alike.
    z = difference / error if error > 1e-9 else None
    certain = 1.0 if abs(difference) < 1e-12 else 0.0
    return DeLong(
        roc_auc=float(areas[0]),
        other=float(areas[1]),
        difference=difference,
        low=difference - reach,
        high=difference + reach,
        standard_error=error,
        z=z,
        p_value=certain if z is None else math.erfc(abs(z) / math.sqrt(2)),
    )


def delong_covariance(targets: ArrayLike, scores: _Array) -> tuple[_Array, _Array]:
    """Areas of several scores, (K,), and their covariance, (K, K); scores are (K, N).

    Raises
    ------
    ValueError
        If there are fewer than two cases of a class.
    """
    positive = _vector(targets) > 0.5
    m, n = int(positive.sum()), int((~positive).sum())
    if min(m, n) < 2:
        raise ValueError(f"{m} positive and {n} negative cases: two of either are needed")
    above, below = [], []
    for row in scores:
        joint = midranks(np.concatenate([row[positive], row[~positive]]))
        # How many of the other class each case outranks, ties counting one half.
        above.append((joint[:m] - midranks(row[positive])) / n)
        below.append(1 - (joint[m:] - midranks(row[~positive])) / m)
    v10, v01 = np.stack(above), np.stack(below)
    covariance = np.atleast_2d(np.cov(v10)) / m + np.atleast_2d(np.cov(v01)) / n
    return v10.mean(axis=1), covariance


def midranks(values: _Array) -> _Array:
    """Ranks from 1, equal values sharing the mean of theirs."""
    _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return np.asarray((ends - (counts - 1) / 2)[group], dtype=np.float64)


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
