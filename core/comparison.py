"""Comparison of results: two-sample tests, drift references, shift between two models."""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lungwatch.contract import LABELS
from lungwatch.errors import ModelError

LEAST_VALUES = 20
"""Fewest values on either side of a test."""
MOST_CATEGORIES = 20
"""Most categories of one tag; the rarest are counted together."""
OTHER_CATEGORIES = "(other)"
NO_CATEGORY = "(none)"
KEPT_VALUES = 500
"""Quantiles that a stored distribution is reduced to."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Distribution:
    """Values of one figure.

    Attributes
    ----------
    count
        Number of values.
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
    """Result of one test.

    Attributes
    ----------
    statistic
        0..1. Of values: the largest distance of the two distribution functions; of a tag: the
        largest difference of a category's share.
    p
        Upper bound of the probability of at least this statistic without any shift, 0..1.
    reference_count, window_count
        Number of values on each side.
    told
        For people: medians, or the category with its shares.
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
    if min(window.count, reference.count) < LEAST_VALUES:
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
        told=f"median {np.median(reference.values):.3g} -> {np.median(window.values):.3g}",
    )


def compare_tags(window: Mapping[str, int], reference: Mapping[str, int]) -> Difference | None:
    """Compare the counts of a tag's values, category by category; None for too few.

    Each category by Fisher's exact test (Fisher 1935; the smaller tail twice), the smallest p
    times the number of categories (Bonferroni). Exact for any count, including 0; the categories
    are chosen by both sides together, so that the choice does not depend on the test.
    """
    n, m = sum(window.values()), sum(reference.values())
    if min(n, m) < LEAST_VALUES:
        return None
    window, reference = _common_categories(window, reference)
    names = sorted({*window, *reference})
    if len(names) < 2:
        return Difference(
            statistic=0.0,
            p=1.0,
            reference_count=m,
            window_count=n,
            told=f"{names[0] or NO_CATEGORY} only",
        )
    logs = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + m + 1)))])
    found = []
    for name in names:
        a, b = window.get(name, 0), reference.get(name, 0)
        found.append((_fisher(a, n, b, m, logs), -abs(a / n - b / m), name))
    p, _, worst = min(found, key=lambda one: one[:2])
    before, after = reference.get(worst, 0) / m, window.get(worst, 0) / n
    return Difference(
        statistic=abs(after - before),
        p=min(1.0, p * len(names)),
        reference_count=m,
        window_count=n,
        told=f"{worst or NO_CATEGORY} {before:.0%} -> {after:.0%}",
    )


def alarms(p_values: Sequence[float], rate: float) -> list[bool]:
    """Return which tests alarm, with a false alarm of any of them at most at `rate`.

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


def _common_categories(
    window: Mapping[str, int], reference: Mapping[str, int]
) -> tuple[Mapping[str, int], Mapping[str, int]]:
    together = Counter(window)
    together.update(reference)
    if len(together) <= MOST_CATEGORIES:
        return window, reference
    kept = sorted(together, key=lambda name: (-together[name], name))[: MOST_CATEGORIES - 1]
    return _pooled(window, kept), _pooled(reference, kept)


def _pooled(counts: Mapping[str, int], kept: Sequence[str]) -> Mapping[str, int]:
    rest = sum(count for name, count in counts.items() if name not in kept)
    return {**{name: counts[name] for name in kept if name in counts}, OTHER_CATEGORIES: rest}


DRIFT_FORMAT = 1
COMPONENTS = 8
MOST_COMPONENTS = 16
GATE_ACCEPTED = "accepted"
"""Value of the tag `gate` for what the content gate does not refuse."""

_DIGITS = 6
_PLACES = 4


@dataclass(frozen=True, kw_only=True, eq=False)
class DriftReference:
    """A reference population, and how embeddings are reduced.

    Attributes
    ----------
    source
        Data set and split: "open-cxr/val".
    centre
        float32, (n,): mean embedding.
    axes
        float32, (k, n), k <= 16: principal axes (Pearson 1901), each divided by the standard
        deviation along it, so that components have mean 0 and variance 1.
    values
        Distributions by figure: `logit`, `gate_score`, `lung_area`, `lung_share`,
        `component_1`…, `embedding_distance`; those that could be measured.
    tags
        Counts by tag and value.
    """

    source: str
    centre: NDArray[np.float32]
    axes: NDArray[np.float32]
    values: Mapping[str, Distribution]
    tags: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    def components(self, embedding: NDArray[np.float32]) -> list[float] | None:
        """Reduce an embedding, (n,), to k components; None if it is not finite."""
        reduced = self.axes.astype(np.float64) @ (embedding.astype(np.float64) - self.centre)
        if not np.isfinite(reduced).all():
            return None
        return [round(float(value), _PLACES) for value in reduced]

    def to_json(self) -> str:
        """Return the file's text."""
        return json.dumps(
            {
                "drift": DRIFT_FORMAT,
                "source": self.source,
                "centre": _rounded(self.centre),
                "axes": [_rounded(axis) for axis in self.axes],
                "values": {
                    name: {"count": one.count, "values": _rounded(one.values)}
                    for name, one in self.values.items()
                },
                "tags": {name: dict(counts) for name, counts in self.tags.items()},
            },
            sort_keys=True,
        )

    @classmethod
    def from_json(cls, data: bytes, embedding_size: int | None = None) -> Self:
        """Read the file, UTF-8.

        Parameters
        ----------
        embedding_size
            Of the model; None where no embedding is to be reduced.

        Raises
        ------
        ModelError
            If it is of another format, damaged, or for another embedding.
        """
        try:
            found = json.loads(data.decode("utf-8"))
            if found["drift"] != DRIFT_FORMAT:
                raise ModelError(
                    f"drift.json has format {found['drift']}, this program reads {DRIFT_FORMAT}: "
                    "install the lungwatch release that the model was made for"
                )
            reference = cls(
                source=str(found["source"]),
                centre=np.array(found["centre"], dtype=np.float32),
                axes=np.array(found["axes"], dtype=np.float32),
                values={str(name): _distribution(one) for name, one in found["values"].items()},
                tags={
                    str(name): {str(value): int(count) for value, count in counts.items()}
                    for name, counts in found["tags"].items()
                },
            )
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ModelError("drift.json is not understood") from error
        reference.check(reference.centre.size if embedding_size is None else embedding_size)
        return reference

    def check(self, embedding_size: int) -> None:
        """Refuse a reference that does not fit the model's embedding.

        Raises
        ------
        ModelError
            If it does not, or holds values that are not finite.
        """
        shape = self.axes.shape
        if len(shape) != 2 or not 1 <= shape[0] <= MOST_COMPONENTS or shape[1] != embedding_size:
            raise ModelError(
                f"drift.json has axes of the shape {shape}, not 1 to {MOST_COMPONENTS} of "
                f"{embedding_size}: it is of another model"
            )
        if self.centre.shape != (embedding_size,):
            raise ModelError("drift.json has a centre of another embedding")
        if not (np.isfinite(self.axes).all() and np.isfinite(self.centre).all()):
            raise ModelError("drift.json holds an axis that is not finite")


def embedding_distance(components: list[float]) -> float:
    """Return the distance from the reference's centre, in standard deviations (Mahalanobis)."""
    return math.sqrt(sum(value * value for value in components))


def figures_of(
    *,
    logit: float | None,
    gate_score: float | None,
    lung_area: float | None,
    lung_share: float | None,
    components: list[float] | None,
) -> dict[str, float]:
    """Return the known figures of one result for the measurement of drift, by name."""
    figures = {
        "logit": logit,
        "gate_score": gate_score,
        "lung_area": lung_area,
        "lung_share": lung_share,
    }
    if components:
        figures |= {f"component_{i}": value for i, value in enumerate(components, 1)}
        figures["embedding_distance"] = embedding_distance(components)
    return {
        name: value for name, value in figures.items() if value is not None and math.isfinite(value)
    }


def _distribution(found: Mapping[str, Any]) -> Distribution:
    values = np.array(found["values"], dtype=np.float64)
    if values.ndim != 1 or not len(values) or not np.isfinite(values).all():
        raise ValueError("a distribution is a list of numbers")
    return Distribution(count=int(found["count"]), values=np.sort(values))


def _rounded(values: NDArray[np.float32] | NDArray[np.float64]) -> list[float]:
    return [float(f"{value:.{_DIGITS}g}") for value in values]


QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_Vector = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Flip:
    """Number of images that changed from one label to another."""

    before: str
    after: str
    images: int


@dataclass(frozen=True, kw_only=True)
class Shift:
    """Answers of a second model (B) compared with those of a first (A).

    Attributes
    ----------
    images
        Number of images that both have scored.
    agreement
        Share with the same label, 0..1.
    kappa
        Cohen's, over the three labels; None where both models give one label only.
    mean, quantiles
        Of the difference of probabilities (B minus A); the quantiles by rank (`QUANTILES`).
    flips
        Each change of label, the most frequent first.
    positive_rate
        Share with a probability at or above A's threshold, by A.
    threshold_same_rate
        Threshold of B that calls as many of these images positive.
    sensitivity
        A's at its threshold; None without known truth.
    threshold_same_sensitivity
        Highest threshold of B that finds at least as many of the COVID cases.
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
        """Share of the images whose label changed, 0..1."""
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
        Boolean, shape (N,): known COVID cases; None where nothing is known.

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

    With equal probabilities there may be more. None for a count of 0.
    """
    return float(np.sort(probabilities)[::-1][count - 1]) if count else None
