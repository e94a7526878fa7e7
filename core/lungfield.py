"""The lung field that a content gate finds: area, completeness, share of a map inside it."""

import cv2
import numpy as np
from numpy.typing import NDArray

from lungwatch.preprocess import PreprocessSpec, content_of

LEAST_SHARE_INSIDE = 0.5
"""Share of the map for COVID below which its attention is called outside the lungs."""
LEAST_HALF = 0.15
"""Share of the lung area below which one half of the picture is called without its lung."""
MOST_OF_AN_EDGE = 0.25
"""Share of one edge of the picture from which on lungs at that edge are called cut off."""
_IS_LUNG = 0.5


def lung_mask(
    lungs: NDArray[np.float32], shape: tuple[int, int], spec: PreprocessSpec
) -> NDArray[np.bool_]:
    """Return which cells of the radiograph are lung.

    Parameters
    ----------
    lungs
        float32, shape (side, side), 0..1: the gate's answer, over its whole input.
    shape
        (rows, columns) of the radiograph.
    spec
        The gate's.

    Returns
    -------
    numpy.ndarray
        bool, shape (h, w), over the radiograph, without padding.
    """
    return np.asarray(content_of(lungs, shape, spec) >= _IS_LUNG)


def area_of(mask: NDArray[np.bool_]) -> float:
    """Return the share of a picture that is lung, 0..1."""
    return float(mask.mean())


def is_partial(mask: NDArray[np.bool_], bounds: tuple[float, float]) -> bool:
    """Say whether part of the lungs seems to be missing.

    That is: their area is out of bounds, the left or right half of the picture holds less than
    15 % of it, or they reach an edge of the picture along a quarter of its length or more.

    Parameters
    ----------
    bounds
        (least, most) area, 0..1: `lung_area` of the gate's contract.
    """
    if not bounds[0] <= area_of(mask) <= bounds[1] or not mask.any():
        return True
    columns = mask.sum(axis=0, dtype=np.int64)
    left = float(columns[: len(columns) // 2].sum() / columns.sum())
    if min(left, 1.0 - left) < LEAST_HALF:
        return True
    edges = (mask[0], mask[-1], mask[:, 0], mask[:, -1])
    return max(float(edge.mean()) for edge in edges) >= MOST_OF_AN_EDGE


def share_inside(small: NDArray[np.float32], mask: NDArray[np.float32]) -> float | None:
    """Return the share of a map's sum that lies on lungs; None for an empty map.

    Parameters
    ----------
    small
        float32, shape (h, w), at least 0, over the same picture as the mask.
    mask
        float32, shape (H, W), 0..1: the share of each cell that is lung.
    """
    wide = enlarged(small, (mask.shape[0], mask.shape[1]))
    total = float(wide.sum(dtype=np.float64))
    return float((wide * mask).sum(dtype=np.float64)) / total if total > 0 else None


def enlarged(small: NDArray[np.float32], shape: tuple[int, int]) -> NDArray[np.float32]:
    """Return a map of another shape as the overlay shows it: bilinear, and never below 0."""
    wide = cv2.resize(small, (shape[1], shape[0]), interpolation=cv2.INTER_LINEAR)
    return np.asarray(np.maximum(wide, 0.0), dtype=np.float32)
