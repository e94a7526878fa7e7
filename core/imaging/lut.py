"""Look-up tables of DICOM: modality LUT and VOI LUT (PS3.3 C.11.1.1.1, C.11.2.1.1)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset


@dataclass(frozen=True, kw_only=True, eq=False)
class Lut:
    """A look-up table.

    Attributes
    ----------
    first
        The input value that the first entry is for.
    bits
        Of an entry, as stated.
    entries
        uint8 or uint16, shape (n,).
    """

    first: int
    bits: int
    entries: NDArray[Any]

    def apply(self, values: NDArray[Any]) -> NDArray[Any]:
        """Look values up; those outside the table take its first or last entry.

        Parameters
        ----------
        values
            Any real type; fractions, which a rescaling leaves, are rounded.
        """
        if not np.issubdtype(values.dtype, np.integer):
            # Tables lie within 17 bits: further out nothing differs any more.
            values = np.rint(np.clip(values, -(2**20), 2**20))
        index = values.astype(np.int32)
        index -= self.first
        return self.entries.take(index, mode="clip")


def read_lut(dataset: Dataset, keyword: str, values: NDArray[Any]) -> Lut | None:
    """Read the first table of a sequence.

    Parameters
    ----------
    keyword
        "ModalityLUTSequence" or "VOILUTSequence"; of several alternatives the first counts.
    values
        What it will be applied to; its range tells how an ambiguous first value is meant.

    Returns
    -------
    Lut or None
        None if there is no such table.

    Raises
    ------
    ValueError
        If the table contradicts its descriptor.
    """
    items = dataset.get(keyword)
    if not items:
        return None
    item = items[0]
    count, first, bits = (int(value) for value in item.LUTDescriptor)
    # 65536 does not fit into the attribute, and is written as 0.
    count = count or 2**16
    if not 1 <= bits <= 16:
        raise ValueError(f"a look-up table of {bits} bits")
    # The attribute is signed or not by the file's values, not by those that a rescaling makes.
    if first >= 2**15 and float(values.min()) < 0:
        first -= 2**16
    elif first < 0 and float(values.min()) >= 0 and float(values.max()) >= first + 2**16:
        first += 2**16
    # Only elements that pydicom took for words have been put in this machine's order.
    is_big_endian = dataset.original_encoding[1] is False
    entries = _entries(item.LUTData, count, order=">" if is_big_endian else "<")
    if len(entries) < count:
        raise ValueError("a look-up table shorter than its descriptor says")
    return Lut(first=first, bits=bits, entries=entries[:count])


def _entries(data: bytes | int | Sequence[int], count: int, *, order: str) -> NDArray[Any]:
    if isinstance(data, bytes):
        if len(data) < 2 * count:
            return np.frombuffer(data, dtype=np.uint8)
        return np.frombuffer(data[: 2 * count], dtype=f"{order}u2").astype(np.uint16)
    words = np.atleast_1d(np.asarray(data, dtype=np.int64)).astype(np.uint16)
    # Entries of 8 bits may come two in a word, the first one low.
    return words.astype("<u2").view(np.uint8) if len(words) < count else words
