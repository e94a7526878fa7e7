"""Find images that are the same X-ray: copied, resized, recompressed or re-windowed.

Two perceptual hashes propose pairs, the correlation of thumbnails decides; where it leaves
doubt, one thumbnail is first laid over the other, since copies are often cropped a little.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from lungwatch.training.pixels import FloatArray
from lungwatch.training.scan import Look

# 64-bit hashes of unrelated chest X-rays differ in some 20 bits or more.
MAX_HAMMING = 12
# Of thumbnails without their coarse shading, which all chests share.
MIN_CORRELATION = 0.9
# After alignment (Evangelidis & Psarakis 2008, doi:10.1109/TPAMI.2008.113). On some 1,200 pairs
# of real X-rays copies reached 0.985 and more, others 0.935 at most; below 0.65 nobody aligns.
MIN_ALIGNED_CORRELATION = 0.96
_WORTH_ALIGNING = 0.65
# Margin, in thumbnail pixels, that only one of two differently cropped copies may show.
_CROP_PX = 6
_SHADING_SIGMA_PX = 4.0
_CHUNK = 1024


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two files that show the same.

    Attributes
    ----------
    first, second
        Positions in the list that was searched, first < second.
    identical
        Whether their bytes are the same.
    correlation
        Of the thumbnails' details, at most 1; after alignment where that was needed.
    """

    first: int
    second: int
    identical: bool
    correlation: float


def find_duplicates(looks: Sequence[Look]) -> list[Pair]:
    """List all pairs of identical or nearly identical images, in order of position.

    Notes
    -----
    Mirrored, strongly rotated and strongly cropped copies are not found.
    """
    if len(looks) < 2:
        return []
    thumbnails = np.stack([look.thumbnail for look in looks])
    details = _details(thumbnails)
    hashes = (_phash(thumbnails), _dhash(thumbnails))
    digests: dict[str, int] = {}
    identity = np.array([digests.setdefault(look.sha256, len(digests)) for look in looks])
    pairs = []
    for start in range(0, len(looks), _CHUNK):
        part = slice(start, start + _CHUNK)
        same = identity[part, None] == identity[None, :]
        candidates = same.copy()
        for bits in hashes:
            # For bits written as ±1 the product is 64 - 2 x the Hamming distance.
            candidates |= bits[part] @ bits.T >= 64 - 2 * MAX_HAMMING
        firsts, seconds = np.nonzero(candidates)
        firsts += start
        upper = firsts < seconds
        for first, second in zip(firsts[upper], seconds[upper], strict=True):
            correlation = float(details[first] @ details[second])
            identical = bool(identity[first] == identity[second])
            same_picture = identical or correlation >= MIN_CORRELATION
            if not same_picture and correlation >= _WORTH_ALIGNING:
                correlation = _aligned_correlation(thumbnails[first], thumbnails[second])
                same_picture = correlation >= MIN_ALIGNED_CORRELATION
            if same_picture:
                pairs.append(
                    Pair(
                        first=int(first),
                        second=int(second),
                        identical=identical,
                        correlation=min(1.0, correlation),
                    )
                )
    return pairs


def _aligned_correlation(one: FloatArray, other: FloatArray) -> float:
    """Correlate the details of two thumbnails after an affine map of one onto the other."""
    warp = np.eye(2, 3, dtype=np.float32)
    stop = (cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_COUNT, 50, 1e-4)
    try:
        _, found = cv2.findTransformECC(one, other, warp, cv2.MOTION_AFFINE, stop)
    except cv2.error:  # it diverged: nothing in the one resembles the other
        return 0.0
    moved = cv2.warpAffine(
        other,
        found,
        one.shape[::-1],
        flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
        borderMode=cv2.BORDER_REPLICATE,
    )
    inner = slice(_CROP_PX, -_CROP_PX)
    first, second = _details(np.stack([one, moved]), inner)
    return float(first @ second)


def _details(thumbnails: FloatArray, shown: slice = slice(None)) -> FloatArray:
    """Flatten to unit vectors without coarse shading, float32, shape (N, pixels shown)."""
    fine = np.stack([t - cv2.GaussianBlur(t, (0, 0), _SHADING_SIGMA_PX) for t in thumbnails])
    flat = fine[:, shown, shown].reshape(len(fine), -1)
    flat = flat - flat.mean(axis=1, keepdims=True)
    unit = flat / np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-6)
    return np.asarray(unit, dtype=np.float32)


def _phash(thumbnails: FloatArray) -> FloatArray:
    """Signs of the 64 lowest frequencies against their median (pHash), as ±1, shape (N, 64)."""
    coarse = [cv2.resize(t, (32, 32), interpolation=cv2.INTER_AREA) for t in thumbnails]
    waves = np.stack([cv2.dct(image)[:8, :8].reshape(64) for image in coarse])
    # The mean level says nothing about the picture and would pull at the median.
    median = np.median(waves[:, 1:], axis=1, keepdims=True)
    return _signs(waves > median)


def _dhash(thumbnails: FloatArray) -> FloatArray:
    """Signs of the horizontal gradient on an 8x8 grid (dHash), as ±1, shape (N, 64)."""
    coarse = [cv2.resize(t, (9, 8), interpolation=cv2.INTER_AREA) for t in thumbnails]
    return _signs(np.stack([np.diff(image, axis=1).reshape(64) > 0 for image in coarse]))


def _signs(bits: NDArray[np.bool_]) -> FloatArray:
    return np.where(bits, 1.0, -1.0).astype(np.float32)
