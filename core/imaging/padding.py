"""Pixels that are no measurement: what a modality fills up a rectangle with."""

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from lungwatch.imaging.attributes import number_of, numbers_of

# Of an image, what padding leaves: less is no image.
_MAX_SHARE = 0.9


def padding_of(stored: NDArray[Any], dataset: Dataset) -> NDArray[np.bool_] | None:
    """Find the padding of an image (PS3.3 C.7.5.1.1.2).

    Only what is joined to the image's edge counts. Many files state a padding value and hold
    none, and there the value is that of the whitest bone or of air as well.

    Parameters
    ----------
    stored
        Shape (rows, columns).
    dataset
        The attributes that may hold Pixel Padding Value and Range Limit, in stored values.

    Returns
    -------
    numpy.ndarray or None
        bool, shape (rows, columns), true for padding; None if there is none.
    """
    values = [
        _as_stored(int(value), stored, number_of(dataset, "BitsStored", 16))
        for keyword in ("PixelPaddingValue", "PixelPaddingRangeLimit")
        for value in numbers_of(dataset, keyword)[:1]
        if abs(value) < 2**16
    ]
    if not values or "PixelPaddingValue" not in dataset:
        return None
    stated = (stored >= min(values)) & (stored <= max(values))
    edges = (stated[0], stated[-1], stated[:, 0], stated[:, -1])
    if not any(edge.any() for edge in edges):
        return None
    _, labels = cv2.connectedComponents(stated.view(np.uint8), connectivity=8)
    touching = np.unique(np.concatenate((labels[0], labels[-1], labels[:, 0], labels[:, -1])))
    is_outside = np.zeros(int(labels.max()) + 1, dtype=np.bool_)
    is_outside[touching] = True
    is_outside[0] = False  # the background of `connectedComponents` is the image
    padding = np.asarray(is_outside[labels])
    # A range of all values there are is none of padding.
    return None if float(padding.mean()) > _MAX_SHARE else padding


def _as_stored(value: int, stored: NDArray[Any], bits: int) -> int:
    """Return a value as the image's samples hold it.

    The same 16 bits are -2000 or 63536, by a representation (SS or US) that files get wrong, and
    in samples of fewer bits the lowest of them are left.
    """
    limits = np.iinfo(stored.dtype)
    if limits.min <= value <= limits.max:
        return value
    bits = min(bits, 8 * stored.dtype.itemsize)
    if bits < 16 and value & (2**bits - 1) == 0:
        return value  # nothing of it is left to know it by
    value &= 2**bits - 1
    return value - 2**bits if limits.min < 0 and value >= 2 ** (bits - 1) else value
