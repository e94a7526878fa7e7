"""Training images that give away what is tested: the same X-ray, or the same patient."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np

from lungwatch.errors import DatasetError
from lungwatch.training.duplicates import similar
from lungwatch.training.fingerprints import Fingerprints
from lungwatch.training.look import THUMBNAIL_PX
from lungwatch.training.pixels import FloatArray
from lungwatch.training.samples import Sample

LeakPolicy = Literal["refuse", "drop", "allow"]


@dataclass(frozen=True, kw_only=True)
class Leak:
    """A training image and the one outside the training set that it gives away.

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
    """Say which training images may be used beside the ones that validate and test.

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
            "`--leaks drop`, or split anew with `lungwatch dataset split`"
        )
    if len(leaking) == len(train):
        raise DatasetError(
            "every training image shows an X-ray or a patient of another split; split anew with "
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
