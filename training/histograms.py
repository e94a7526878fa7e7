"""Show an X-ray with the grey levels of another source, so that they tell nothing.

Collections differ in exposure, windowing and film. Equalising every image by the same rule
would have to be part of what a model does to its input; exchanging histograms while training
asks the network to do without them instead.

Source: histogram matching, Gonzalez & Woods, Digital Image Processing, 3.3.2.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lungwatch.errors import ConfigError
from lungwatch.training.data.pixels import FloatArray

_LEVELS = 129


@dataclass(frozen=True, kw_only=True, eq=False)
class Histograms:
    """The grey levels of all training images.

    Attributes
    ----------
    quantiles
        float32 (N, 129), each row rising: from the darkest to the brightest level.
    source
        Numbers of the images' sources, int32 (N,).
    """

    quantiles: FloatArray
    source: NDArray[np.int32]


def read_histograms(pixels: FloatArray, source: NDArray[np.int32]) -> Histograms:
    """Take down the grey levels of images, (N, S, S, 1) in 0..1."""
    parts = np.linspace(0.0, 1.0, _LEVELS)
    rows = [np.quantile(image, parts) for image in pixels]
    return Histograms(quantiles=np.asarray(rows, dtype=np.float32), source=source)


def exchange_histograms(
    batch: FloatArray,
    indices: NDArray[np.intp],
    known: Histograms,
    probability: float,
    rng: np.random.Generator,
) -> FloatArray:
    """Give some images the histogram of a random image of another source, or a part of it.

    Parameters
    ----------
    batch
        float32 (N, S, S, 1), 0..1; not modified.
    indices
        Which of the known images these are, (N,).
    known
        What `read_histograms` took down.
    probability
        How often, 0..1. Half-way to fully, by chance.
    rng
        Source of chance; the same state gives the same images.

    Raises
    ------
    ConfigError
        If there is one source only.
    """
    if not probability:
        return batch
    if (known.source == known.source[0]).all():
        raise ConfigError("histograms can be exchanged between two sources or more; there is one")
    changed = batch.copy()
    for place, index in enumerate(indices):
        if rng.random() >= probability:
            continue
        # Sources in equal shares: the largest one would lend its levels to all others.
        others = np.unique(known.source[known.source != known.source[index]])
        lender = rng.choice(np.flatnonzero(known.source == rng.choice(others)))
        amount = rng.uniform(0.5, 1.0)
        image = batch[place]
        matched = np.interp(image, known.quantiles[index], known.quantiles[lender])
        changed[place] = (1.0 - amount) * image + amount * matched
    return changed
