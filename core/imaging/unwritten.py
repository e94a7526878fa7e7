"""Pixel data that were never written: a right header, and one value where rows should be.

Copies that allocate a file before they fill it, and break off or lose a block, leave zeros.
"""

from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lungwatch.errors import FileRejected, Reason
from lungwatch.imaging.radiograph import FloatImage

# A collimator's or a window's lower border may be black and exactly even; a third of an X-ray
# is not. Other than black, nothing makes such borders but a frame, which has an upper side too.
_MAX_BLACK_SHARE = 1 / 3
_MAX_OTHER_SHARE = 1 / 4
# A border begins and ends with a row; a copy breaks off within one, beside rows that are whole.
_MAX_SHARE_WITHIN_ROW = 0.02
_WHOLE_ROW = 0.9
_MIN_WITHIN_ROW = 0.05
_BLACK = 0.02


def check_written(stored: NDArray[Any], grey: FloatImage) -> None:
    """Refuse an image that a large part of is one value where an X-ray cannot have it.

    Parameters
    ----------
    stored
        Shape (rows, columns).
    grey
        What is shown of it, float32, 0..1, of the same shape.

    Raises
    ------
    FileRejected
        As TRUNCATED where it lasts to the end, as DAMAGED before: the pixels were never written.
    """
    for start, end, value in _even_bands(stored):
        before, behind = _run_before(stored, start, value), _run_behind(stored, end, value)
        share = ((end - start) * stored.shape[1] + abs(before) + abs(behind)) / stored.size
        if share <= _MAX_SHARE_WITHIN_ROW:
            continue
        is_cut = before > 0 or behind > 0
        limit = _MAX_BLACK_SHARE if grey[start, 0] < _BLACK else _MAX_OTHER_SHARE
        if not is_cut and (share <= limit or _is_of_frame(stored, start, end)):
            continue
        if end == len(stored):
            raise FileRejected(
                Reason.TRUNCATED,
                f"the last {share:.0%} of the pixel data are one value: the image was never "
                "written to its end",
            )
        raise FileRejected(
            Reason.DAMAGED,
            f"{share:.0%} of the pixel data in one piece are one value: a block is missing",
        )


def _even_bands(stored: NDArray[Any]) -> list[tuple[int, int, int]]:
    """Return first row, row behind the last, and value of bands of rows of a single value."""
    first = stored[:, 0]
    is_even = (stored == first[:, np.newaxis]).all(axis=1)
    if is_even.all() or not is_even.any():
        return []
    # A band ends where rows are not even, or are so at another value.
    changes = np.flatnonzero(
        (is_even[1:] != is_even[:-1]) | (is_even[1:] & (first[1:] != first[:-1]))
    )
    bounds = [0, *(changes + 1).tolist(), len(stored)]
    return [(start, end, int(first[start])) for start, end in pairwise(bounds) if is_even[start]]


def _run_before(stored: NDArray[Any], start: int, value: int) -> int:
    """Return how many pixels of the row above a band belong to it as well.

    Only where the row above that one is whole there, else 0: a border beside the image, or one
    that slants, is no break.
    """
    if start < 2:
        return 0
    return _run(stored[start - 1][::-1], stored[start - 2][::-1], value)


def _run_behind(stored: NDArray[Any], end: int, value: int) -> int:
    """Return how many pixels of the row below a band belong to it as well, or 0 as above."""
    if end + 2 > len(stored):
        return 0
    return _run(stored[end], stored[end + 1], value)


def _run(row: NDArray[Any], next_row: NDArray[Any], value: int) -> int:
    length = int(np.argmax(row != value))
    if length < _MIN_WITHIN_ROW * len(row):
        return 0
    return length if float(np.mean(next_row[:length] != value)) >= _WHOLE_ROW else 0


def _is_of_frame(stored: NDArray[Any], start: int, end: int) -> bool:
    """Whether a band lies at one end of the image, and one half as high at the other end."""
    height = max(1, (end - start) // 2)
    if end == len(stored):
        opposite = stored[:height]
    elif start == 0:
        opposite = stored[-height:]
    else:
        return False
    return bool((opposite == opposite[0, 0]).all())
