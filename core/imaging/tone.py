"""The range of grey values that a picture takes up, and the one that it should."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lungwatch.imaging.radiograph import FloatImage

# Nobody sees a chest in a picture whose lightest part is darker, or darkest part lighter, than
# this, or that has less contrast.
_NEARLY_BLACK = 0.3
_NEARLY_WHITE = 0.7
_MIN_CONTRAST = 0.1
# What may be cut off as outliers, on either side.
_TAIL_PERCENT = 0.5
_SAMPLE_SIZE = 200_000


def is_visible(grey: FloatImage, shown: NDArray[np.bool_] | None = None) -> bool:
    """Whether a picture is neither nearly black, nor nearly white, nor one grey.

    Parameters
    ----------
    grey
        float32, 0..1.
    shown
        True for what is no padding; None for everything.
    """
    low, high = extent(grey, shown)
    return high > _NEARLY_BLACK and low < _NEARLY_WHITE and high - low >= _MIN_CONTRAST


def own_range(values: NDArray[Any], shown: NDArray[np.bool_] | None = None) -> FloatImage:
    """Return a picture from its lowest to its highest value.

    The outermost half percent on either side is cut off where it takes up half the range: a
    bright letter or a dead pixel must not darken all the rest.

    Parameters
    ----------
    values
        Any real type, shape (rows, columns).
    shown
        True for what takes part; None for everything.

    Returns
    -------
    numpy.ndarray
        float32, shape (rows, columns), 0..1.
    """
    kept = values if shown is None else values[shown]
    low, high = float(kept.min()), float(kept.max())
    most_low, most_high = extent(values, shown)
    if 0 < most_high - most_low < (high - low) / 2:
        low, high = most_low, most_high
    grey = values.astype(np.float32) - np.float32(low)
    grey /= np.float32(max(high - low, 1e-6))
    return np.clip(grey, 0.0, 1.0, out=grey)


def extent(values: NDArray[Any], shown: NDArray[np.bool_] | None = None) -> tuple[float, float]:
    """Return the values that half a percent lies below, and above, of a sample."""
    kept = values.ravel() if shown is None else values[shown]
    sample = kept[:: max(1, kept.size // _SAMPLE_SIZE)]
    low, high = np.percentile(sample, (_TAIL_PERCENT, 100 - _TAIL_PERCENT))
    return float(low), float(high)
