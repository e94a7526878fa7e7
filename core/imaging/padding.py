"""Pixels that are no measurement: what a modality fills up a rectangle with."""

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from lungwatch.imaging.attributes import numbers_of


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
    values = (
        *numbers_of(dataset, "PixelPaddingValue")[:1],
        *numbers_of(dataset, "PixelPaddingRangeLimit")[:1],
    )
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
    return np.asarray(is_outside[labels])
