"""Two-sample tests: whether a window of results is drawn as a reference was, by numpy alone."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

LEAST = 20
"""Values on either side below which nothing is tested."""
MOST_CATEGORIES = 20
"""Categories of one tag that are told apart; the rarest are counted together."""
OTHER = "(other)"
KEPT_VALUES = 500
"""Values that a stored distribution is reduced to."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Distribution:
    """Values of one figure.

    Attributes
    ----------
    count
        How many values there were.
    values
        float64, ascending: all of them, or quantiles at even levels.
    """

    count: int
    values: NDArray[np.float64]

    @classmethod
    def of(cls, values: Sequence[float]) -> "Distribution":
        """Sort values; all are kept."""
        return cls(count=len(values), values=np.sort(np.asarray(values, dtype=np.float64)))

    def reduced(self) -> "Distribution":
        """Return at most `KEPT_VALUES` quantiles, which move no test by more than 0.002."""
        if len(self.values) <= KEPT_VALUES:
            return self
        levels = (np.arange(KEPT_VALUES) + 0.5) / KEPT_VALUES
        return Distribution(count=self.count, values=np.quantile(self.values, levels))


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One test's answer.

    Attributes
    ----------
    statistic
        0..1. Of values: the largest distance of the two distribution functions; of a tag: the
        largest difference of a category's share.
    p
        Probability of an answer at least as far off without any shift, 0..1; upper bound.
    reference_count, window_count
        How many values each side has.
    told
        What differs, for people: medians, or the category with its shares.
    """

    statistic: float
    p: float
    reference_count: int
    window_count: int
    told: str


def compare_values(window: Distribution, reference: Distribution) -> Difference | None:
    """Compare two distributions by the two-sample Kolmogorov-Smirnov test; None for too few.

    Source: limiting distribution (Smirnov 1948), without a correction for small samples: for the
    sizes used here it is never below the exact p, where Stephens' correction falls below it by up
    to a third. Ties make it more careful still.
    """
    if min(window.count, reference.count) < LEAST:
        return None
    at = np.concatenate([window.values, reference.values])
    a, b = (
        np.searchsorted(one.values, at, side="right") / len(one.values)
        for one in (window, reference)
    )
    distance = float(np.abs(a - b).max())
    root = math.sqrt(window.count * reference.count / (window.count + reference.count))
    return Difference(
        statistic=distance,
        p=_kolmogorov_tail(root * distance),
        reference_count=reference.count,
        window_count=window.count,
        told=f"median {_median(reference):.3g} -> {_median(window):.3g}",
    )


def compare_tags(window: Mapping[str, int], reference: Mapping[str, int]) -> Difference | None:
    """Compare the counts of a tag's values, category by category; None for too few.

    Each category by Fisher's exact test (Fisher 1935; the smaller tail twice), the smallest p
    times the number of categories (Bonferroni). Exact for any count, a category that one side
    lacks included; the categories are chosen by both sides together, so that the choice does not
    depend on what is tested.
    """
    n, m = sum(window.values()), sum(reference.values())
    if min(n, m) < LEAST:
        return None
    window, reference = _told_apart(window, reference)
    names = sorted({*window, *reference})
    if len(names) < 2:
        return Difference(
            statistic=0.0, p=1.0, reference_count=m, window_count=n, told=f"{_name(names[0])} only"
        )
    logs = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + m + 1)))])
    found = [
        (_fisher(window.get(name, 0), n, reference.get(name, 0), m, logs), name) for name in names
    ]
    p, worst = min(found, key=lambda pair: (pair[0], -_gap(pair[1], window, n, reference, m)))
    before, after = reference.get(worst, 0) / m, window.get(worst, 0) / n
    return Difference(
        statistic=abs(after - before),
        p=min(1.0, p * len(names)),
        reference_count=m,
        window_count=n,
        told=f"{_name(worst)} {before:.0%} -> {after:.0%}",
    )


def alarms(p_values: Sequence[float], rate: float) -> list[bool]:
    """Return which of several tests alarm, so that any does so wrongly at most at `rate`.

    Holm's step-down procedure (Holm 1979), for tests that depend on each other in any way.
    """
    answers = [False] * len(p_values)
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        if p_values[index] > rate / (len(p_values) - rank):
            break
        answers[index] = True
    return answers


def _kolmogorov_tail(x: float) -> float:
    """Return P(K > x) of the Kolmogorov distribution."""
    if x < 0.3:  # 1 but for 1e-5; the sum alternates too slowly there
        return 1.0
    terms = [2.0 * (-1.0) ** (k - 1) * math.exp(-2.0 * k * k * x * x) for k in range(1, 101)]
    return min(1.0, max(0.0, math.fsum(terms)))


def _fisher(a: int, n: int, b: int, m: int, logs: NDArray[np.float64]) -> float:
    """Return twice the smaller tail of the hypergeometric distribution of `a`, at most 1."""
    of_category = a + b
    counts = np.arange(max(0, of_category - m), min(n, of_category) + 1)
    log_p = (
        _log_choose(of_category, counts, logs)
        + _log_choose(n + m - of_category, n - counts, logs)
        - _log_choose(n + m, np.array(n), logs)
    )
    p = np.exp(log_p)
    return min(1.0, 2.0 * min(float(p[counts <= a].sum()), float(p[counts >= a].sum())))


def _log_choose(n: int, k: NDArray[np.int_], logs: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(logs[n] - logs[k] - logs[n - k])


def _told_apart(
    window: Mapping[str, int], reference: Mapping[str, int]
) -> tuple[Mapping[str, int], Mapping[str, int]]:
    together = {
        name: window.get(name, 0) + reference.get(name, 0) for name in {*window, *reference}
    }
    if len(together) <= MOST_CATEGORIES:
        return window, reference
    kept = sorted(together, key=lambda name: (-together[name], name))[: MOST_CATEGORIES - 1]
    return _pooled(window, kept), _pooled(reference, kept)


def _pooled(counts: Mapping[str, int], kept: Sequence[str]) -> Mapping[str, int]:
    rest = sum(count for name, count in counts.items() if name not in kept)
    return {**{name: counts[name] for name in kept if name in counts}, OTHER: rest}


def _gap(
    name: str, window: Mapping[str, int], n: int, reference: Mapping[str, int], m: int
) -> float:
    return abs(window.get(name, 0) / n - reference.get(name, 0) / m)


def _name(category: str) -> str:
    return category or "(none)"


def _median(distribution: Distribution) -> float:
    return float(np.median(distribution.values))
