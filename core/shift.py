"""Shift report: how one model's answers differ from another's on the same images."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lungwatch.contract import LABELS

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_Vector = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Flip:
    """How many images went from one label to another."""

    before: str
    after: str
    images: int


@dataclass(frozen=True, kw_only=True)
class Shift:
    """The second model (B) beside the first (A).

    Attributes
    ----------
    images
        That both have scored.
    agreement
        Share with the same label, 0..1.
    kappa
        Cohen's, over the three labels; None where both models give one label only.
    mean, quantiles
        Of B's probability less A's; the quantiles by their rank (`QUANTILES`).
    flips
        Each change of label, the most frequent first.
    positive_rate
        Share with a probability at or above A's threshold, by A.
    threshold_same_rate
        B's threshold that calls as many of these images positive.
    sensitivity
        A's at its threshold; None without known truth.
    threshold_same_sensitivity
        The highest threshold of B at which it finds at least as many of the COVID cases.
    covid_cases
        Images that are known to be COVID.
    """

    images: int
    agreement: float
    kappa: float | None
    mean: float
    quantiles: dict[str, float]
    flips: tuple[Flip, ...]
    positive_rate: float
    threshold_same_rate: float | None
    sensitivity: float | None = None
    threshold_same_sensitivity: float | None = None
    covid_cases: int = 0

    @property
    def flipped(self) -> float:
        """Share of the images whose label is another, 0..1."""
        return 1.0 - self.agreement


def measure_shift(
    *,
    labels_a: Sequence[str],
    labels_b: Sequence[str],
    probabilities_a: ArrayLike,
    probabilities_b: ArrayLike,
    thresholds_a: ArrayLike,
    covid: ArrayLike | None = None,
) -> Shift:
    """Compare two models' answers.

    Parameters
    ----------
    labels_a, labels_b
        Of N images, N at least 1, in one order.
    probabilities_a, probabilities_b, thresholds_a
        0..1, shape (N,): calibrated, and the threshold that A's label was given by.
    covid
        Boolean, shape (N,): which are known to be COVID; None where nothing is known.

    Source: Cohen 1960.
    """
    a = np.asarray(probabilities_a, dtype=np.float64).ravel()
    b = np.asarray(probabilities_b, dtype=np.float64).ravel()
    positive = a >= np.asarray(thresholds_a, dtype=np.float64).ravel()
    pairs = Counter(zip(labels_a, labels_b, strict=True))
    agreement = sum(n for (one, other), n in pairs.items() if one == other) / len(a)
    difference = b - a
    known = None if covid is None else np.asarray(covid, dtype=bool).ravel()
    has_truth = known is not None and bool(known.any())
    return Shift(
        images=len(a),
        agreement=agreement,
        kappa=_kappa(labels_a, labels_b, agreement),
        mean=float(difference.mean()),
        quantiles={
            f"{rank:g}": float(value)
            for rank, value in zip(QUANTILES, np.quantile(difference, QUANTILES), strict=True)
        },
        flips=tuple(
            Flip(before=one, after=other, images=n)
            for (one, other), n in pairs.most_common()
            if one != other
        ),
        positive_rate=float(positive.mean()),
        threshold_same_rate=_threshold(b, int(positive.sum())),
        sensitivity=float(positive[known].mean()) if has_truth else None,
        threshold_same_sensitivity=(
            _threshold(b[known], int(positive[known].sum())) if has_truth else None
        ),
        covid_cases=int(known.sum()) if known is not None else 0,
    )


def _kappa(labels_a: Sequence[str], labels_b: Sequence[str], agreement: float) -> float | None:
    count = len(labels_a)
    by_a, by_b = Counter(labels_a), Counter(labels_b)
    chance = sum(by_a[label] * by_b[label] for label in LABELS) / count**2
    return None if chance >= 1.0 else (agreement - chance) / (1.0 - chance)


def _threshold(probabilities: _Vector, count: int) -> float | None:
    """Return the highest threshold at which `count` probabilities are at or above it.

    Equal probabilities go together: there may be more. None for a count of 0, which any
    threshold above the largest gives.
    """
    return float(np.sort(probabilities)[::-1][count - 1]) if count else None
