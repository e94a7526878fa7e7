"""The grey-scale transformations of DICOM, from stored values to what a screen shows.

PS3.3 C.11 and PS3.4 N.2: modality LUT, values of interest (VOI) LUT or window, presentation.
Overlays (groups 60xx) are no part of the image and left out.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from lungwatch.errors import FileRejected, Reason
from lungwatch.imaging.attributes import code_of, float_of, number_of
from lungwatch.imaging.lut import read_lut
from lungwatch.imaging.padding import padding_of
from lungwatch.imaging.radiograph import FloatImage

# A window that leaves fewer pixels than this between black and white belongs to another
# image, or to values from before a shift that the file does not mention: such files exist.
_MIN_GREY_SHARE = 0.02
# No physical quantity in a radiograph comes near it, and float32 still holds its square.
_MAX_VALUE = 1e18
# A grey image's channels differ by what lossy compression does to them, and by a few letters.
_MAX_CHROMA = 0.1
_MAX_COLOURED_SHARE = 0.01
# What of an image without a window may be cut off as outliers, on either side.
_TAIL_PERCENT = 0.5
_SAMPLE_SIZE = 200_000


def to_display(
    stored: NDArray[Any], dataset: Dataset, hidden: NDArray[np.bool_] | None = None
) -> FloatImage:
    """Apply modality LUT, VOI and photometric interpretation.

    Of several VOI transformations the first is taken, and a table before a window.

    Parameters
    ----------
    stored
        Stored values, shape (rows, columns), or (rows, columns, 3) for RGB.
    dataset
        The attributes that describe them.
    hidden
        bool, shape (rows, columns): what the display shutter hides, if there is one. Like
        padding it takes no part in windowing and is black.

    Returns
    -------
    numpy.ndarray
        float32, shape (rows, columns), 0..1, air and padding dark whatever the file's
        polarity.

    Raises
    ------
    FileRejected
        If the image is in colours: no radiograph is.
    """
    if stored.ndim == 3:
        luma = _luma(stored, dataset)
        if hidden is not None:
            luma[hidden] = 0.0
        return luma
    padding = padding_of(stored, dataset)
    if hidden is not None:
        padding = hidden if padding is None else padding | hidden
    values = _modality(stored, dataset)
    grey = _voi_lut(values, dataset)
    if grey is None:
        grey = _window(values, dataset)
    if grey is None:
        grey = _own_range(values, stored, padding)
    if _is_inverse(dataset):
        grey = np.subtract(1.0, grey, dtype=np.float32)
    if padding is not None:
        grey[padding] = 0.0
    return grey


def _luma(stored: NDArray[Any], dataset: Dataset) -> FloatImage:
    """Return the grey of a screen copy in colours whose channels are equal."""
    word = 8 * stored.dtype.itemsize
    # A palette's entries have a depth of their own, which fills the word.
    is_palette = code_of(dataset, "PhotometricInterpretation") == "PALETTE COLOR"
    bits = word if is_palette else min(number_of(dataset, "BitsStored", word) or word, word)
    full = float(2**bits - 1)
    sample = stored[::4, ::4].astype(np.float32)
    chroma = (sample.max(axis=2) - sample.min(axis=2)) / full
    if float(np.mean(chroma > _MAX_CHROMA)) > _MAX_COLOURED_SHARE:
        raise FileRejected(
            Reason.UNSUPPORTED_PIXEL_FORMAT,
            "the image is in colours; a radiograph in RGB has three equal channels",
        )
    # Luma as in ITU-R BT.601.
    weights = np.array([0.299, 0.587, 0.114], dtype=np.float32)
    grey = stored.astype(np.float32) @ weights / np.float32(full)
    return np.asarray(np.clip(grey, 0.0, 1.0), dtype=np.float32)


def _modality(stored: NDArray[Any], dataset: Dataset) -> NDArray[Any]:
    if (table := read_lut(dataset, "ModalityLUTSequence", stored)) is not None:
        return table.apply(stored)
    slope = float_of(dataset, "RescaleSlope", 1.0)
    intercept = float_of(dataset, "RescaleIntercept", 0.0)
    reach = abs(slope) * float(np.iinfo(stored.dtype).max) + abs(intercept)
    # Slopes that flatten the image, or carry it out of all bounds, are typing errors.
    if (slope, intercept) == (1.0, 0.0) or slope == 0.0 or not reach < _MAX_VALUE:
        return stored
    return stored.astype(np.float32) * np.float32(slope) + np.float32(intercept)


def _voi_lut(values: NDArray[Any], dataset: Dataset) -> FloatImage | None:
    table = read_lut(dataset, "VOILUTSequence", values)
    if table is None:
        return None
    looked_up = table.apply(values).astype(np.float32)
    # The entries' depth is the output's, not the image's; a table may hold more than it states.
    looked_up /= np.float32(2**table.bits - 1)
    return np.clip(looked_up, 0.0, 1.0, out=looked_up)


def _window(values: NDArray[Any], dataset: Dataset) -> FloatImage | None:
    center = float_of(dataset, "WindowCenter", np.nan)
    width = float_of(dataset, "WindowWidth", np.nan)
    function = code_of(dataset, "VOILUTFunction") or "LINEAR"
    # Only LINEAR, the default, wants a width of at least 1 (C.11.2.1.3.2).
    narrowest = 1 / _MAX_VALUE if function in ("LINEAR_EXACT", "SIGMOID") else 1.0
    if not abs(center) < _MAX_VALUE or not narrowest <= width < _MAX_VALUE:
        return None
    # A sample of the pixels tells whether the window is this image's.
    sample = _windowed(values[::8, ::8], center, width, function)
    black, white = (0.01, 0.99) if function == "SIGMOID" else (0.0, 1.0)
    if float(np.mean((sample > black) & (sample < white))) < _MIN_GREY_SHARE:
        return None
    grey = _windowed(values, center, width, function)
    return np.clip(grey, 0.0, 1.0, out=grey)


def _windowed(values: NDArray[Any], center: float, width: float, function: str) -> FloatImage:
    """Apply a VOI function; what it leaves black or white may lie outside 0..1."""
    grey = values.astype(np.float32)
    if function == "SIGMOID":  # C.11.2.1.3.1
        grey -= np.float32(center)
        grey *= np.float32(-4.0 / width)
        # Further out than this float32 rounds to black and white anyway; exp() would overflow.
        np.clip(grey, -80.0, 80.0, out=grey)
        return np.asarray(1.0 / (1.0 + np.exp(grey)), dtype=np.float32)
    if function == "LINEAR_EXACT" or width == 1:  # C.11.2.1.3.2
        grey -= np.float32(center - width / 2)
        grey /= np.float32(width)
    else:  # C.11.2.1.2.1
        grey -= np.float32(center - 0.5 - (width - 1) / 2)
        grey /= np.float32(width - 1)
    return grey


def _own_range(
    values: NDArray[Any], stored: NDArray[Any], padding: NDArray[np.bool_] | None
) -> FloatImage:
    if values is stored and stored.dtype == np.uint8:
        # Eight bits without a window are shown as they are, like a PNG.
        return stored.astype(np.float32) / np.float32(255)
    kept = values if padding is None or padding.all() else values[~padding]
    low, high = float(kept.min()), float(kept.max())
    tails = (_TAIL_PERCENT, 100 - _TAIL_PERCENT)
    most_low, most_high = np.percentile(kept.ravel()[:: max(1, kept.size // _SAMPLE_SIZE)], tails)
    # A bright letter or a dead pixel must not darken all the rest.
    if 0 < most_high - most_low < (high - low) / 2:
        low, high = float(most_low), float(most_high)
    grey = values.astype(np.float32) - np.float32(low)
    grey /= np.float32(max(high - low, 1e-6))
    return np.clip(grey, 0.0, 1.0, out=grey)


def _is_inverse(dataset: Dataset) -> bool:
    # MONOCHROME1 and Presentation LUT Shape INVERSE state the same thing twice in DX
    # (PS3.3 C.8.11.3.1.2): one inversion, not two.
    photometric = code_of(dataset, "PhotometricInterpretation")
    shape = code_of(dataset, "PresentationLUTShape")
    return photometric == "MONOCHROME1" or (photometric == "MONOCHROME2" and shape == "INVERSE")
