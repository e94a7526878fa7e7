"""Checks of the content gate: what its scores are made of, and how the thresholds are chosen.

A threshold is chosen on upright frontal chest X-rays of the validation split alone, each at three
exposures; no picture that has to be refused takes part. For `frontal`, `upright` and `polarity` it
is the 0.2 % quantile of the scores, but not below 0.5 and not above 0.8. The largest distance
from the training images is 1.25 times the 99.5 % quantile of the validation images' distances,
and at least 5: a hospital that no image came from lies further away than the validation images,
which came from the same places as the training images.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lungwatch.errors import ModelError, Reason
from lungwatch.gate import GateCheck
from lungwatch.training.pixels import FloatArray

FRONTAL, UPRIGHT, POLARITY, LUNGS, FAMILIAR = "frontal", "upright", "polarity", "lungs", "familiar"
REASONS: dict[str, Reason] = {
    FRONTAL: Reason.NOT_FRONTAL_CHEST,
    UPRIGHT: Reason.ROTATED,
    POLARITY: Reason.INVERTED,
    LUNGS: Reason.NO_LUNGS,
    FAMILIAR: Reason.NOT_FRONTAL_CHEST,
}
"""The checks in their order. A turned chest is far from the training images too, so the distance,
which cannot say what is wrong, comes last."""

LEAST_LUNGS = 0.05
"""Share of the picture that has to be lung."""
EVEN = 0.5
"""Threshold of the two scores that are made of a limit: `lungs` and `familiar`."""
QUANTILE = 0.002
CHANCE_BOUNDS = (0.5, 0.8)
DISTANCE_QUANTILE, DISTANCE_FACTOR, LEAST_DISTANCE = 0.995, 1.25, 5.0
EXPOSURES = (1.0, 0.8, 1.25)
"""Exponents of the grey values under which validation images are looked at."""
MOST_LOST = 0.02
"""Share of the validation images, as they are, that a gate may refuse before it is no use."""

_COMPONENTS = 64


@dataclass(frozen=True, kw_only=True, eq=False)
class GateLook:
    """What the network says of some pictures.

    Attributes
    ----------
    chances
        float32, shape (N, 3), 0..1: of being frontal, upright, and not inverted.
    embedding
        float32, shape (N, C): pooled features of the trunk.
    lungs
        float32, shape (N, M, M), 0..1: each cell's probability of being lung.
    """

    chances: FloatArray
    embedding: FloatArray
    lungs: FloatArray

    @property
    def lung_areas(self) -> NDArray[np.float64]:
        """Share of each picture that is lung, 0..1, (N,)."""
        return np.asarray((self.lungs >= 0.5).mean(axis=(1, 2)), dtype=np.float64)


@dataclass(frozen=True, kw_only=True, eq=False)
class Familiarity:
    """A normal distribution of the training images' embeddings, in their principal components.

    Attributes
    ----------
    mean
        float32, shape (C,).
    axes
        float32, shape (C, K): principal components, each divided by its standard deviation and
        by the root of K.

    Source: Lee et al. 2018, arXiv:1807.03888 (Mahalanobis distance as a measure of the unknown).
    """

    mean: FloatArray
    axes: FloatArray

    @classmethod
    def of(cls, embedding: FloatArray) -> "Familiarity":
        """Fit it to the embeddings, (N, C), of the training images."""
        mean = embedding.mean(axis=0, dtype=np.float64)
        _, spread, rows = np.linalg.svd(embedding - mean, full_matrices=False)
        # Of N images no more than N - 1 components vary.
        count = max(1, min(_COMPONENTS, len(embedding) - 1, int((spread > 1e-6).sum())))
        deviation = spread[:count] / np.sqrt(len(embedding))
        axes = rows[:count].T / (np.maximum(deviation, 1e-9) * np.sqrt(count))
        return cls(mean=mean.astype(np.float32), axes=axes.astype(np.float32))

    def distances(self, embedding: FloatArray) -> FloatArray:
        """Return the mean squared deviation over the components, (N,): 1 for a typical image."""
        return np.asarray((((embedding - self.mean) @ self.axes) ** 2).sum(axis=1), np.float32)


@dataclass(frozen=True, kw_only=True)
class GateThresholds:
    """Where the checks' limits lie.

    Attributes
    ----------
    frontal, upright, polarity
        Smallest chance that passes, 0..1.
    distance
        Largest distance from the training images that passes; see `Familiarity.distances`.
    lung_area
        (least, most) share of the picture that is lung in 99 % of the training images.
    """

    frontal: float
    upright: float
    polarity: float
    distance: float
    lung_area: tuple[float, float]

    def checks(self) -> tuple[GateCheck, ...]:
        """Return the checks in the order of the graph's columns."""
        chances = {FRONTAL: self.frontal, UPRIGHT: self.upright, POLARITY: self.polarity}
        return tuple(
            GateCheck(name=name, threshold=chances.get(name, EVEN), reason=reason)
            for name, reason in REASONS.items()
        )

    def scores(self, look: GateLook, familiarity: Familiarity) -> FloatArray:
        """Return the scores, float32 (N, checks), 0..1, as the exported graph gives them."""
        ratio = familiarity.distances(look.embedding) / np.float32(self.distance)
        with np.errstate(over="ignore"):
            familiar = 1.0 / (1.0 + ratio**4)
        lungs = np.clip(look.lung_areas / (2 * LEAST_LUNGS), 0.0, 1.0)
        return np.column_stack([look.chances, lungs, familiar]).astype(np.float32)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


def choose_thresholds(
    train: GateLook, val: GateLook, exposed: Sequence[GateLook], familiarity: Familiarity
) -> GateThresholds:
    """Choose the thresholds by the rule that the module states.

    Parameters
    ----------
    train, val
        Looks at the X-rays of both splits, as they are.
    exposed
        Looks at the validation images at the other `EXPOSURES`.
    familiarity
        Fitted to the training images.
    """
    looks = [val, *exposed]
    chances = np.concatenate([look.chances for look in looks])
    lowest = np.clip(np.quantile(chances, QUANTILE, axis=0), *CHANCE_BOUNDS)
    distances = np.concatenate([familiarity.distances(look.embedding) for look in looks])
    furthest = DISTANCE_FACTOR * float(np.quantile(distances, DISTANCE_QUANTILE))
    least, most = (float(np.quantile(train.lung_areas, q)) for q in (0.005, 0.995))
    return GateThresholds(
        frontal=round(float(lowest[0]), 3),
        upright=round(float(lowest[1]), 3),
        polarity=round(float(lowest[2]), 3),
        distance=round(max(LEAST_DISTANCE, furthest), 2),
        lung_area=(round(least, 3), round(max(most, least + 0.01), 3)),
    )


def check_losses(scores: FloatArray, checks: Sequence[GateCheck]) -> None:
    """Refuse a gate that refuses chest X-rays.

    Parameters
    ----------
    scores
        Of the validation images, as they are, (N, checks).
    checks
        The checks.

    Raises
    ------
    ModelError
        If it refuses more than 2 % of them.
    """
    refused = first_failures(scores, checks)
    if refused.total() > MOST_LOST * len(scores):
        by_check = ", ".join(f"{name} {count}" for name, count in refused.most_common())
        raise ModelError(
            f"the gate refuses {refused.total()} of {len(scores)} validation images "
            f"({by_check}), more than {MOST_LOST:.0%}: train it longer"
        )


def first_failures(scores: FloatArray, checks: Sequence[GateCheck]) -> Counter[str]:
    """Count pictures by the first check that each fails; those that pass are not counted."""
    failed = scores < np.array([check.threshold for check in checks], np.float32)
    first = failed.argmax(axis=1)[failed.any(axis=1)]
    return Counter(checks[index].name for index in first)


def turned_copies(pixels: FloatArray) -> dict[str, FloatArray]:
    """Return copies of preprocessed images, (N, S, S, 1), that have to be refused.

    The same as preprocessing turned and inverted X-rays: stretching to a square and percentiles
    commute with both.
    """
    turns = {f"turned by {90 * k}°": np.rot90(pixels, k, axes=(1, 2)) for k in (1, 2, 3)}
    return {**turns, "inverted": np.float32(1.0) - pixels}


def exposures(pixels: FloatArray) -> list[FloatArray]:
    """Return preprocessed images at the other `EXPOSURES`."""
    return [pixels ** np.float32(power) for power in EXPOSURES if power != 1.0]
