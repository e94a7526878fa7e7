"""The bits of a word that hold the image, where the file states them wrongly.

Bits Allocated, Bits Stored, High Bit and Pixel Representation (PS3.5 8.1.1), and the precision
and sign that a compressed stream has of its own, say the same thing several times. Where they
disagree the pixels decide: in an X-ray, neighbours mostly differ by little, and values that
have been wrapped around or joined to foreign bits differ by much.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lungwatch.errors import FileRejected, Reason

# Rows that are looked at; noise in more of them would tell nothing new.
_SAMPLED_ROWS = 256
# Neighbours that differ by less than this share of the range are near each other.
_NEAR = 1 / 16
# Of two steps, one below this share of the other is clearly the nearer one.
_CLEARLY_NEARER = 1 / 4
# So many times more near neighbours, and at least so many, decide against the letter.
_PREPONDERANCE = 8
_MIN_EVIDENCE = 32
_MIN_EVIDENCE_SHARE = 1e-4
# What a lossy codec swings out beyond the stated range: an eighth of it, in few pixels.
_OVERSHOOT = 1 / 8
_OVERSHOT_SHARE = 1e-3


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where a file and its stream say that the samples lie in their words.

    Attributes
    ----------
    stored, high_bit
        Bits Stored and High Bit.
    is_signed
        Pixel Representation.
    precision
        Bits of the stream's own samples; those of the word where nothing is compressed.
    stream_is_signed
        The stream's own sign: None where streams of its kind have none. False is no proof, since
        encoders exist that know of no sign.
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
    """Stored values, out of their words.

    Attributes
    ----------
    values
        8 or 16 bits, shape (rows, columns), signed or not.
    is_corrected
        Whether they are others than the file's attributes make.
    """

    values: NDArray[Any]
    is_corrected: bool = False


def extract(words: NDArray[Any], layout: Layout) -> Samples:
    """Cut a sample's bits out of its word, and extend its sign.

    Parameters
    ----------
    words
        Unsigned, 8 or 16 bits, shape (rows, columns). A signed stream's samples are extended to
        the word.

    Raises
    ------
    FileRejected
        If bits that should be unused vary with the image, and the pixels do not tell whether
        they belong to it.
    """
    word = 8 * words.dtype.itemsize
    if layout.stream_is_signed:
        return _signed_stream(words, layout, word)
    precision = min(layout.precision, word)
    width = min(layout.stored, precision)
    # A codec that was given words gives them back, else right-aligned samples.
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
    """Return a field with the sign that the pixels have, and whether it is the other one."""
    sample = words[:: max(1, len(words) // _SAMPLED_ROWS)]
    letter = _field(sample, shift, width, signed=signed)
    other = _field(sample, shift, width, signed=not signed)
    # Black letters on white and the like jump from end to end, which is a step of 1 to the
    # other sign.
    codes = _field(sample, shift, width, signed=False).astype(np.int32)
    margin = 2**width // 256 if is_lossy else 0
    half = 2 ** (width - 1)
    is_end = (codes <= margin) | (codes >= 2**width - 1 - margin)
    is_end |= (codes >= half - 1 - margin) & (codes <= half + margin)
    near = [_steps(reading) <= 2**width * _NEAR for reading in (other, letter)]
    inner = ~(is_end[:, 1:] | is_end[:, :-1])
    is_other, _ = _weigh(near[0] & ~near[1] & inner, near[1] & ~near[0] & inner)
    return _field(words, shift, width, signed=signed != is_other), is_other


def _steps(reading: NDArray[Any]) -> NDArray[np.int32]:
    return np.asarray(np.abs(np.diff(reading.astype(np.int32), axis=1)))


def _weigh(for_other: NDArray[np.bool_], for_letter: NDArray[np.bool_]) -> tuple[bool, bool]:
    """Weigh pairs of neighbours that fit one reading against those that fit the letter.

    Returns
    -------
    tuple of bool
        Whether the other reading is clearly the right one, and whether the letter clearly is not
        the wrong one.
    """
    others, letters = int(np.count_nonzero(for_other)), int(np.count_nonzero(for_letter))
    enough = max(_MIN_EVIDENCE, _MIN_EVIDENCE_SHARE * for_other.size)
    return (
        others >= max(enough, _PREPONDERANCE * letters),
        others < enough or letters >= _PREPONDERANCE * others,
    )


def _is_right_aligned(words: NDArray[Any], width: int, shift: int, *, signed: bool) -> bool:
    """Whether samples lie in the lowest bits, though High Bit says that those are unused."""
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
    """Whether bits above High Bit belong to the image: neither overlay nor left-over memory."""
    above = np.right_shift(words, shift + width)
    if above.min() == above.max():
        return False
    sample = words[:: max(1, len(words) // _SAMPLED_ROWS)]
    whole = np.right_shift(_field(sample, 0, precision, signed=signed), shift)
    letter = _field(sample, shift, width, signed=signed)
    if np.array_equal(whole, letter):
        return False  # a sign, extended to the word
    # Only where those bits change do the two readings differ by more than a factor.
    is_change = np.diff(np.right_shift(sample, shift + width), axis=1) != 0
    whole_steps, letter_steps = (
        _steps(whole) / 2.0 ** (precision - shift),
        _steps(letter) / 2.0**width,
    )
    is_whole, is_letter = _weigh(
        is_change & (whole_steps < letter_steps * _CLEARLY_NEARER),
        is_change & (letter_steps < whole_steps * _CLEARLY_NEARER),
    )
    if not is_whole and not is_letter:
        raise FileRejected(
            Reason.UNSUPPORTED_PIXEL_FORMAT,
            f"bits above those {width} that Bits Stored and High Bit name vary with the image, "
            "and the pixels do not tell whether they belong to it",
        )
    return is_whole


def _lossy(words: NDArray[Any], layout: Layout, precision: int) -> Samples:
    """Clip what swings out beyond the stated bits; cutting it off would turn white into black."""
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
