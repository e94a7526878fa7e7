"""Grey values: look-up tables, windows, the range of a picture, colours made grey."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from lungwatch.errors import FileRejected, Reason
from lungwatch.imaging.radiograph import FloatImage, code_of, number_of, numbers_of, text_of

# Lightest part, darkest part and contrast that a picture has at least to show a chest.
_NEARLY_BLACK = 0.3
_NEARLY_WHITE = 0.7
_MIN_CONTRAST = 0.1
# Outliers on either side.
_TAIL_PERCENT = 0.5
_SAMPLE_SIZE = 200_000


def is_visible(grey: FloatImage, shown: NDArray[np.bool_] | None = None) -> bool:
    """Return whether a picture, 0..1, is neither nearly black, nor nearly white, nor one grey.

    `shown` is true for pixels that are not padding; None for all.
    """
    low, high = grey_extent(grey, shown)
    return high > _NEARLY_BLACK and low < _NEARLY_WHITE and high - low >= _MIN_CONTRAST


def stretch_range(values: NDArray[Any], shown: NDArray[np.bool_] | None = None) -> FloatImage:
    """Stretch values, (rows, columns), to float32 0..1, by the pixels that are `shown`.

    The outermost half percent on either side is clipped where it takes up half the range: a
    bright letter or a dead pixel must not darken all the rest.
    """
    kept = values if shown is None else values[shown]
    low, high = float(kept.min()), float(kept.max())
    most_low, most_high = grey_extent(values, shown)
    if 0 < most_high - most_low < (high - low) / 2:
        low, high = most_low, most_high
    grey = values.astype(np.float32) - np.float32(low)
    grey /= np.float32(max(high - low, 1e-6))
    return np.clip(grey, 0.0, 1.0, out=grey)


def grey_extent(
    values: NDArray[Any], shown: NDArray[np.bool_] | None = None
) -> tuple[float, float]:
    """Return the 0.5th and 99.5th percentiles of a sample of the pixels that are `shown`."""
    kept = values.ravel() if shown is None else values[shown]
    sample = kept[:: max(1, kept.size // _SAMPLE_SIZE)]
    low, high = np.percentile(sample, (_TAIL_PERCENT, 100 - _TAIL_PERCENT))
    return float(low), float(high)


# A grey image's channels differ by what lossy compression does to them.
_MAX_CHROMA = 0.1
# A side mark, a logo or a line of text in colours is not part of the X-ray.
_MAX_COLOURED_SHARE = 0.03
# A tint is one hue, in degrees, with the spread of a camera.
_MAX_HUE_SPREAD = 25.0
# It is the same for the same grey, within this, except for this share of the pixels.
_MAX_TINT_ERROR = 0.1
_MAX_STRAY_SHARE = 0.05
_GREY_LEVELS = 32
# Luma as in ITU-R BT.601.
_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)
_SAMPLED_SIDE_PX = 512


def grey_of(stored: NDArray[Any], white: float) -> FloatImage:
    """Return the luma, float32 0..1, of a picture whose channels are equal or that has one tint.

    Parameters
    ----------
    stored
        Red, green and blue, 8 or 16 bits, shape (rows, columns, 3).
    white
        The value of full brightness.

    Raises
    ------
    FileRejected
        If the picture is in colours.
    """
    stride = max(1, max(stored.shape[:2]) // _SAMPLED_SIDE_PX)
    sample = stored[::stride, ::stride].astype(np.float32).reshape(-1, 3) / np.float32(white)
    is_coloured = np.ptp(sample, axis=1) > _MAX_CHROMA
    if float(np.mean(is_coloured)) > _MAX_COLOURED_SHARE and not _is_tinted(sample, is_coloured):
        raise FileRejected(
            Reason.UNSUPPORTED_PIXEL_FORMAT,
            "the image is in colours; an X-ray's channels are equal, or tinted in one hue",
        )
    grey = stored.astype(np.float32) @ (_LUMA / np.float32(white))
    return np.asarray(np.clip(grey, 0.0, 1.0), dtype=np.float32)


def _is_tinted(sample: FloatImage, is_coloured: NDArray[np.bool_]) -> bool:
    """Return whether the colours are a film's tint: one hue, and a function of the grey."""
    red, green, blue = sample[is_coloured].T
    # The two chroma axes of a hexagon's hue, opposite to each other for opposite colours.
    hue = np.arctan2(np.sqrt(3.0) * (green - blue), 2 * red - green - blue)
    mean = np.angle(np.mean(np.exp(1j * hue)))
    deviation = np.degrees(np.abs(np.angle(np.exp(1j * (hue - mean)))))
    if np.count_nonzero(deviation > _MAX_HUE_SPREAD) > _MAX_COLOURED_SHARE * len(sample):
        return False
    level = (sample @ _LUMA * (_GREY_LEVELS - 1)).round().astype(np.intp)
    is_stray = np.zeros(len(sample), dtype=np.bool_)
    for one in np.unique(level):
        alike = level == one
        chroma = sample[alike] - (sample[alike] @ _LUMA)[:, np.newaxis]
        is_stray[alike] = np.abs(chroma - np.median(chroma, axis=0)).max(axis=1) > _MAX_TINT_ERROR
    return float(np.mean(is_stray)) <= _MAX_STRAY_SHARE


# Total variation of a table by its range: a curve of grey values turns once or twice, the bytes of
# words that were taken for entries all the time.
_MAX_TRAVEL = 4.0
# Share of a table's length by which it lies beside the possible values, and share of the pixels
# outside of it.
_SHIFT = 0.2
_MAX_OUTSIDE_SHARE = 0.02


class LutError(ValueError):
    """A look-up table contradicts its descriptor, or lacks a part."""


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
        """Return whether the entries exceed the stated bits, or leave the highest unused."""
        top = int(self.entries.max())
        return not 2 ** (self.bits - 1) <= top + 1 <= 2**self.bits

    @property
    def white(self) -> int:
        """The output value of white: of the stated depth, or else the largest entry."""
        return max(int(self.entries.max()), 1) if self.is_depth_wrong else 2**self.bits - 1

    def apply(self, values: NDArray[Any]) -> NDArray[Any]:
        """Look values up, fractions rounded; outside the table its first or last entry counts."""
        if not np.issubdtype(values.dtype, np.integer):
            # Tables lie within 17 bits: further out nothing differs any more.
            values = np.rint(np.clip(values, -(2**20), 2**20))
        index = values.astype(np.int32)
        index -= self.first
        return self.entries.take(index, mode="clip")


def read_lut(
    dataset: Dataset, keyword: str, values: NDArray[Any], *, number: int = 0
) -> Lut | None:
    """Read a table of a sequence; None if there is none.

    Parameters
    ----------
    keyword
        "ModalityLUTSequence" or "VOILUTSequence".
    values
        The table's input; its range tells how an ambiguous first value is meant.
    number
        Of the item, from 0.

    Raises
    ------
    LutError
        If the table contradicts its descriptor, lacks a part, or is for values that the image
        does not hold.
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
    """Return whether a table's first value is wrong, by the values that Bits Stored allows."""
    if not np.issubdtype(values.dtype, np.integer) or "ModalityLUTSequence" in dataset:
        return False
    lowest, highest = 0, 2 ** number_of(dataset, "BitsStored", 16) - 1
    if values.dtype.kind == "i":
        lowest, highest = -(highest + 1) // 2, highest // 2
    last = first + count - 1
    above, below = (last - highest) / count, (first - lowest) / count
    # By a fifth on both sides; or by less, where pixels lie outside.
    return bool(
        min(above, below) > _SHIFT
        or (-below > _SHIFT and -above > _SHIFT)
        or (above > _SHIFT / 2 and np.mean(values < first) > _MAX_OUTSIDE_SHARE)
        or (-below > _SHIFT / 2 and np.mean(values > last) > _MAX_OUTSIDE_SHARE)
    )


def _entries(
    data: bytes | int | Sequence[int] | None, count: int, bits: int, *, order: str
) -> NDArray[Any]:
    """Take entries from words, or from bytes where the number of entries fits those."""
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


# No physical quantity in a radiograph comes near it, and float32 still holds its square.
MAX_VALUE = 1e18
# A window with fewer pixels between black and white, or more on one side of it, belongs to another
# image, or to values before a shift that the file does not mention.
_MIN_GREY_SHARE = 0.02
_MAX_ONE_SIDE_SHARE = 0.9
# A window of the whole range of a depth: where it leaves so many pixels white, the image is deeper.
_MAX_WHITE_SHARE_OF_DEPTH = 0.25
_DEPTHS = range(7, 17)
# Share of pixels from which one value is a background.
_BACKGROUND_SHARE = 0.01


@dataclass(frozen=True, kw_only=True)
class Window:
    """A VOI window (PS3.3 C.11.2.1.2), in output units of the modality transformation.

    `function` is LINEAR, LINEAR_EXACT or SIGMOID.
    """

    center: float
    width: float
    function: str

    def apply(self, values: NDArray[Any]) -> FloatImage:
        """Return grey values; black and white may lie outside 0..1."""
        grey = values.astype(np.float32)
        if self.function == "SIGMOID":  # C.11.2.1.3.1
            grey -= np.float32(self.center)
            grey *= np.float32(-4.0 / self.width)
            # Beyond, float32 rounds to black and white anyway; exp() would overflow.
            np.clip(grey, -80.0, 80.0, out=grey)
            return np.asarray(1.0 / (1.0 + np.exp(grey)), dtype=np.float32)
        if self.function == "LINEAR_EXACT" or self.width == 1:  # C.11.2.1.3.2
            grey -= np.float32(self.center - self.width / 2)
            grey /= np.float32(self.width)
        else:  # C.11.2.1.2.1
            grey -= np.float32(self.center - 0.5 - (self.width - 1) / 2)
            grey /= np.float32(self.width - 1)
        return grey

    def belongs_to(self, values: NDArray[Any], shown: NDArray[np.bool_] | None = None) -> bool:
        """Return whether the window was made for an image, (rows, columns), by a sample of it."""
        sample = values[::8, ::8]
        if shown is not None and shown[::8, ::8].any():
            sample = sample[shown[::8, ::8]]
        sample = sample.ravel()
        grey = self.apply(sample)
        black, white = (0.01, 0.99) if self.function == "SIGMOID" else (0.0, 1.0)
        is_black, is_white = grey <= black, grey >= white
        if float(np.mean(~is_black & ~is_white)) < _MIN_GREY_SHARE:
            return False
        image = _without_background(sample)
        too_dark, too_light = float(np.mean(is_black[image])), float(np.mean(is_white[image]))
        if max(too_dark, too_light) > _MAX_ONE_SIDE_SHARE:
            return False
        if self._is_range_of_a_depth() and too_light > _MAX_WHITE_SHARE_OF_DEPTH:
            return False
        return is_visible(np.clip(grey, 0.0, 1.0))

    def _is_range_of_a_depth(self) -> bool:
        tolerance = max(1.0, self.width / 100)
        return abs(self.center - self.width / 2) <= tolerance and any(
            abs(self.width - 2**bits) <= 1 for bits in _DEPTHS
        )


def windows_of(dataset: Dataset) -> list[Window | None]:
    """Return the windows that the file states, in its order; None for one that is impossible."""
    if text_of(dataset, "WindowCenter") is None and text_of(dataset, "WindowWidth") is None:
        return []
    function = code_of(dataset, "VOILUTFunction") or "LINEAR"
    # Only LINEAR, the default, wants a width of at least 1 (C.11.2.1.3.2).
    narrowest = 1 / MAX_VALUE if function in ("LINEAR_EXACT", "SIGMOID") else 1.0
    pairs = zip_longest(
        numbers_of(dataset, "WindowCenter"), numbers_of(dataset, "WindowWidth"), fillvalue=np.nan
    )
    windows = [
        Window(center=center, width=width, function=function)
        if abs(center) < MAX_VALUE and narrowest <= width < MAX_VALUE
        else None
        for center, width in pairs
    ]
    return windows or [None]


def _without_background(sample: NDArray[Any]) -> NDArray[np.bool_]:
    """Return a mask without the lowest and the highest value, where those fill an area."""
    kept = np.ones(len(sample), dtype=np.bool_)
    for end in (sample.min(), sample.max()):
        is_end = sample == end
        if float(np.mean(is_end)) > _BACKGROUND_SHARE:
            kept &= ~is_end
    return kept if kept.any() else np.ones(len(sample), dtype=np.bool_)
