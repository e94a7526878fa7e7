"""What copies of an X-ray are recognised by: perceptual hashes and local contrast."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

import cv2
import numpy as np
from numpy.typing import NDArray

from lungwatch.training.pixels import FloatArray

# All chest X-rays resemble each other: a quarter of unrelated pairs differ in no more bits of
# one of the hashes, so these count only together with some correlation of local contrast,
# which one in 250 of unrelated pairs has.
MAX_HAMMING = 12
MIN_HASHED_CORRELATION = 0.6
# Correlation of local contrast, of which one pair of unrelated chest X-rays in 2,000 has more.
MIN_VIEW_CORRELATION = 0.64
_VIEW_PX = 32
_VIEW_SIGMA_PX = 1.0
_SHADING_SIGMA_PX = 4.0
# Of images; bounds the memory of a block.
_CHUNK = 512


@dataclass(frozen=True, kw_only=True)
class Window:
    """A part of an image, in shares of its height and width."""

    top: float
    left: float
    height: float
    width: float


def _windows() -> tuple[Window, ...]:
    """Crops that a copy may be near to, the whole image first."""
    found = [Window(top=0.0, left=0.0, height=1.0, width=1.0)]
    places = {
        0.92: ((0, 0), (0, 1), (1, 0), (1, 1), (0.5, 0.5)),
        0.84: tuple((y, x) for y in (0, 0.5, 1) for x in (0, 0.5, 1)),
        0.76: ((0.5, 0.5),),
    }
    for share, corners in places.items():
        rest = 1 - share
        found += [
            Window(top=y * rest, left=x * rest, height=share, width=share) for y, x in corners
        ]
    for at in (0.0, 0.07, 0.14):
        found.append(Window(top=at, left=0.0, height=0.86, width=1.0))
        found.append(Window(top=0.0, left=at, height=1.0, width=0.86))
    return tuple(found)


WINDOWS = _windows()


@dataclass(frozen=True, kw_only=True, eq=False)
class Fingerprints:
    """What copies are recognised by.

    Attributes
    ----------
    thumbnails
        float32, shape (N, 64, 64), 0..1.
    details
        Unit vectors of the thumbnails without coarse shading, float32, shape (N, 4096).
    hashes
        Perceptual hashes, their bits as ±1, each float32, shape (N, 64).
    """

    thumbnails: FloatArray
    details: FloatArray
    hashes: tuple[FloatArray, FloatArray]

    @classmethod
    def of(cls, thumbnails: FloatArray) -> Self:
        """Take the fingerprints of thumbnails, float32, shape (N, 64, 64), 0..1."""
        fine = [t - cv2.GaussianBlur(t, (0, 0), _SHADING_SIGMA_PX) for t in thumbnails]
        return cls(
            thumbnails=thumbnails,
            details=_unit(np.stack(fine)),
            hashes=(_phash(thumbnails), _dhash(thumbnails)),
        )

    def __len__(self) -> int:
        return len(self.thumbnails)


def candidates(one: Fingerprints, other: Fingerprints) -> Iterator[tuple[int, int, Window]]:
    """List pairs that may show the same: position, position, and where in the other it lies."""
    whole = _views(one.thumbnails, WINDOWS[0])
    for start in range(0, len(other), _CHUNK):
        part = slice(start, start + _CHUNK)
        best = np.full((len(one), len(other.thumbnails[part])), -1.0, dtype=np.float32)
        window = np.zeros(best.shape, dtype=np.uint8)
        for number, place in enumerate(WINDOWS):
            alike = whole @ _views(other.thumbnails[part], place).T
            better = alike > best
            best[better], window[better] = alike[better], number
        close = best >= MIN_VIEW_CORRELATION
        for bits, others in zip(one.hashes, other.hashes, strict=True):
            # For bits written as ±1 the product is 64 - 2 x the Hamming distance.
            near = bits @ others[part].T >= 64 - 2 * MAX_HAMMING
            close |= near & (best >= MIN_HASHED_CORRELATION)
        for first, second in zip(*np.nonzero(close), strict=True):
            yield int(first), start + int(second), WINDOWS[window[first, second]]


def local_contrast(image: FloatArray, sigma_px: float) -> FloatArray:
    """Remove brightness, contrast and shading: details over their own strength nearby."""
    fine = image - cv2.GaussianBlur(image, (0, 0), sigma_px)
    strength = np.sqrt(cv2.GaussianBlur(fine * fine, (0, 0), 3 * sigma_px))
    return np.asarray(fine / (strength + 0.01), dtype=np.float32)


def _views(thumbnails: FloatArray, place: Window) -> FloatArray:
    """Local contrast of one window of each image, unit vectors, float32, shape (N, 1024)."""
    side = thumbnails.shape[1]
    down, across = (share * side / _VIEW_PX for share in (place.height, place.width))
    warp = np.array(
        [
            [across, 0, place.left * side + (across - 1) / 2],
            [0, down, place.top * side + (down - 1) / 2],
        ],
        dtype=np.float32,
    )
    size = (_VIEW_PX, _VIEW_PX)
    how = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    seen = [
        cv2.warpAffine(
            cv2.GaussianBlur(t, (0, 0), 0.8), warp, size, flags=how, borderMode=cv2.BORDER_REPLICATE
        )
        for t in thumbnails
    ]
    return _unit(
        np.stack([local_contrast(np.asarray(v, np.float32), _VIEW_SIGMA_PX) for v in seen])
    )


def _unit(images: FloatArray) -> FloatArray:
    flat = images.reshape(len(images), -1)
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
