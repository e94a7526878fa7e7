"""Pixel data that breaks off: a right header, and nothing but one value to the end.

Copies that allocate a file before they fill it, and break off, leave zeros.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lungwatch.errors import FileRejected, Reason

# A collimator's or a window's lower border may be black and exactly even; a third of an X-ray
# is not. Other than black, nothing makes such borders but a frame, which has an upper side too.
_MAX_BLACK_SHARE = 1 / 3
_MAX_OTHER_SHARE = 1 / 4
# A border begins with a row; a copy breaks off within one, below rows that are whole.
_MAX_SHARE_WITHIN_ROW = 0.03
_WHOLE_ROW = 0.9
_MIN_WITHIN_ROW = 0.05


def check_tail(stored: NDArray[Any], *, is_black: bool) -> None:
    """Refuse an image whose last part is one value to the very end.

    Parameters
    ----------
    stored
        Shape (rows, columns).
    is_black
        Whether the last value is shown as black.

    Raises
    ------
    FileRejected
        As TRUNCATED: the pixels were never written.
    """
    rows, columns = stored.shape
    last = stored[-1, -1]
    differs = np.flatnonzero((stored != last).any(axis=1))
    if not len(differs):
        return  # one value all over, which has a reason of its own
    row = int(differs[-1])
    column = int(np.flatnonzero(stored[row] != last)[-1]) + 1
    share = 1 - (row * columns + column) / stored.size
    upper = int(differs[0]) / rows
    begins_within_row = (
        row > 0
        and columns - column >= _MIN_WITHIN_ROW * columns
        and float(np.mean(stored[row - 1, column:] != last)) >= _WHOLE_ROW
    )
    limit = _MAX_BLACK_SHARE if is_black else _MAX_OTHER_SHARE
    is_frame = upper >= share / 2
    if (share > limit and not is_frame) or (begins_within_row and share > _MAX_SHARE_WITHIN_ROW):
        raise FileRejected(
            Reason.TRUNCATED,
            f"the last {share:.0%} of the pixel data are one value: the image was never written "
            "to its end",
        )
