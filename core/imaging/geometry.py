"""Pixels that are not square are made so: a network sees shapes, not attributes."""

import cv2
import numpy as np
from pydicom.dataset import Dataset

from lungwatch.errors import FileRejected, Reason
from lungwatch.imaging.attributes import numbers_of
from lungwatch.imaging.radiograph import FloatImage

# Below it lies the rounding of the spacings that files state.
_TOLERANCE = 0.01
# Detectors and film scanners stay well within; what does not is a typing error.
_MAX_RATIO = 4.0
# Row spacing, that is, a pixel's height, comes first: PS3.3 10.7.1.3, C.7.6.3.1.7.
_KEYWORDS = (
    "ImagerPixelSpacing",
    "PixelSpacing",
    "NominalScannedPixelSpacing",
    "PixelAspectRatio",
)


def square_pixels(pixels: FloatImage, dataset: Dataset) -> FloatImage:
    """Resample an image with rectangular pixels to square ones.

    The finer of the two sides is reduced, so that nothing is invented and the image does not
    grow.

    Parameters
    ----------
    pixels
        float32, shape (rows, columns), 0..1.
    dataset
        The attributes that may hold a pixel's height and width.

    Returns
    -------
    numpy.ndarray
        float32, shape (rows', columns'), 0..1; `pixels` itself if they are square already,
        within 1 %, or if nothing is said.

    Raises
    ------
    FileRejected
        If a pixel is stated to be more than four times as long as wide.
    """
    ratio = _height_to_width(dataset)
    if abs(ratio - 1) <= _TOLERANCE:
        return pixels
    if not 1 / _MAX_RATIO <= ratio <= _MAX_RATIO:
        raise FileRejected(
            Reason.UNSUPPORTED_PIXEL_FORMAT,
            f"a pixel's height is stated as {ratio:.3g} times its width",
        )
    rows, columns = pixels.shape
    if ratio > 1:
        size = max(1, round(columns / ratio)), rows
    else:
        size = columns, max(1, round(rows * ratio))
    return np.asarray(cv2.resize(pixels, size, interpolation=cv2.INTER_AREA), dtype=np.float32)


def _height_to_width(dataset: Dataset) -> float:
    for keyword in _KEYWORDS:
        values = numbers_of(dataset, keyword)
        if len(values) == 2 and min(values) > 0 and max(values) < float("inf"):
            return values[0] / values[1]
    return 1.0
