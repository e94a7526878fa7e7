"""Letters burnt into the pixels: words beside the patient, such as a hospital's name.

A heuristic: it finds letters that stand in a line, as printers and consoles set them, bright or
dark. Handwriting, turned lines, small print and letters of lead on a strip are missed.
"""

import cv2
import numpy as np
from numpy.typing import NDArray

# Fewer make a side mark with the initials of whoever took the X-ray, which nearly every one has.
BURNT_IN_LETTERS = 4
_SIDE_PX = 1024
_HATS = (cv2.MORPH_TOPHAT, cv2.MORPH_BLACKHAT)
_STROKE_PX = 9  # letters are made of strokes narrower than this
_STROKE_CONTRAST = 76  # of 255, from what surrounds the stroke
_HEIGHT_PX = (5, 40)
_WIDTH_PX = (2, 40)
_LEAST_AREA_PX = 8
_MOST_SHAPES = 500


def letters_in_line(grey: NDArray[np.uint8]) -> int:
    """Return how many letters the longest line of burnt-in text has; 0 without any.

    Parameters
    ----------
    grey
        uint8, shape (rows, columns), air dark; looked at with its longest side at most 1024 px.
    """
    scale = _SIDE_PX / max(grey.shape)
    if scale < 1.0:
        size = (max(1, round(grey.shape[1] * scale)), max(1, round(grey.shape[0] * scale)))
        grey = np.asarray(cv2.resize(grey, size, interpolation=cv2.INTER_AREA), dtype=np.uint8)
    # The gaps between bright letters that touch each other are a line of dark ones.
    return max(_longest_line(_letter_like(_shapes(grey, hat))) for hat in _HATS)


def _shapes(grey: NDArray[np.uint8], hat: int) -> NDArray[np.int64]:
    """Find what differs from its surroundings; (n, 5): left, top, width, height, area."""
    kernel = np.ones((_STROKE_PX, _STROKE_PX), np.uint8)
    contrast = cv2.morphologyEx(grey, hat, kernel)
    _, strokes = cv2.threshold(contrast, _STROKE_CONTRAST, 1, cv2.THRESH_BINARY)
    # Labels of 16 bits take a third of the time; there are no more of them than pixels.
    kind = cv2.CV_16U if cv2.countNonZero(strokes) < 1 << 16 else cv2.CV_32S
    _, _, found, _ = cv2.connectedComponentsWithStats(strokes, ltype=kind)
    return np.asarray(found[1:], dtype=np.int64)


def _letter_like(shapes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Keep what has a letter's size, from left to right."""
    width, height, area = shapes[:, 2], shapes[:, 3], shapes[:, 4]
    keep = (height >= _HEIGHT_PX[0]) & (height <= _HEIGHT_PX[1])
    keep &= (width >= _WIDTH_PX[0]) & (width <= _WIDTH_PX[1]) & (width <= 2 * height)
    # A wire's box is nearly empty.
    keep &= (area >= _LEAST_AREA_PX) & (area * 7 >= width * height)
    kept = shapes[keep][:_MOST_SHAPES]
    return kept[np.argsort(kept[:, 0], kind="stable")]


def _longest_line(letters: NDArray[np.int64]) -> int:
    left, top, width, height, _ = letters.T
    bottom = top + height
    # Row i, column j: whether letter j may come after letter i; later ones only, so no circles.
    gap = left[np.newaxis] - (left + width)[:, np.newaxis]
    follows = (gap >= -1) & (10 * gap <= 12 * np.maximum(height[np.newaxis], height[:, np.newaxis]))
    follows &= 4 * np.abs(bottom[np.newaxis] - bottom[:, np.newaxis]) <= height[:, np.newaxis] + 4
    follows &= 10 * height[np.newaxis] >= 7 * height[:, np.newaxis]
    follows &= 10 * height[np.newaxis] <= 14 * height[:, np.newaxis]
    follows &= np.tri(len(letters), dtype=bool).T & ~np.eye(len(letters), dtype=bool)
    longest = np.ones(len(letters), dtype=np.int64)
    for i in np.flatnonzero(follows.any(axis=1))[::-1]:
        longest[i] += longest[follows[i]].max()
    return int(longest.max(initial=0))
