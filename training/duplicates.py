"""Find images that are the same X-ray: copied, cropped, resized, recompressed or re-windowed.

Perceptual hashes and the local contrast of a few crops propose pairs; then one thumbnail is
laid over the other, and the correlation of their local contrast decides.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from lungwatch.training.alignment import aligned_likeness
from lungwatch.training.fingerprints import Fingerprints, candidates
from lungwatch.training.look import Look

# Details that agree so well without any alignment settle it.
MIN_CORRELATION = 0.95
# Among a million pairs of 1,500 real X-rays, different ones reached 0.84 at most and copies
# 0.99; one copy with arrows and a date drawn over it, 0.89.
MIN_ALIGNED_CORRELATION = 0.88


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
    Mirrored, inverted and strongly rotated copies are not found, nor ones of which a crop
    took more than a quarter of the height or width.
    """
    if len(looks) < 2:
        return []
    prints = Fingerprints.of(np.stack([look.thumbnail for look in looks]))
    found = {(i, j): c for i, j, c in similar(prints, prints)}
    same_bytes: dict[str, list[int]] = {}
    for index, look in enumerate(looks):
        same_bytes.setdefault(look.sha256, []).append(index)
    identical = {pair for members in same_bytes.values() for pair in combinations(members, 2)}
    return [
        Pair(
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
