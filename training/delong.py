"""Whether two scores of the same cases differ in the area under their ROC curves."""

import math
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

_Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class DeLong:
    """A paired comparison of two areas.

    Attributes
    ----------
    roc_auc, other
        The two areas.
    difference, low, high
        First less second, and its 95 % interval.
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

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


def delong_test(targets: ArrayLike, scores: ArrayLike, other: ArrayLike) -> DeLong:
    """Compare two scores of the same cases.

    Parameters
    ----------
    targets
        0 and 1, shape (N,); at least two of either.
    scores, other
        Shape (N,); higher speaks for 1.

    Source: DeLong, DeLong & Clarke-Pearson 1988, in the O(N log N) form of Sun & Xu 2014.
    """
    areas, covariance = delong_covariance(targets, np.stack([_vector(scores), _vector(other)]))
    difference = float(areas[0] - areas[1])
    variance = float(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1])
    error = math.sqrt(max(variance, 0.0))
    reach = NormalDist().inv_cdf(0.975) * error
    # Rounding leaves a hair of variance where two scores order all cases alike.
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


def _vector(values: ArrayLike) -> _Array:
    return np.asarray(values, dtype=np.float64).ravel()
