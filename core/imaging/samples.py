"""Stored samples: bit depth and sign, byte order, image shape, rows that were never written.

Where a file's statements disagree the pixels decide: in an X-ray, neighbours mostly differ by
little, and values that have been wrapped around or misread differ by much.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lungwatch.errors import FileRejected, Reason
from lungwatch.imaging.radiograph import FloatImage

# More rows would add nothing.
_SAMPLED_ROWS = 256
# Neighbours that differ by less than this share of the range are near each other.
_NEAR = 1 / 16
# Of two steps, one below this share of the other is clearly the nearer one.
_CLEARLY_NEARER = 1 / 4
# So many times more near neighbours, and at least so many, decide against the stated layout.
_PREPONDERANCE = 8
_MIN_EVIDENCE = 32
_MIN_EVIDENCE_SHARE = 1e-4
# Overshoot of a lossy codec beyond the stated range: an eighth of it, in few pixels.
_OVERSHOOT = 1 / 8
_OVERSHOT_SHARE = 1e-3


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Layout of samples in their words, as the file and its stream state it (PS3.5 8.1.1).

    Attributes
    ----------
    stored, high_bit
        Bits Stored and High Bit.
    is_signed
        Pixel Representation.
    precision
        Bits of the stream's own samples; those of the word where nothing is compressed.
    stream_is_signed
        The stream's own sign; None where streams of its kind have none. False proves nothing:
        some encoders do not support signs.
    is_lossy
        Whether the codec may have changed values.
    """

    stored: int
    high_bit: int
    is_signed: bool
    precision: int
    stream_is_signed: bool | None = None
    is_lossy: bool = False


@dataclass(frozen=True, kw_only=True, eq=False)
class Samples:
    """Stored values, (rows, columns), of 8 or 16 bits, signed or not.

    `is_corrected` says that the file's attributes would give other values.
    """

    values: NDArray[Any]
    is_corrected: bool = False


def extract_samples(words: NDArray[Any], layout: Layout) -> Samples:
    """Extract each sample's bits from its word, and extend its sign.

    Parameters
    ----------
    words
        Unsigned, 8 or 16 bits, shape (rows, columns). A signed stream's samples are extended to
        the word.

    Raises
    ------
    FileRejected
        If bits that should be unused vary with the image, and the pixels do not decide whether
        they belong to it.
    """
    word = 8 * words.dtype.itemsize
    if layout.stream_is_signed:
        return _signed_stream(words, layout, word)
    precision = min(layout.precision, word)
    width = min(layout.stored, precision)
    # A codec that was given words returns them, else right-aligned samples.
    shift = layout.high_bit + 1 - layout.stored if precision > layout.stored else 0
    is_impossible = not layout.stored - 1 <= layout.high_bit < word
    if not 0 <= shift <= precision - width:
        shift = 0
    # A sign bit beyond the stream's own bits is never set.
    signed = layout.is_signed and precision >= layout.stored
    if layout.is_lossy and precision > layout.stored:
        return _lossy(words, layout, precision)
    if precision > width:
        if shift and _is_right_aligned(words, width, shift, signed=signed):
            return Samples(values=_settled(words, 0, width, signed=signed)[0], is_corrected=True)
        if _holds_more(words, width, shift, precision, signed=signed):
            return Samples(
                values=_settled(words, 0, precision, signed=signed)[0], is_corrected=True
            )
    values, is_other_sign = _settled(words, shift, width, signed=signed, is_lossy=layout.is_lossy)
    return Samples(values=values, is_corrected=is_other_sign or is_impossible)


def _field(words: NDArray[Any], shift: int, width: int, *, signed: bool) -> NDArray[Any]:
    word = 8 * words.dtype.itemsize
    if signed:
        as_signed = words.view(f"i{words.dtype.itemsize}")
        if width == word:
            return as_signed
        aligned = np.left_shift(as_signed, word - width - shift)
        return np.asarray(np.right_shift(aligned, word - width))
    if width == word:
        return words
    moved = np.right_shift(words, shift) if shift else words
    return np.asarray(np.bitwise_and(moved, words.dtype.type(2**width - 1)))


def _settled(
    words: NDArray[Any], shift: int, width: int, *, signed: bool, is_lossy: bool = False
) -> tuple[NDArray[Any], bool]:
    """Return a field with the sign that fits the pixels, and whether that is not the stated one."""
    sample = words[:: max(1, len(words) // _SAMPLED_ROWS)]
    stated = _field(sample, shift, width, signed=signed)
    other = _field(sample, shift, width, signed=not signed)
    # Black letters on white jump from end to end, which is a step of 1 with the other sign.
    codes = _field(sample, shift, width, signed=False).astype(np.int32)
    margin = 2**width // 256 if is_lossy else 0
    half = 2 ** (width - 1)
    is_end = (codes <= margin) | (codes >= 2**width - 1 - margin)
    is_end |= (codes >= half - 1 - margin) & (codes <= half + margin)
    near = [_steps(reading) <= 2**width * _NEAR for reading in (other, stated)]
    inner = ~(is_end[:, 1:] | is_end[:, :-1])
    is_other, _ = _weigh(near[0] & ~near[1] & inner, near[1] & ~near[0] & inner)
    return _field(words, shift, width, signed=signed != is_other), is_other


def _steps(reading: NDArray[Any]) -> NDArray[np.int32]:
    return np.asarray(np.abs(np.diff(reading.astype(np.int32), axis=1)))


def _weigh(for_other: NDArray[np.bool_], for_stated: NDArray[np.bool_]) -> tuple[bool, bool]:
    """Compare the numbers of neighbours that fit another reading and the stated one.

    Returns
    -------
    tuple of bool
        Whether the other reading is clearly right, and whether the stated one may be.
    """
    others, matches = int(np.count_nonzero(for_other)), int(np.count_nonzero(for_stated))
    enough = max(_MIN_EVIDENCE, _MIN_EVIDENCE_SHARE * for_other.size)
    return (
        others >= max(enough, _PREPONDERANCE * matches),
        others < enough or matches >= _PREPONDERANCE * others,
    )


def _is_right_aligned(words: NDArray[Any], width: int, shift: int, *, signed: bool) -> bool:
    """Return whether samples lie in the lowest bits, which High Bit states as unused."""
    if not np.any(words & words.dtype.type(2**shift - 1)):
        return False
    if signed:
        reach = words.view(f"i{words.dtype.itemsize}")
        half = 2 ** (width - 1)
        return bool(reach.min() >= -half and reach.max() < half)
    return bool(words.max() < 2**width)


def _holds_more(
    words: NDArray[Any], width: int, shift: int, precision: int, *, signed: bool
) -> bool:
    """Return whether bits above High Bit belong to the image, not to an overlay or old memory."""
    above = np.right_shift(words, shift + width)
    if above.min() == above.max():
        return False
    sample = words[:: max(1, len(words) // _SAMPLED_ROWS)]
    whole = np.right_shift(_field(sample, 0, precision, signed=signed), shift)
    stated = _field(sample, shift, width, signed=signed)
    if np.array_equal(whole, stated):
        return False  # a sign, extended to the word
    # Only where those bits change do the two readings differ by more than a factor.
    is_change = np.diff(np.right_shift(sample, shift + width), axis=1) != 0
    whole_steps, stated_steps = (
        _steps(whole) / 2.0 ** (precision - shift),
        _steps(stated) / 2.0**width,
    )
    is_whole, is_stated = _weigh(
        is_change & (whole_steps < stated_steps * _CLEARLY_NEARER),
        is_change & (stated_steps < whole_steps * _CLEARLY_NEARER),
    )
    if not is_whole and not is_stated:
        raise FileRejected(
            Reason.UNSUPPORTED_PIXEL_FORMAT,
            f"bits above those {width} that Bits Stored and High Bit name vary with the image, "
            "and the pixels do not decide whether they belong to it",
        )
    return is_whole


def _lossy(words: NDArray[Any], layout: Layout, precision: int) -> Samples:
    """Clip overshoot beyond the stated bits; dropping its bits would turn white into black."""
    values = _field(words, 0, precision, signed=layout.is_signed)
    low = -(2 ** (layout.stored - 1)) if layout.is_signed else 0
    return _clipped(values, low, layout.stored)


def _clipped(values: NDArray[Any], low: int, width: int) -> Samples:
    high, margin = low + 2**width - 1, 2**width * _OVERSHOOT
    sample = values[:: max(1, len(values) // _SAMPLED_ROWS)].astype(np.int32)
    is_far = (sample > high + margin) | (sample < low - margin)
    if float(np.mean(is_far)) > _OVERSHOT_SHARE:
        return Samples(values=values, is_corrected=True)
    return Samples(values=np.asarray(np.clip(values, low, high)))


def _signed_stream(words: NDArray[Any], layout: Layout, word: int) -> Samples:
    values = words.view(f"i{words.dtype.itemsize}")
    if layout.stored >= min(layout.precision, word) or not layout.is_signed:
        return Samples(values=values, is_corrected=not layout.is_signed)
    half = 2 ** (layout.stored - 1)
    if layout.is_lossy:
        return _clipped(values, -half, layout.stored)
    if values.min() >= -half and values.max() < half:
        return Samples(values=values)
    if _holds_more(words, layout.stored, 0, word, signed=True):
        return Samples(values=values, is_corrected=True)
    return Samples(values=_field(words, 0, layout.stored, signed=True))


# Ratio of typical steps between the wrong and the right byte order or shape.
_WRONG_STEP_RATIO = 8.0


def in_byte_order(words: NDArray[Any]) -> tuple[NDArray[Any], bool]:
    """Swap the bytes of words, (rows, columns), that are in the other order; say whether."""
    if words.dtype.itemsize == 1 or words.shape[1] < 2:
        return words, False
    sample = words[:: max(1, len(words) // _SAMPLED_ROWS)]
    swapped = sample.byteswap()
    is_swapped = 0 < _WRONG_STEP_RATIO * _typical_step(swapped) < _typical_step(sample)
    return (words.byteswap(), True) if is_swapped else (words, False)


def check_shape(words: NDArray[Any]) -> None:
    """Refuse an image, (rows, columns), whose rows are as long as its columns should be.

    Raises
    ------
    FileRejected
        As UNREADABLE.
    """
    rows, columns = words.shape
    flat = words.ravel()
    if rows == columns or min(rows, columns) < 2:
        return
    # A prime stride, so that the sample does not follow the rows of either shape.
    places = np.arange(0, flat.size - max(rows, columns), max(1, flat.size // 100_003))
    stated, exchanged = (
        float(np.abs(flat[places + length].astype(np.int32) - flat[places]).mean())
        for length in (columns, rows)
    )
    if stated > _WRONG_STEP_RATIO / 2 * exchanged:
        raise FileRejected(
            Reason.UNREADABLE, "Rows and Columns are exchanged: the image is not of that shape"
        )


def _typical_step(words: NDArray[Any]) -> float:
    return float(np.abs(np.diff(words.astype(np.int32), axis=1)).mean())


# A collimator's or a window's lower border may be black and exactly even, but is not a third of an
# X-ray. Other even borders belong to a frame, which has an upper side too.
_MAX_BLACK_SHARE = 1 / 3
_MAX_OTHER_SHARE = 1 / 4
# A border begins and ends with a row; an incomplete copy ends within one, beside whole rows.
_MAX_SHARE_WITHIN_ROW = 0.02
_WHOLE_ROW = 0.9
_MIN_WITHIN_ROW = 0.05
_BLACK = 0.02


def check_written(stored: NDArray[Any], grey: FloatImage) -> None:
    """Refuse an image of which a large part was never written: one value in many rows.

    Copies that allocate a file before they fill it, and stop or lose a block, leave zeros.

    Parameters
    ----------
    stored
        Shape (rows, columns).
    grey
        The displayed image, float32, 0..1, of the same shape.

    Raises
    ------
    FileRejected
        As TRUNCATED where that part lasts to the end, else as DAMAGED.
    """
    for start, end, value in _even_bands(stored):
        before = _run(stored[start - 1][::-1], stored[start - 2][::-1], value) if start > 1 else 0
        behind = _run(stored[end], stored[end + 1], value) if end + 2 <= len(stored) else 0
        share = ((end - start) * stored.shape[1] + before + behind) / stored.size
        if share <= _MAX_SHARE_WITHIN_ROW:
            continue
        is_cut = before > 0 or behind > 0
        limit = _MAX_BLACK_SHARE if grey[start, 0] < _BLACK else _MAX_OTHER_SHARE
        if not is_cut and (share <= limit or _is_of_frame(stored, start, end)):
            continue
        if end == len(stored):
            raise FileRejected(
                Reason.TRUNCATED,
                f"the last {share:.0%} of the pixel data are one value: the image was never "
                "written to its end",
            )
        raise FileRejected(
            Reason.DAMAGED,
            f"{share:.0%} of the pixel data in one piece are one value: a block is missing",
        )


def _even_bands(stored: NDArray[Any]) -> list[tuple[int, int, int]]:
    """Return first row, row behind the last, and value of bands of rows of a single value."""
    first = stored[:, 0]
    is_even = (stored == first[:, np.newaxis]).all(axis=1)
    if is_even.all() or not is_even.any():
        return []
    changes = np.flatnonzero(
        (is_even[1:] != is_even[:-1]) | (is_even[1:] & (first[1:] != first[:-1]))
    )
    bounds = [0, *(changes + 1).tolist(), len(stored)]
    return [(start, end, int(first[start])) for start, end in pairwise(bounds) if is_even[start]]


def _run(row: NDArray[Any], next_row: NDArray[Any], value: int) -> int:
    """Return how many pixels of the row beside a band belong to it as well.

    0 where the next row has the value there too: a border beside the image, or a slanted one.
    """
    length = int(np.argmax(row != value))
    if length < _MIN_WITHIN_ROW * len(row):
        return 0
    return length if float(np.mean(next_row[:length] != value)) >= _WHOLE_ROW else 0


def _is_of_frame(stored: NDArray[Any], start: int, end: int) -> bool:
    """Return whether a band lies at one end of the image, and one half as high at the other."""
    height = max(1, (end - start) // 2)
    if end == len(stored):
        opposite = stored[:height]
    elif start == 0:
        opposite = stored[-height:]
    else:
        return False
    return bool((opposite == opposite[0, 0]).all())
