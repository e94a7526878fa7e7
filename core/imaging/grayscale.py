"""The grey-scale transformations of DICOM, from stored values to what a screen shows.

PS3.3 C.11 and PS3.4 N.2: modality LUT, values of interest (VOI) LUT or window, presentation.
Overlays (groups 60xx) are no part of the image and left out. A transformation that belongs to
other values than the image has is left out, and flagged.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from lungwatch.errors import FileRejected, Reason
from lungwatch.flags import Flag
from lungwatch.imaging import window
from lungwatch.imaging.attributes import code_of, float_of, number_of
from lungwatch.imaging.colour import grey_of
from lungwatch.imaging.depth import Samples
from lungwatch.imaging.lut import LutError, read_lut
from lungwatch.imaging.padding import padding_of
from lungwatch.imaging.radiograph import FloatImage
from lungwatch.imaging.tone import is_visible, own_range
from lungwatch.imaging.unwritten import check_written

# No physical quantity in a radiograph comes near it, and float32 still holds its square.
_MAX_VALUE = 1e18


@dataclass(frozen=True, kw_only=True, eq=False)
class Displayed:
    """An image as a screen shows it.

    Attributes
    ----------
    pixels
        float32, shape (rows, columns), 0..1, air and padding dark whatever the file's polarity.
    flags
        What was left out or corrected on the way.
    """

    pixels: FloatImage
    flags: tuple[Flag, ...] = ()


def to_display(
    samples: Samples, dataset: Dataset, hidden: NDArray[np.bool_] | None = None
) -> Displayed:
    """Apply modality LUT, VOI and photometric interpretation.

    Of several VOI tables the first that is whole and belongs to the image is taken, and a table
    before a window; of several windows the first that belongs to the image.

    Parameters
    ----------
    samples
        Stored values, shape (rows, columns), or (rows, columns, 3) for RGB.
    dataset
        The attributes that describe them.
    hidden
        bool, shape (rows, columns): what the display shutter hides, if there is one. Like
        padding it takes no part in windowing and is black.

    Raises
    ------
    FileRejected
        If the image is in colours, which no radiograph is; if its modality LUT is broken and
        nothing stands beside it; or if its last part was never written.
    """
    stored = samples.values
    flags = [Flag.DEPTH_CORRECTED] if samples.is_corrected else []
    if stored.ndim == 3:
        luma = _luma(stored, dataset, flags)
        if hidden is not None:
            luma[hidden] = 0.0
        return Displayed(pixels=luma, flags=tuple(dict.fromkeys(flags)))
    padding = padding_of(stored, dataset)
    if hidden is not None:
        padding = hidden if padding is None else padding | hidden
    values = _modality(stored, dataset, flags)
    shown = None if padding is None or padding.all() else ~padding
    grey = _voi_lut(values, dataset, shown, flags)
    if grey is None:
        grey = _window(values, dataset, shown, flags)
    if grey is None:
        grey = _unwindowed(values, stored, shown)
    if _is_inverse(dataset):
        grey = np.subtract(1.0, grey, dtype=np.float32)
    if padding is not None:
        grey[padding] = 0.0
    check_written(stored, grey)
    return Displayed(pixels=grey, flags=tuple(dict.fromkeys(flags)))


def _luma(stored: NDArray[Any], dataset: Dataset, flags: list[Flag]) -> FloatImage:
    """Return the grey of a screen copy in colour channels."""
    word = 8 * stored.dtype.itemsize
    # A palette's entries have a depth of their own, which fills the word.
    is_palette = code_of(dataset, "PhotometricInterpretation") == "PALETTE COLOR"
    bits = word if is_palette else min(number_of(dataset, "BitsStored", word) or word, word)
    white = 2**bits - 1
    top = int(stored.max())
    if top > white:
        white = 2 ** top.bit_length() - 1
        flags.append(Flag.DEPTH_CORRECTED)
    grey = grey_of(stored, white)
    if not is_visible(grey):
        grey = own_range(grey)
        flags.append(Flag.DEPTH_CORRECTED)
    return grey


def _modality(stored: NDArray[Any], dataset: Dataset, flags: list[Flag]) -> NDArray[Any]:
    try:
        if (table := read_lut(dataset, "ModalityLUTSequence", stored)) is not None:
            return table.apply(stored)
    except LutError as error:
        # Only one of the two may be there (PS3.3 C.11.1.1), and then the other one is meant.
        if "RescaleSlope" not in dataset:
            raise FileRejected(
                Reason.UNREADABLE, f"the Modality LUT Sequence is broken: {error}"
            ) from error
        flags.append(Flag.TABLE_IGNORED)
    slope = float_of(dataset, "RescaleSlope", 1.0)
    intercept = float_of(dataset, "RescaleIntercept", 0.0)
    reach = abs(slope) * float(np.iinfo(stored.dtype).max) + abs(intercept)
    # Slopes that flatten the image, or carry it out of all bounds, are typing errors.
    if (slope, intercept) == (1.0, 0.0) or slope == 0.0 or not reach < _MAX_VALUE:
        return stored
    return stored.astype(np.float32) * np.float32(slope) + np.float32(intercept)


def _voi_lut(
    values: NDArray[Any],
    dataset: Dataset,
    shown: NDArray[np.bool_] | None,
    flags: list[Flag],
) -> FloatImage | None:
    for number in range(len(dataset.get("VOILUTSequence") or ())):
        try:
            table = read_lut(dataset, "VOILUTSequence", values, number=number)
        except LutError:
            table = None
        if table is not None:
            grey = table.apply(values).astype(np.float32)
            # The entries' depth is the output's, not the image's.
            grey /= np.float32(table.white)
            np.clip(grey, 0.0, 1.0, out=grey)
            if is_visible(grey, shown):
                if table.is_depth_wrong:
                    flags.append(Flag.DEPTH_CORRECTED)
                return grey
        flags.append(Flag.TABLE_IGNORED)
    return None


def _window(
    values: NDArray[Any],
    dataset: Dataset,
    shown: NDArray[np.bool_] | None,
    flags: list[Flag],
) -> FloatImage | None:
    stated = window.windows_of(dataset)
    for position, one in enumerate(stated):
        if one is not None and one.belongs_to(values, shown):
            if position > 0:
                flags.append(Flag.WINDOW_IGNORED)
            grey = one.apply(values)
            return np.clip(grey, 0.0, 1.0, out=grey)
    if stated:
        flags.append(Flag.WINDOW_IGNORED)
    return None


def _unwindowed(
    values: NDArray[Any], stored: NDArray[Any], shown: NDArray[np.bool_] | None
) -> FloatImage:
    if values is stored and stored.dtype == np.uint8:
        # Eight bits without a window are shown as they are, like a PNG.
        grey = stored.astype(np.float32) / np.float32(255)
        if is_visible(grey, shown):
            return grey
    return own_range(values, shown)


def _is_inverse(dataset: Dataset) -> bool:
    # MONOCHROME1 and Presentation LUT Shape INVERSE state the same thing twice in DX
    # (PS3.3 C.8.11.3.1.2): one inversion, not two.
    photometric = code_of(dataset, "PhotometricInterpretation")
    shape = code_of(dataset, "PresentationLUTShape")
    return photometric == "MONOCHROME1" or (photometric == "MONOCHROME2" and shape == "INVERSE")
