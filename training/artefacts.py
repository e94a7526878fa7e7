"""Blank margins of an X-ray: a heuristic that says where to look, not a verdict."""

import cv2
import numpy as np

from lungwatch.imaging.radiograph import FloatImage

# Pixels of the copy that is looked at; letters of a radiograph stay legible at this size.
_SIDE_PX = 512
_FLAT = 0.02  # standard deviation of a row or column that shows nothing


def reduced(pixels: FloatImage) -> FloatImage:
    """Return the image with its longest side at most 512 px, aspect kept, float32 0..1."""
    rows, columns = pixels.shape
    scale = min(1.0, _SIDE_PX / max(rows, columns))
    size = (max(1, round(columns * scale)), max(1, round(rows * scale)))
    return np.asarray(cv2.resize(pixels, size, interpolation=cv2.INTER_AREA), dtype=np.float32)


def border_fraction(pixels: FloatImage) -> float:
    """Return the share of the area, 0..1, in rows and columns at the edges that show nothing.

    Parameters
    ----------
    pixels
        float32, shape (rows, columns), 0..1.
    """
    rows = np.flatnonzero(pixels.std(axis=1) > _FLAT)
    columns = np.flatnonzero(pixels.std(axis=0) > _FLAT)
    if not len(rows) or not len(columns):
        return 1.0
    shown = (rows[-1] - rows[0] + 1) * (columns[-1] - columns[0] + 1)
    return 1.0 - float(shown) / pixels.size
