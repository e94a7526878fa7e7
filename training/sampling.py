"""Which training images an epoch shows: classes in balance, sources brought nearer to it."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lungwatch.training.data.dataset import ImageClass, Sample


def sampling_weights(
    samples: Sequence[Sample],
    power: float = 0.5,
    shares: Mapping[ImageClass, float] | None = None,
) -> NDArray[np.float64]:
    """Probability of drawing each sample.

    COVID and the rest get one half each, or each finding its share of `shares`, brought to a
    sum of 1 over the findings that occur. Within each, a group of n images from one source
    with one finding gets a share in proportion to n ** power: 1 takes images as they come,
    0 makes the groups equal. In between, small groups count for more, above all the other
    pneumonias from the collections that the COVID images come from: only they tell the
    network that the source is not the answer.

    Returns
    -------
    numpy.ndarray
        float64, shape (N,), summing to 1.
    """
    groups = [(s.positive, s.source, s.finding) for s in samples]
    sizes = Counter(groups)
    weights = np.array([sizes[group] ** (power - 1.0) for group in groups])
    if shares is None:
        parts = np.array([s.positive for s in samples], dtype=object)
        wanted: Mapping[Any, float] = {True: 0.5, False: 0.5}
    else:
        parts = np.array([s.finding for s in samples], dtype=object)
        wanted = shares
    for part in sorted(set(parts)):
        mask = parts == part
        weights[mask] *= wanted[part] / weights[mask].sum()
    return np.asarray(weights / weights.sum(), dtype=np.float64)


def epoch_order(
    weights: NDArray[np.float64], rng: np.random.Generator, length: int
) -> NDArray[np.intp]:
    """Draw `length` indices with replacement.

    Low-variance (systematic) drawing: each sample comes up the floor or the ceiling of its
    expected number of times, so that an epoch misses as few images as possible.

    Source: Carpenter, Clifford, Fearnhead 1999.
    """
    permutation = rng.permutation(len(weights))
    edges = np.cumsum(weights[permutation])
    points = (np.arange(length) + rng.uniform()) / length
    drawn = np.searchsorted(edges, points * edges[-1], side="right")
    order = permutation[np.minimum(drawn, len(weights) - 1)]
    return np.asarray(rng.permutation(order), dtype=np.intp)
