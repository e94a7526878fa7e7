"""Whether an X-ray has the detail that a network of a given input size was trained on."""

import cv2
import numpy as np
from numpy.typing import NDArray

# Chest X-rays have ratios from 0.39 to 1.4 at 160 px, pictures enlarged from 64 px 0.22 to 0.39.
_LEAST_FINE = 0.36


def lacks_detail(content: NDArray[np.float32], shape: tuple[int, int]) -> bool:
    """Say whether an X-ray has fewer pixels than the input, or was enlarged or blurred.

    The finest of the input's structures (of one to two pixels) are compared with the next coarser
    ones (two to four): in an X-ray, their ratio hardly depends on exposure or contrast; where the
    picture was enlarged from half the size, there is nothing fine. Enlarged by repeating pixels,
    it has edges as fine as any, and is not recognised.

    Parameters
    ----------
    content
        float32, shape (h, w): the network's input without its padding.
    shape
        (rows, columns) of the radiograph.
    """
    height, width = content.shape
    if shape[0] < height or shape[1] < width:
        return True
    half, quarter = (_without_detail(content, factor) for factor in (2, 4))
    fine, coarse = float(np.std(content - half)), float(np.std(half - quarter))
    return fine < _LEAST_FINE * coarse


def _without_detail(content: NDArray[np.float32], factor: int) -> NDArray[np.float32]:
    height, width = content.shape
    small = (max(1, width // factor), max(1, height // factor))
    reduced = cv2.resize(content, small, interpolation=cv2.INTER_AREA)
    return np.asarray(
        cv2.resize(reduced, (width, height), interpolation=cv2.INTER_CUBIC), dtype=np.float32
    )
