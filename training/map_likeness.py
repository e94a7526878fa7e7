"""How alike two maps are: correlation and structural similarity."""

import cv2
import numpy as np
from numpy.typing import NDArray

from lungwatch.training.pixels import FloatArray

_SIDE_PX = 64
# Window and constants of Wang et al. 2004, for values of 0..1.
_SIGMA = 1.5
_C1, _C2 = 0.01**2, 0.03**2


def correlations(maps: FloatArray) -> NDArray[np.float64]:
    """Return Pearson's correlation of every map with every other, cell by cell.

    Parameters
    ----------
    maps
        float32, shape (N, h, w).

    Returns
    -------
    numpy.ndarray
        float64, shape (N, N); NaN where a map is the same everywhere.
    """
    flat = maps.reshape(len(maps), -1).astype(np.float64)
    flat = flat - flat.mean(axis=1, keepdims=True)
    size = np.linalg.norm(flat, axis=1, keepdims=True)
    flat = np.divide(flat, size, out=np.full_like(flat, np.nan), where=size > 0)
    return np.asarray(flat @ flat.T)


def mean_likeness(
    table: NDArray[np.float64], weights: NDArray[np.float64] | None = None
) -> NDArray[np.float64]:
    """Return the mean correlation over pairs of different images, for each resample.

    Parameters
    ----------
    table
        float64, shape (N, N), without NaN: see `correlations`.
    weights
        How often each image occurs in each resample, float64, shape (B, N); None for once each.

    Returns
    -------
    numpy.ndarray
        float64, shape (B,); NaN where a resample holds one image only. A pair of an image with
        itself, drawn twice, counts for nothing.
    """
    drawn = np.ones((1, len(table))) if weights is None else weights
    between = np.einsum("bi,ij,bj->b", drawn, table, drawn, optimize=True)
    between -= (drawn**2) @ np.diag(table)
    pairs = drawn.sum(axis=1) ** 2 - (drawn**2).sum(axis=1)
    found = np.full(len(drawn), np.nan)
    np.divide(between, pairs, out=found, where=pairs > 0)
    return found


def correlation(first: FloatArray, second: FloatArray) -> float:
    """Return Pearson's correlation of two maps of one shape; NaN if one is even."""
    return float(correlations(np.stack([first, second]))[0, 1])


def similarity(first: FloatArray, second: FloatArray) -> float:
    """Return the mean structural similarity of two maps, 0..1 each, enlarged to 64 x 64.

    Source: Wang, Bovik, Sheikh, Simoncelli 2004, with a Gaussian window of sigma 1.5.
    """
    x, y = _enlarged(first), _enlarged(second)
    mean_x, mean_y = _blurred(x), _blurred(y)
    var_x, var_y = _blurred(x * x) - mean_x**2, _blurred(y * y) - mean_y**2
    both = _blurred(x * y) - mean_x * mean_y
    likeness = ((2 * mean_x * mean_y + _C1) * (2 * both + _C2)) / (
        (mean_x**2 + mean_y**2 + _C1) * (var_x + var_y + _C2)
    )
    return float(likeness.mean())


def _enlarged(small: FloatArray) -> NDArray[np.float64]:
    side = (_SIDE_PX, _SIDE_PX)
    return np.asarray(cv2.resize(small, side, interpolation=cv2.INTER_LINEAR), np.float64)


def _blurred(image: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(cv2.GaussianBlur(image, (11, 11), _SIGMA), np.float64)
