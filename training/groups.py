"""Images that must stay together: of one patient, or showing the same X-ray."""

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from lungwatch.training.duplicates import Pair
from lungwatch.training.look import Look
from lungwatch.training.samples import Sample


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


def patient_key(look: Look) -> tuple[str, str] | None:
    """Tell a patient from all others: source and patient; None if unknown."""
    if look.sample.patient:
        return look.sample.source, look.sample.patient
    if look.patient_id:
        return look.sample.source, f"dicom:{look.patient_id}"
    return None


def together(looks: Sequence[Look], pairs: Iterable[Pair]) -> list[int]:
    """Group by patient and duplicate; for each image the smallest position of its group."""
    links = [(pair.first, pair.second) for pair in pairs]
    first_of: dict[tuple[str, str], int] = {}
    for index, look in enumerate(looks):
        if key := patient_key(look):
            links.append((first_of.setdefault(key, index), index))
    return clusters(len(looks), links)


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
