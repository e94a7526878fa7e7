"""The step that a damaged JPEG leaves where its decoder found its way back.

A block's mean is coded as the difference to that of the block before. Where damage has changed
a difference, and codes are right again behind it, all that follows is lighter or darker by the
same amount: along the line in which blocks come, from the damage to the end of its row of
blocks, and from there below the beginning of that row.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

# Grey levels of 256 that a step has at least; less changes no answer.
_MIN_STEP = 5.0
# Blocks along the step that may stray from it, by how much of it, and what may lie around it.
_MAX_STRAY = 0.4
_MAX_AROUND = 0.35
# An edge of the picture's own, as of a frame, begins with a row of blocks.
_ROW_START_SHARE = 0.02
_ROW_START_BLOCKS = 3
_MIN_BLOCKS = 12
_MIN_BLOCK_ROWS = 4


def has_seam(grey: NDArray[Any], *, block: tuple[int, int], white: int) -> bool:
    """Whether a decoded JPEG has a step from one block on to the end of the image.

    Parameters
    ----------
    grey
        Shape (rows, columns).
    block
        Height and width in pixels of what is coded at once.
    white
        The largest grey value.
    """
    columns = grey.shape[1] // block[1]
    if columns < _MIN_BLOCKS or grey.shape[0] // block[0] < _MIN_BLOCK_ROWS:
        return False
    steps = _steps(grey, *block) * (255.0 / white)
    flat = steps.ravel()
    # A row of blocks is as long as the step: a median over it is the step's height.
    windows = np.lib.stride_tricks.sliding_window_view(flat, columns)
    totals = np.convolve(flat, np.ones(columns), "valid") / columns
    for start in np.flatnonzero(np.abs(totals) > _MIN_STEP / 2):
        within_row = min(start % columns, columns - start % columns)
        if within_row <= max(_ROW_START_BLOCKS, _ROW_START_SHARE * columns):
            continue
        height = float(np.median(windows[start]))
        if abs(height) < _MIN_STEP:
            continue
        stray = float(np.mean(np.abs(windows[start] - height) > abs(height) / 2))
        before = flat[max(0, start - columns) : start - 1]
        behind = flat[start + columns + 1 : start + 2 * columns]
        if (
            stray <= _MAX_STRAY
            and abs(_median(before)) <= _MAX_AROUND * abs(height)
            and abs(_median(behind)) <= _MAX_AROUND * abs(height)
            and _is_sharp(flat, int(start), columns, height)
        ):
            return True
    return False


def _steps(grey: NDArray[Any], height: int, width: int) -> NDArray[np.float64]:
    """Return by how much each block but those of the first row is lighter than the one above.

    What the grey values would have changed by anyway, from one row of pixels to the next, is
    taken off.
    """
    rows, columns = grey.shape[0] // height * height, grey.shape[1] // width * width
    values = grey[:rows, :columns].astype(np.float64)
    below, above = values[height::height], values[height - 1 : -1 : height]
    trend = (values[height + 1 :: height] - below) + (above - values[height - 2 : -2 : height])
    step = below - above - trend / 2
    return np.asarray(step.reshape(len(step), -1, width).mean(axis=2))


def _is_sharp(flat: NDArray[np.float64], start: int, columns: int, height: float) -> bool:
    """Whether the step begins and ends within a few blocks, and has its height at both ends."""
    near = max(3, columns // 12)
    pairs = (
        (flat[start : start + near], flat[max(0, start - near) : start]),
        (flat[start + columns - near : start + columns], flat[start + columns :][:near]),
    )
    return all(
        len(outside) > 0
        and abs(_median(inside) - height) <= abs(height) / 2
        and abs(_median(outside)) <= abs(height) / 2
        for inside, outside in pairs
    )


def _median(values: NDArray[np.float64]) -> float:
    return float(np.median(values)) if len(values) else 0.0
