"""A synthetic chest picture that every installation generates bit for bit.

It shows no patient. A model's contract holds what the model answered on it, so that a
broken file, codec, runtime or processor is found before the first real X-ray is scored.
"""

import hashlib

import numpy as np
from numpy.typing import NDArray

from lungwatch.imaging.radiograph import FloatImage
from lungwatch.preprocess import PreprocessSpec, preprocess

_SIDE = 512


def golden_pixels() -> FloatImage:
    """Draw a caricature of a frontal chest X-ray.

    Returns
    -------
    numpy.ndarray
        float32, shape (512, 512), 0..1: bright body on dark air, two dark lungs, a bright
        heart and spine, ribs. Made of polynomials only, so that no mathematical library's
        rounding enters; values are multiples of 1/255.
    """
    y, x = np.mgrid[0:_SIDE, 0:_SIDE].astype(np.float64) / _SIDE

    def ellipse(cx: float, cy: float, rx: float, ry: float) -> NDArray[np.float64]:
        inside = 1.0 - ((x - cx) / rx) ** 2 - ((y - cy) / ry) ** 2
        return np.asarray(np.clip(inside * 4.0, 0.0, 1.0))

    picture = 0.75 * ellipse(0.5, 0.6, 0.48, 0.62)
    for cx in (0.32, 0.68):
        picture -= 0.5 * ellipse(cx, 0.47, 0.15, 0.32)
    ribs = np.abs((y * 12.0 + 2.0 * np.abs(x - 0.5)) % 1.0 - 0.5)
    picture += 0.12 * np.clip(ribs * 4.0 - 1.2, 0.0, 1.0) * ellipse(0.5, 0.47, 0.4, 0.36)
    picture += 0.25 * ellipse(0.56, 0.62, 0.14, 0.16)
    picture += 0.2 * np.clip(1.0 - np.abs(x - 0.5) * 25.0, 0.0, 1.0)
    levels = np.round(np.clip(picture, 0.0, 1.0) * 255.0).astype(np.uint8)
    return levels.astype(np.float32) / np.float32(255.0)


def golden_input(spec: PreprocessSpec) -> NDArray[np.float32]:
    """Return the golden picture as a model sees it, float32 (size_px, size_px, 1), 0..1."""
    return preprocess(golden_pixels(), spec)


def golden_digest() -> str:
    """Return the SHA-256 of the golden picture's pixels, before any preprocessing."""
    return hashlib.sha256(golden_pixels().tobytes()).hexdigest()
