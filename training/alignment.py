"""Lay one thumbnail over another that may be a crop of it, and say how alike they are."""

import cv2
import numpy as np

from lungwatch.training.fingerprints import Window, local_contrast
from lungwatch.training.pixels import FloatArray

_CONTRAST_SIGMA_PX = 2.0
_STOP = (cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_COUNT, 60, 1e-5)
_MARGIN_PX = 3
_LEAST_OVERLAP = 0.4
# Below this, nothing is gained by trying again on local contrast.
_HOPEFUL = 0.6


def aligned_likeness(one: FloatArray, other: FloatArray, place: Window, enough: float) -> float:
    """Correlate the local contrast of two thumbnails after an affine map of one onto the other.

    Parameters
    ----------
    one, other
        float32, shape (64, 64), 0..1.
    place
        Where in `other` the content of `one` roughly lies.
    enough
        A correlation that settles it.

    Returns
    -------
    float
        At most 1; 0 where they cannot be aligned or hardly overlap.

    Source: ECC, Evangelidis & Psarakis 2008, doi:10.1109/TPAMI.2008.113.
    """
    found = _after_alignment(one, other, one, other, place)
    if _HOPEFUL <= found < enough:
        # Equalised or otherwise bent grey values lead the alignment astray; contrast does not.
        found = max(found, _after_alignment(_contrast(one), _contrast(other), one, other, place))
    return found


def _after_alignment(
    template: FloatArray, moving: FloatArray, one: FloatArray, other: FloatArray, place: Window
) -> float:
    side = one.shape[0]
    warp = np.array(
        [
            [place.width, 0, place.left * side + (place.width - 1) / 2],
            [0, place.height, place.top * side + (place.height - 1) / 2],
        ],
        dtype=np.float32,
    )
    nothing = np.full(one.shape, 255, dtype=np.uint8)
    try:
        _, found = cv2.findTransformECC(
            template, moving, warp, cv2.MOTION_AFFINE, _STOP, nothing, 3
        )
    except cv2.error:  # it diverged: nothing in the one resembles the other
        return 0.0
    size, how = one.shape[::-1], cv2.WARP_INVERSE_MAP
    moved = cv2.warpAffine(
        other, found, size, flags=cv2.INTER_LINEAR | how, borderMode=cv2.BORDER_REPLICATE
    )
    covered = cv2.warpAffine(nothing, found, size, flags=cv2.INTER_NEAREST | how)
    both = np.zeros(one.shape, dtype=np.bool_)
    inner = slice(_MARGIN_PX, -_MARGIN_PX)
    kernel = np.ones((2 * _MARGIN_PX + 1, 2 * _MARGIN_PX + 1), np.uint8)
    both[inner, inner] = cv2.erode(covered, kernel)[inner, inner] > 0
    if both.mean() < _LEAST_OVERLAP:
        return 0.0
    return _correlation(_contrast(one)[both], _contrast(np.asarray(moved, np.float32))[both])


def _contrast(image: FloatArray) -> FloatArray:
    smooth = np.asarray(cv2.GaussianBlur(image, (0, 0), 0.8), dtype=np.float32)
    return local_contrast(smooth, _CONTRAST_SIGMA_PX)


def _correlation(one: FloatArray, other: FloatArray) -> float:
    a, b = one - one.mean(), other - other.mean()
    return float(a @ b / max(float(np.linalg.norm(a) * np.linalg.norm(b)), 1e-6))
