"""Duplicates, leaks and groups: images of the same X-ray or the same patient.

Perceptual hashes and the local contrast of a few crops propose pairs of copies: cropped, resized,
recompressed or re-windowed. Then one thumbnail is aligned with the other, and the correlation of
their local contrast decides.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal, Self

import cv2
import numpy as np
from numpy.typing import NDArray

from lungwatch.errors import DatasetError
from lungwatch.training.data.dataset import Sample
from lungwatch.training.data.pixels import FloatArray
from lungwatch.training.data.scan import THUMBNAIL_PX, ScannedImage

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
_CONTRAST_SIGMA_PX = 2.0
_STOP = (cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_COUNT, 60, 1e-5)
_MARGIN_PX = 3
_LEAST_OVERLAP = 0.4
# Below it, a second attempt on local contrast does not help.
_HOPEFUL = 0.6
# Above it, no alignment is needed.
MIN_CORRELATION = 0.95
# Among a million pairs of 1,500 real X-rays, different ones reached 0.84 at most and copies
# 0.99; one copy with arrows and a date drawn over it, 0.89.
MIN_ALIGNED_CORRELATION = 0.88
LeakPolicy = Literal["refuse", "drop", "allow"]


@dataclass(frozen=True, kw_only=True)
class Crop:
    """A part of an image, in shares of its height and width."""

    top: float
    left: float
    height: float
    width: float


def _crops() -> tuple[Crop, ...]:
    """Crops to compare a copy with, the whole image first."""
    found = [Crop(top=0.0, left=0.0, height=1.0, width=1.0)]
    places = {
        0.92: ((0, 0), (0, 1), (1, 0), (1, 1), (0.5, 0.5)),
        0.84: tuple((y, x) for y in (0, 0.5, 1) for x in (0, 0.5, 1)),
        0.76: ((0.5, 0.5),),
    }
    for share, corners in places.items():
        rest = 1 - share
        found += [Crop(top=y * rest, left=x * rest, height=share, width=share) for y, x in corners]
    for at in (0.0, 0.07, 0.14):
        found.append(Crop(top=at, left=0.0, height=0.86, width=1.0))
        found.append(Crop(top=0.0, left=at, height=1.0, width=0.86))
    return tuple(found)


CROPS = _crops()


@dataclass(frozen=True, kw_only=True, eq=False)
class Fingerprints:
    """Features by which copies are recognised.

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


def candidates(one: Fingerprints, other: Fingerprints) -> Iterator[tuple[int, int, Crop]]:
    """List pairs that may show the same: position, position, and where in the other it lies."""
    whole = _views(one.thumbnails, CROPS[0])
    for start in range(0, len(other), _CHUNK):
        part = slice(start, start + _CHUNK)
        best = np.full((len(one), len(other.thumbnails[part])), -1.0, dtype=np.float32)
        window = np.zeros(best.shape, dtype=np.uint8)
        for number, place in enumerate(CROPS):
            alike = whole @ _views(other.thumbnails[part], place).T
            better = alike > best
            best[better], window[better] = alike[better], number
        close = best >= MIN_VIEW_CORRELATION
        for bits, others in zip(one.hashes, other.hashes, strict=True):
            # For bits written as ±1 the product is 64 - 2 x the Hamming distance.
            near = bits @ others[part].T >= 64 - 2 * MAX_HAMMING
            close |= near & (best >= MIN_HASHED_CORRELATION)
        for first, second in zip(*np.nonzero(close), strict=True):
            yield int(first), start + int(second), CROPS[window[first, second]]


def local_contrast(image: FloatArray, sigma_px: float) -> FloatArray:
    """Remove brightness, contrast and shading: details over their own strength nearby."""
    fine = image - cv2.GaussianBlur(image, (0, 0), sigma_px)
    strength = np.sqrt(cv2.GaussianBlur(fine * fine, (0, 0), 3 * sigma_px))
    return np.asarray(fine / (strength + 0.01), dtype=np.float32)


def _views(thumbnails: FloatArray, place: Crop) -> FloatArray:
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


def aligned_likeness(one: FloatArray, other: FloatArray, place: Crop, enough: float) -> float:
    """Correlate the local contrast of two thumbnails after an affine map of one onto the other.

    Parameters
    ----------
    one, other
        float32, shape (64, 64), 0..1.
    place
        Where in `other` the content of `one` roughly lies.
    enough
        Correlation above which the search stops.

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
    template: FloatArray, moving: FloatArray, one: FloatArray, other: FloatArray, place: Crop
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


@dataclass(frozen=True, kw_only=True)
class DuplicatePair:
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


def find_duplicates(scans: Sequence[ScannedImage]) -> list[DuplicatePair]:
    """List all pairs of identical or nearly identical images, in order of position.

    Notes
    -----
    Mirrored, inverted and strongly rotated copies are not found, nor ones of which a crop
    took more than a quarter of the height or width.
    """
    if len(scans) < 2:
        return []
    prints = Fingerprints.of(np.stack([item.thumbnail for item in scans]))
    found = {(i, j): c for i, j, c in similar(prints, prints)}
    same_bytes: dict[str, list[int]] = {}
    for index, item in enumerate(scans):
        same_bytes.setdefault(item.sha256, []).append(index)
    identical = {pair for members in same_bytes.values() for pair in combinations(members, 2)}
    return [
        DuplicatePair(
            first=first,
            second=second,
            identical=(first, second) in identical,
            correlation=found.get((first, second), 1.0),
        )
        for first, second in sorted(identical | set(found))
    ]


def similar(one: Fingerprints, other: Fingerprints) -> Iterator[tuple[int, int, float]]:
    """Find the images of two lists that show the same, and how alike they are, at most 1.

    Where both are the same list, each pair comes up once, the smaller position first.
    """
    told: set[tuple[int, int]] = set()
    # Either may be a crop of the other.
    for swapped in (False,) if one is other else (False, True):
        left, right = (other, one) if swapped else (one, other)
        for i, j, place in candidates(left, right):
            if one is other and i == j:
                continue
            key = (min(i, j), max(i, j)) if one is other else (j, i) if swapped else (i, j)
            if key in told:
                continue
            alike = float(left.details[i] @ right.details[j])
            if alike < MIN_CORRELATION:
                alike = aligned_likeness(
                    left.thumbnails[i], right.thumbnails[j], place, MIN_ALIGNED_CORRELATION
                )
                if alike < MIN_ALIGNED_CORRELATION:
                    continue
            told.add(key)
            yield (*key, min(1.0, alike))


def clusters(size: int, links: Iterable[tuple[int, int]]) -> list[int]:
    """Number the connected components of `size` items (union-find).

    Returns
    -------
    list of int
        For each item the smallest item of its component.
    """
    root = list(range(size))

    def find(item: int) -> int:
        while root[item] != item:
            root[item] = root[root[item]]
            item = root[item]
        return item

    for one, other in links:
        low, high = sorted((find(one), find(other)))
        root[high] = low
    return [find(item) for item in range(size)]


def patient_key(item: ScannedImage) -> tuple[str, str] | None:
    """Return source and patient, which identify a patient; None if unknown."""
    if item.sample.patient:
        return item.sample.source, item.sample.patient
    if item.patient_id:
        return item.sample.source, f"dicom:{item.patient_id}"
    return None


def together(scans: Sequence[ScannedImage], pairs: Iterable[DuplicatePair]) -> list[int]:
    """Group by patient and duplicate; for each image the smallest position of its group."""
    links = [(pair.first, pair.second) for pair in pairs]
    first_of: dict[tuple[str, str], int] = {}
    for index, item in enumerate(scans):
        if key := patient_key(item):
            links.append((first_of.setdefault(key, index), index))
    return clusters(len(scans), links)


def patient_numbers(samples: Sequence[Sample]) -> NDArray[np.intp] | None:
    """Number the patients behind images, shape (N,); None if no patient is known.

    An image of an unknown patient has a number of its own.
    """
    if not any(sample.patient for sample in samples):
        return None
    first_of: dict[tuple[str, str], int] = {}
    numbers = [
        first_of.setdefault((sample.source, sample.patient), index) if sample.patient else index
        for index, sample in enumerate(samples)
    ]
    return np.array(numbers, dtype=np.intp)


@dataclass(frozen=True, kw_only=True)
class Leak:
    """A training image that shows the X-ray or the patient of another split.

    Attributes
    ----------
    train, other
        Positions in the two lists.
    same
        "X-ray" or "patient".
    """

    train: int
    other: int
    same: Literal["X-ray", "patient"]


def apply_leaks(
    train: Sequence[Sample],
    train_pixels: FloatArray,
    others: Sequence[Sample],
    other_pixels: FloatArray,
    policy: LeakPolicy,
) -> list[int]:
    """Choose the training images that share no X-ray or patient with the other splits.

    Parameters
    ----------
    train, others
        The training images, and those of the other splits.
    train_pixels, other_pixels
        Preprocessed, float32, shape (N, size_px, size_px, 1), 0..1, in the same order.
    policy
        "refuse" stops at a leak, "drop" leaves the leaking training images out, "allow" does
        not look.

    Returns
    -------
    list of int
        Positions in `train`, ascending.

    Raises
    ------
    DatasetError
        Under "refuse", if there is a leak; or if nothing is left.
    """
    if policy == "allow":
        return list(range(len(train)))
    leaks = find_leaks(train, train_pixels, others, other_pixels)
    leaking = {leak.train for leak in leaks}
    if leaks and policy == "refuse":
        first = leaks[0]
        what = "show the same X-ray" if first.same == "X-ray" else "are of one patient"
        raise DatasetError(
            f"leak: {_named(train[first.train])} and {_named(others[first.other])} {what}; "
            f"{len(leaking)} of {len(train)} training images are such. Leave them out with "
            "`--leaks drop`, or split again with `lungwatch dataset split`"
        )
    if len(leaking) == len(train):
        raise DatasetError(
            "every training image shows an X-ray or a patient of another split; split again with "
            "`lungwatch dataset split`"
        )
    return [index for index in range(len(train)) if index not in leaking]


def find_leaks(
    train: Sequence[Sample],
    train_pixels: FloatArray,
    others: Sequence[Sample],
    other_pixels: FloatArray,
) -> list[Leak]:
    """List what `apply_leaks` acts on, one leak for each training image that has any."""
    found: dict[int, Leak] = {}
    if len(train) and len(others):
        pairs = similar(_fingerprints(train_pixels), _fingerprints(other_pixels))
        for index, other, _ in pairs:
            found.setdefault(index, Leak(train=index, other=other, same="X-ray"))
    patients: dict[tuple[str, str], int] = {}
    for index, sample in enumerate(others):
        if sample.patient:
            patients.setdefault((sample.source, sample.patient), index)
    for index, sample in enumerate(train):
        there = patients.get((sample.source, sample.patient))
        if there is not None:
            found.setdefault(index, Leak(train=index, other=there, same="patient"))
    return [found[index] for index in sorted(found)]


def _named(sample: Sample) -> str:
    return f"{sample.path} ({sample.split or 'no split'})"


def _fingerprints(pixels: FloatArray) -> Fingerprints:
    side = (THUMBNAIL_PX, THUMBNAIL_PX)
    shrinks = pixels.shape[1] >= THUMBNAIL_PX
    how = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    small = [cv2.resize(_unpadded(image[:, :, 0]), side, interpolation=how) for image in pixels]
    return Fingerprints.of(np.stack(small).astype(np.float32))


def _unpadded(image: FloatArray) -> FloatArray:
    """Cut off what `preprocess` adds to keep an aspect: equal black bands on two sides.

    Left in, the bands' sharp edges would make all images of one aspect look alike.
    """
    for axis in (0, 1):
        shown = np.flatnonzero(image.max(axis=1 - axis) > 0.0)
        if len(shown):
            band = min(int(shown[0]), len(image) - 1 - int(shown[-1]))
            if band > 0:
                inner = slice(band, image.shape[axis] - band)
                return image[inner] if axis == 0 else image[:, inner]
    return image
