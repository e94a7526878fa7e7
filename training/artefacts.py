"""Marks on an X-ray that are not the patient: blank margins and burnt-in letters.

Both are heuristics that say where to look, not verdicts.
"""

import cv2
import numpy as np

from lungwatch.imaging.radiograph import FloatImage

# Pixels of the copy that is looked at; letters of a radiograph stay legible at this size.
_SIDE_PX = 512
_FLAT = 0.02  # standard deviation of a row or column that shows nothing
_STROKE_PX = 9  # letters are made of strokes narrower than this
_STROKE_CONTRAST = 0.35  # above what surrounds the stroke
_CORNER = (0.2, 0.33)  # of the height, of the width


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


def text_marks(pixels: FloatImage) -> int:
    """Count small, bright, high-contrast shapes in the corner that has most of them.

    Two or more make a text candidate; a rib's edge or a clip may look so too, and letters in
    the middle of the image or in grey are missed.

    Parameters
    ----------
    pixels
        float32, shape (rows, columns), 0..1; see `reduced`.
    """
    kernel = np.ones((_STROKE_PX, _STROKE_PX), np.uint8)
    strokes = cv2.morphologyEx(pixels, cv2.MORPH_TOPHAT, kernel) > _STROKE_CONTRAST
    _, _, stats, centres = cv2.connectedComponentsWithStats(strokes.astype(np.uint8))
    rows, columns = pixels.shape
    corners = dict.fromkeys([(False, False), (False, True), (True, False), (True, True)], 0)
    for (_, _, width, height, area), (x, y) in zip(stats[1:], centres[1:], strict=True):
        if not (5 <= height <= 40 and 2 <= width <= 60 and area >= 8):
            continue
        down, across = y / rows, x / columns
        if min(down, 1 - down) < _CORNER[0] and min(across, 1 - across) < _CORNER[1]:
            corners[down > 0.5, across > 0.5] += 1
    return max(corners.values())
