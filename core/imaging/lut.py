"""Look-up tables of DICOM: modality LUT and VOI LUT (PS3.3 C.11.1.1.1, C.11.2.1.1)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from lungwatch.imaging.attributes import number_of

# A curve of grey values goes up or down, and may turn once or twice; bytes of words that were
# taken for entries go up and down all the time.
_MAX_TRAVEL = 4.0
# Of a table's length, by which it goes on beyond all values there can be and begins as much too
# late; and of the pixels, those that are left out for it.
_SHIFT = 0.2
_MAX_OUTSIDE_SHARE = 0.02


class LutError(ValueError):
    """A look-up table that contradicts its descriptor, or lacks a part."""


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

    @property
    def is_depth_wrong(self) -> bool:
        """Whether the entries exceed the stated bits, or leave more than the highest unused."""
        top = int(self.entries.max())
        return not 2 ** (self.bits - 1) <= top + 1 <= 2**self.bits

    @property
    def white(self) -> int:
        """The output value that is white: of the stated depth, or else the largest entry."""
        return max(int(self.entries.max()), 1) if self.is_depth_wrong else 2**self.bits - 1

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


def read_lut(
    dataset: Dataset, keyword: str, values: NDArray[Any], *, number: int = 0
) -> Lut | None:
    """Read a table of a sequence.

    Parameters
    ----------
    keyword
        "ModalityLUTSequence" or "VOILUTSequence".
    values
        What it will be applied to; its range tells how an ambiguous first value is meant.
    number
        Of the item, from 0.

    Returns
    -------
    Lut or None
        None if there is no such table.

    Raises
    ------
    LutError
        If the table contradicts its descriptor or lacks a part, or begins at a value that is
        not the image's: none of its entries but the first or the last would be used, or values
        lie on its one side while it goes on where there can be none on the other.
    """
    items = dataset.get(keyword)
    if not items or number >= len(items):
        return None
    item = items[number]
    try:
        count, first, bits = (int(value) for value in item.LUTDescriptor)
        data = item.LUTData
    # Damaged values are decoded here, and may raise anything at all.
    except Exception as error:
        raise LutError("a look-up table without its descriptor or data") from error
    # 65536 does not fit into the attribute, and is written as 0.
    count = count or 2**16
    if not 1 <= bits <= 16 or count < 2:
        raise LutError(f"a look-up table of {count} entries of {bits} bits")
    low, high = float(values.min()), float(values.max())
    # The attribute is signed or not by the file's values, not by those that a rescaling makes.
    if first >= 2**15 and low < 0:
        first -= 2**16
    elif first < 0 and low >= 0 and high >= first + 2**16:
        first += 2**16
    if high <= first or low >= first + count - 1 or _is_shifted(dataset, values, first, count):
        raise LutError("a look-up table for values that the image does not hold")
    # Only elements that pydicom took for words have been put in this machine's order.
    is_big_endian = dataset.original_encoding[1] is False
    return Lut(
        first=first,
        bits=bits,
        entries=_entries(data, count, bits, order=">" if is_big_endian else "<"),
    )


def _is_shifted(dataset: Dataset, values: NDArray[Any], first: int, count: int) -> bool:
    """Whether a table's first value is wrong, by the values that Bits Stored and slope allow."""
    if not np.issubdtype(values.dtype, np.integer) or "ModalityLUTSequence" in dataset:
        return False
    lowest, highest = 0, 2 ** number_of(dataset, "BitsStored", 16) - 1
    if values.dtype.kind == "i":
        lowest, highest = -(highest + 1) // 2, highest // 2
    last = first + count - 1
    above, below = (last - highest) / count, (first - lowest) / count
    # On both sides by a fifth; or by less, where pixels are left out for it.
    return bool(
        min(above, below) > _SHIFT
        or (-below > _SHIFT and -above > _SHIFT)
        or (above > _SHIFT / 2 and np.mean(values < first) > _MAX_OUTSIDE_SHARE)
        or (-below > _SHIFT / 2 and np.mean(values > last) > _MAX_OUTSIDE_SHARE)
    )


def _entries(
    data: bytes | int | Sequence[int] | None, count: int, bits: int, *, order: str
) -> NDArray[Any]:
    """Take entries out of words, or out of bytes where the number of entries wants it."""
    if isinstance(data, bytes):
        words = np.frombuffer(data[: len(data) // 2 * 2], dtype=f"{order}u2").astype(np.uint16)
        packed = np.frombuffer(data, dtype=np.uint8)
    elif data is None:
        raise LutError("a look-up table without data")
    else:
        words = np.atleast_1d(np.asarray(data, dtype=np.int64)).astype(np.uint16)
        # Entries of 8 bits may come two in a word, the first one low.
        packed = words.astype("<u2").view(np.uint8)
    if len(words) == count:
        return words
    # An odd number of bytes is padded (PS3.5 7.1.1).
    if len(packed) in (count, count + 1) and (bits <= 8 or _is_curve(packed[:count])):
        return packed[:count]
    raise LutError(f"a look-up table of {len(words)} entries whose descriptor says {count}")


def _is_curve(entries: NDArray[np.uint8]) -> bool:
    travel = float(np.abs(np.diff(entries.astype(np.int32))).sum())
    return travel <= _MAX_TRAVEL * float(np.ptp(entries))
