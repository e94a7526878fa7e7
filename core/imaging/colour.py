"""Pictures in colour channels: grey ones and tinted films become grey, coloured ones are refused.

One rule for DICOM, PNG and JPEG.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lungwatch.errors import FileRejected, Reason
from lungwatch.imaging.radiograph import FloatImage

# A grey image's channels differ by what lossy compression does to them.
_MAX_CHROMA = 0.1
# A side mark, a logo or a line of text in colours is no part of the X-ray.
_MAX_COLOURED_SHARE = 0.03
# A tint is one hue, give or take what a camera makes of it, in degrees.
_MAX_HUE_SPREAD = 25.0
# And it is the same for the same grey, within this, but for this share of the pixels.
_MAX_TINT_ERROR = 0.1
_MAX_STRAY_SHARE = 0.05
_GREY_LEVELS = 32
# Luma as in ITU-R BT.601.
_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)
_SAMPLED_SIDE_PX = 512


def grey_of(stored: NDArray[Any], white: float) -> FloatImage:
    """Return the luma of a picture whose channels are equal, or that has one tint.

    Parameters
    ----------
    stored
        Red, green and blue, 8 or 16 bits, shape (rows, columns, 3).
    white
        The value that is full brightness.

    Returns
    -------
    numpy.ndarray
        float32, shape (rows, columns), 0..1.

    Raises
    ------
    FileRejected
        If the picture is in colours: no X-ray is.
    """
    stride = max(1, max(stored.shape[:2]) // _SAMPLED_SIDE_PX)
    sample = stored[::stride, ::stride].astype(np.float32).reshape(-1, 3) / np.float32(white)
    is_coloured = np.ptp(sample, axis=1) > _MAX_CHROMA
    if float(np.mean(is_coloured)) > _MAX_COLOURED_SHARE and not _is_tinted(sample, is_coloured):
        raise FileRejected(
            Reason.UNSUPPORTED_PIXEL_FORMAT,
            "the image is in colours; an X-ray's channels are equal, or tinted in one hue",
        )
    grey = stored.astype(np.float32) @ (_LUMA / np.float32(white))
    return np.asarray(np.clip(grey, 0.0, 1.0), dtype=np.float32)


def _is_tinted(sample: FloatImage, is_coloured: NDArray[np.bool_]) -> bool:
    """Whether colours are those of one film: a single hue, and a function of the grey."""
    red, green, blue = sample[is_coloured].T
    # The two chroma axes of a hexagon's hue, opposite to each other for opposite colours.
    hue = np.arctan2(np.sqrt(3.0) * (green - blue), 2 * red - green - blue)
    mean = np.angle(np.mean(np.exp(1j * hue)))
    deviation = np.degrees(np.abs(np.angle(np.exp(1j * (hue - mean)))))
    if np.count_nonzero(deviation > _MAX_HUE_SPREAD) > _MAX_COLOURED_SHARE * len(sample):
        return False
    level = (sample @ _LUMA * (_GREY_LEVELS - 1)).round().astype(np.intp)
    is_stray = np.zeros(len(sample), dtype=np.bool_)
    for one in np.unique(level):
        alike = level == one
        chroma = sample[alike] - (sample[alike] @ _LUMA)[:, np.newaxis]
        is_stray[alike] = np.abs(chroma - np.median(chroma, axis=0)).max(axis=1) > _MAX_TINT_ERROR
    return float(np.mean(is_stray)) <= _MAX_STRAY_SHARE
