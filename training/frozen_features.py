"""What a frozen backbone makes of the images, computed once.

As long as the backbone does not learn, the pooled features of an image stay the same, so the
head can learn from them alone, hundreds of times as fast. Augmentation is kept by computing
several changed copies of each training image: epoch e learns from copy e mod K.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lungwatch.training.augment import NO_AUGMENTATION, Augmentation, augment
from lungwatch.training.data.pixels import FloatArray, KerasModel
from lungwatch.training.head import POOLED

_BATCH = 64


@dataclass(frozen=True, kw_only=True)
class FeatureCopies:
    """Which changed copies of a set of images are made.

    Attributes
    ----------
    count
        How many; with 0, the images as they are.
    augmentation
        The limits of the changes.
    seed
        Of the changes, together with the copy's number.
    """

    count: int
    augmentation: Augmentation
    seed: int


def pooled_features(
    model: KerasModel,
    pixels: FloatArray,
    copies: FeatureCopies,
    cache: Path,
    *,
    on_copy: Callable[[int, int], None] | None = None,
) -> FloatArray:
    """Compute a frozen network's pooled features, or take them from the cache.

    Parameters
    ----------
    model
        What `build_transfer` built.
    pixels
        float32, shape (N, S, S, 1), 0..1.
    copies
        What is made of them first.
    cache
        Folder of the copies already computed, one .npy file each; it belongs to this network,
        these images and these copies alone. It is made.
    on_copy
        Called with (copy, copies) after each.

    Returns
    -------
    numpy.ndarray
        float32, shape (K, N, C), K = max(1, copies.count).
    """
    import keras

    cache.mkdir(parents=True, exist_ok=True)
    pooled = keras.Model(model.input, model.get_layer(POOLED).output)
    count = max(1, copies.count)
    limits = copies.augmentation if copies.count else NO_AUGMENTATION
    made = []
    for number in range(1, count + 1):
        file = cache / f"copy-{number:02d}.npy"
        if not file.exists():
            rng = np.random.default_rng([copies.seed, number])
            _save(_features(pooled, pixels, limits, rng), file)
        made.append(np.load(file))
        if on_copy:
            on_copy(number, count)
    return np.stack(made)


def _features(
    pooled: KerasModel, pixels: FloatArray, limits: Augmentation, rng: np.random.Generator
) -> FloatArray:
    parts = []
    for batch in np.array_split(pixels, max(1, math.ceil(len(pixels) / _BATCH))):
        seen = batch if limits == NO_AUGMENTATION else augment(batch, limits, rng)
        parts.append(np.asarray(pooled.predict_on_batch(seen), np.float32))
    return np.concatenate(parts)


def _save(array: FloatArray, target: Path) -> None:
    temporary = target.with_name(f".tmp-{target.name}")
    np.save(temporary, array)
    temporary.replace(target)
