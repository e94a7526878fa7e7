"""Figures of merit of a binary score, from logits or probabilities; NumPy only."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

_Vector = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Figures:
    """A classifier on one set, COVID being positive.

    Attributes
    ----------
    positives, negatives
        Images of either kind.
    roc_auc, pr_auc
        Areas under the ROC curve and the precision-recall curve (average precision).
    accuracy, sensitivity, specificity, f1
        At the decision threshold, abstention ignored.
    ece, brier
        Expected calibration error (ten bins of equal width) and mean squared error of the
        probability.
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
        """Return plain values, rounded to the sixth decimal."""
        return {k: round(v, 6) if isinstance(v, float) else v for k, v in asdict(self).items()}


def figures(targets: ArrayLike, probabilities: ArrayLike, threshold: float) -> Figures:
    """Measure probabilities in 0..1, shape (N,), against targets of 0 and 1, shape (N,).

    Both classes must occur.
    """
    y, p = _as_vector(targets), _as_vector(probabilities)
    said, true = p >= threshold, y > 0.5
    tp, fp = int(np.sum(said & true)), int(np.sum(said & ~true))
    fn, tn = int(np.sum(~said & true)), int(np.sum(~said & ~true))
    return Figures(
        positives=tp + fn,
        negatives=tn + fp,
        roc_auc=roc_auc(y, p),
        pr_auc=average_precision(y, p),
        accuracy=(tp + tn) / len(y),
        sensitivity=tp / (tp + fn),
        specificity=tn / (tn + fp),
        f1=2 * tp / (2 * tp + fp + fn),
        ece=expected_calibration_error(y, p),
        brier=float(np.mean((p - y) ** 2)),
        tp=tp,
        fp=fp,
        tn=tn,
        fn=fn,
    )


def roc_curve(targets: ArrayLike, scores: ArrayLike) -> tuple[_Vector, _Vector, _Vector]:
    """Return false-positive rates, true-positive rates and thresholds, scores descending.

    One point for each distinct score, beginning with (0, 0) at an infinite threshold.
    """
    y, s = _as_vector(targets), _as_vector(scores)
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
    fpr, tpr, _ = roc_curve(targets, scores)
    return float(np.trapezoid(tpr, fpr))


def average_precision(targets: ArrayLike, scores: ArrayLike) -> float:
    """Mean precision over the recall gained, without interpolation."""
    y = _as_vector(targets)
    fpr, tpr, _ = roc_curve(y, scores)
    tp, fp = tpr[1:] * y.sum(), fpr[1:] * (len(y) - y.sum())
    return float(np.sum(np.diff(tpr) * tp / (tp + fp)))


def expected_calibration_error(
    targets: ArrayLike, probabilities: ArrayLike, bins: int = 10
) -> float:
    """Mean gap between stated and observed frequency over bins of equal width.

    Source: Naeini et al. 2015; for the probability of the positive class.
    """
    y, p = _as_vector(targets), _as_vector(probabilities)
    index = np.minimum((p * bins).astype(np.intp), bins - 1)
    gaps = np.bincount(index, weights=p - y, minlength=bins)
    return float(np.abs(gaps).sum() / len(y))


def log_loss(targets: ArrayLike, logits: ArrayLike) -> float:
    """Mean binary cross-entropy of logits, in nats; exact for large ones."""
    y, z = _as_vector(targets), _as_vector(logits)
    return float(np.mean(np.logaddexp(0.0, z) - y * z))


def sigmoid(logits: ArrayLike) -> _Vector:
    """Logistic function, float64, without overflow."""
    z = _as_vector(logits)
    return np.asarray(np.exp(-np.logaddexp(0.0, -z)))


def _as_vector(values: ArrayLike) -> _Vector:
    return np.asarray(values, dtype=np.float64).ravel()
