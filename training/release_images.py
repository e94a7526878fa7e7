"""Changed copies of radiographs: without lungs, lungs alone, and other exposures and formats."""

from collections.abc import Callable

import cv2
import numpy as np
from numpy.typing import NDArray

from lungwatch.training.pixels import FloatArray

FEWEST_LUNG = 0.08
"""Share of an image below which its lungs count as not found."""
_MARGIN = 0.02
_SPECK = 0.01
_JPEG_QUALITY = 50
_NOISE = 0.02
_SMALLER = 0.75
_TURN_DEG = 10.0


def lung_hull(mask: NDArray[np.bool_], shape: tuple[int, int]) -> NDArray[np.bool_]:
    """Return the convex hull of each lung that was found, a little enlarged.

    A lung field that was found is ragged where the lung is opaque, so that its outline alone
    would tell the finding; its hull tells far less.

    Parameters
    ----------
    mask
        bool, shape (h, w), over the radiograph: lung.
    shape
        (rows, columns) of the result, in pixels.

    Returns
    -------
    numpy.ndarray
        bool, of that shape.
    """
    rows, columns = shape
    size = (columns, rows)
    whole = cv2.resize(mask.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST)
    outlines, _ = cv2.findContours(whole, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    hull = np.zeros((rows, columns), np.uint8)
    for outline in outlines:
        if cv2.contourArea(outline) >= _SPECK * rows * columns:
            cv2.fillConvexPoly(hull, cv2.convexHull(outline), 1)
    width = 2 * round(_MARGIN * max(rows, columns)) + 1
    return np.asarray(cv2.dilate(hull, np.ones((width, width), np.uint8)) > 0)


def without_lungs(pixels: FloatArray, lungs: NDArray[np.bool_]) -> FloatArray:
    """Return the radiograph, float32 (H, W), with its lungs black."""
    return np.asarray(pixels * ~lungs, np.float32)


def lungs_alone(pixels: FloatArray, lungs: NDArray[np.bool_]) -> FloatArray:
    """Return the radiograph, float32 (H, W), with everything but its lungs black."""
    return np.asarray(pixels * lungs, np.float32)


def _contrast(factor: float) -> Callable[[FloatArray], FloatArray]:
    def changed(pixels: FloatArray) -> FloatArray:
        middle = pixels.mean(dtype=np.float64)
        return np.asarray(np.clip((pixels - middle) * factor + middle, 0.0, 1.0), np.float32)

    return changed


def _gamma(exponent: float) -> Callable[[FloatArray], FloatArray]:
    return lambda pixels: np.asarray(np.clip(pixels, 0.0, 1.0) ** exponent, np.float32)


def _jpeg(pixels: FloatArray) -> FloatArray:
    grey = np.round(np.clip(pixels, 0.0, 1.0) * 255.0).astype(np.uint8)
    _, data = cv2.imencode(".jpg", grey, [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY])
    return np.asarray(cv2.imdecode(data, cv2.IMREAD_GRAYSCALE), np.float32) / np.float32(255.0)


def _noise(pixels: FloatArray) -> FloatArray:
    # The image seeds its own noise, so that the same file gives the same answer.
    rng = np.random.default_rng([round(float(pixels.mean(dtype=np.float64)) * 1e6), pixels.size])
    grain = rng.normal(0.0, _NOISE, pixels.shape).astype(np.float32)
    return np.asarray(np.clip(pixels + grain, 0.0, 1.0), np.float32)


def _smaller(pixels: FloatArray) -> FloatArray:
    rows, columns = (max(1, round(side * _SMALLER)) for side in pixels.shape)
    small = cv2.resize(pixels, (columns, rows), interpolation=cv2.INTER_AREA)
    return np.asarray(small, np.float32)


def _turned(degrees: float) -> Callable[[FloatArray], FloatArray]:
    def changed(pixels: FloatArray) -> FloatArray:
        rows, columns = pixels.shape
        matrix = cv2.getRotationMatrix2D(((columns - 1) / 2, (rows - 1) / 2), degrees, 1.0)
        turned = cv2.warpAffine(pixels, matrix, (columns, rows), flags=cv2.INTER_LINEAR)
        return np.asarray(turned, np.float32)

    return changed


CHANGES: dict[str, Callable[[FloatArray], FloatArray]] = {
    "contrast + 25 %": _contrast(1.25),
    "contrast - 25 %": _contrast(0.75),
    "gamma 0.8": _gamma(0.8),
    "gamma 1.25": _gamma(1.25),
    f"JPEG, quality {_JPEG_QUALITY}": _jpeg,
    f"noise, {_NOISE:.0%} of the range": _noise,
    f"resized to {_SMALLER:.0%}": _smaller,
    f"turned by + {_TURN_DEG:g}°": _turned(_TURN_DEG),
    f"turned by - {_TURN_DEG:g}°": _turned(-_TURN_DEG),
}
"""Name -> how a radiograph, float32 (H, W), 0..1, is changed."""
