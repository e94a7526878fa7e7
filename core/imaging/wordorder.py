"""Native pixel data whose byte order, or whose shape, the file states wrongly.

As with depth, an X-ray's neighbours tell: read in the wrong order, or in rows of the wrong
length, they differ by many times more.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lungwatch.errors import FileRejected, Reason

# So many times nearer to each other are neighbours in the right reading.
_CLEARLY = 8.0
_SAMPLED_ROWS = 256


def in_order(words: NDArray[Any]) -> tuple[NDArray[Any], bool]:
    """Exchange the bytes of words that are in the other order.

    Parameters
    ----------
    words
        Unsigned, shape (rows, columns).

    Returns
    -------
    tuple
        The words, and whether they have been changed.
    """
    if words.dtype.itemsize == 1 or words.shape[1] < 2:
        return words, False
    sample = words[:: max(1, len(words) // _SAMPLED_ROWS)]
    swapped = sample.byteswap()
    # A step over nothing but low bytes, in the wrong order, is one over nothing but high ones.
    is_swapped = 0 < _CLEARLY * _typical_step(swapped) < _typical_step(sample)
    return (words.byteswap(), True) if is_swapped else (words, False)


def check_shape(words: NDArray[Any]) -> None:
    """Refuse an image whose rows are as long as its columns should be.

    Parameters
    ----------
    words
        Shape (rows, columns).

    Raises
    ------
    FileRejected
        As UNREADABLE.
    """
    rows, columns = words.shape
    flat = words.ravel()
    if rows == columns or min(rows, columns) < 2:
        return
    # Where a row ends is the same in both readings now and then; a sample knows of no rows.
    places = np.arange(0, flat.size - max(rows, columns), max(1, flat.size // 100_003))
    stated, exchanged = (
        float(np.abs(flat[places + length].astype(np.int32) - flat[places]).mean())
        for length in (columns, rows)
    )
    if stated > _CLEARLY / 2 * exchanged:
        raise FileRejected(
            Reason.UNREADABLE, "Rows and Columns are exchanged: the image is not of that shape"
        )


def _typical_step(words: NDArray[Any]) -> float:
    return float(np.abs(np.diff(words.astype(np.int32), axis=1)).mean())
