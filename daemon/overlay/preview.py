"""The X-ray at the size in which people look at it."""

import cv2
import numpy as np
from numpy.typing import NDArray

from lungwatch.imaging.radiograph import FloatImage

# Small pictures are enlarged towards this, to be readable on a screen; further than
# twofold, interpolation would pretend to a sharpness that the file does not have.
_READABLE_SIDE_PX = 512
_MAX_ENLARGEMENT = 2.0


def make_preview(pixels: FloatImage, max_side_px: int = 1024) -> NDArray[np.uint8]:
    """Scale a radiograph to a readable size, keeping its aspect ratio.

    Parameters
    ----------
    pixels
        float32, shape (H, W), 0..1, air dark.
    max_side_px
        Longest side of the result; larger pictures are shrunk to it by area averaging.

    Returns
    -------
    numpy.ndarray
        uint8, shape (h, w). A picture smaller than 512 pixels is enlarged to that, but no
        more than twofold and not beyond `max_side_px`.
    """
    rows, columns = pixels.shape
    longest = max(rows, columns)
    readable = min(_MAX_ENLARGEMENT, _READABLE_SIDE_PX / longest)
    scale = min(max(1.0, readable), max_side_px / longest)
    height, width = max(1, round(rows * scale)), max(1, round(columns * scale))
    if scale < 1.0:
        pixels = _resize(pixels, height, width, cv2.INTER_AREA)
    elif scale > 1.0:
        pixels = _resize(pixels, height, width, cv2.INTER_CUBIC)
    # Rounds and saturates, and so takes the overshoot of cubic interpolation with it.
    return np.asarray(cv2.convertScaleAbs(np.maximum(pixels, 0.0), alpha=255.0), dtype=np.uint8)


def _resize(pixels: FloatImage, height: int, width: int, how: int) -> FloatImage:
    return np.asarray(cv2.resize(pixels, (width, height), interpolation=how), dtype=np.float32)
