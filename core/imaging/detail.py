"""Whether an X-ray has the detail that a network of a given input size was trained on."""

import cv2
import numpy as np
from numpy.typing import NDArray

# At 160 px, chest X-rays have ratios from 0.14 to 0.62; 99 % of the same enlarged from 64 or 80 px
# stay below 0.137, those from fewer below that.
_LEAST_FINE = 0.135


def lacks_detail(content: NDArray[np.float32], shape: tuple[int, int]) -> bool:
    """Say whether an X-ray has fewer pixels than the input, or was enlarged or blurred.

    The finest of the input's structures (of one to two pixels) are compared with the coarser ones
    (two to eight): in an X-ray their ratio hardly depends on exposure or contrast; where the
    picture was enlarged from half the size, there is nothing fine. One enlarged by repeating
    pixels has edges as fine as any, and is not recognised.

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
    half, quarter, eighth = (_without_detail(content, factor) for factor in (2, 4, 8))
    fine = float(np.std(content - half))
    coarser = float(np.std(half - quarter)) + float(np.std(quarter - eighth))
    return fine < _LEAST_FINE * coarser


def _without_detail(content: NDArray[np.float32], factor: int) -> NDArray[np.float32]:
    height, width = content.shape
    small = (max(1, width // factor), max(1, height // factor))
    reduced = cv2.resize(content, small, interpolation=cv2.INTER_AREA)
    return np.asarray(
        cv2.resize(reduced, (width, height), interpolation=cv2.INTER_CUBIC), dtype=np.float32
    )
