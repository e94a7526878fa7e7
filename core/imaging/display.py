"""Display: the grey-scale transformations of DICOM, padding and shutters.

A transformation that belongs to other values than the image has is left out, and flagged.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from lungwatch.errors import FileRejected, Flag, Reason
from lungwatch.imaging.radiograph import (
    FloatImage,
    code_of,
    float_of,
    number_of,
    numbers_of,
    values_of,
)
from lungwatch.imaging.samples import Samples, check_written
from lungwatch.imaging.window import (
    MAX_VALUE,
    LutError,
    grey_of,
    is_visible,
    read_lut,
    stretch_range,
    windows_of,
)

# More is not padding.
_MAX_PADDING_SHARE = 0.9


def padding_of(stored: NDArray[Any], dataset: Dataset) -> NDArray[np.bool_] | None:
    """Return a mask of the padding of an image, (rows, columns); None if there is none.

    Only pixels that are joined to the image's edge count: many files state a padding value and
    hold none, and there the whitest bone or air has that value. Source: PS3.3 C.7.5.1.1.2.
    """
    values = [
        _as_stored(int(value), stored, number_of(dataset, "BitsStored", 16))
        for keyword in ("PixelPaddingValue", "PixelPaddingRangeLimit")
        for value in numbers_of(dataset, keyword)[:1]
        if abs(value) < 2**16
    ]
    if not values or "PixelPaddingValue" not in dataset:
        return None
    stated = (stored >= min(values)) & (stored <= max(values))
    edges = (stated[0], stated[-1], stated[:, 0], stated[:, -1])
    if not any(edge.any() for edge in edges):
        return None
    _, labels = cv2.connectedComponents(stated.view(np.uint8), connectivity=8)
    touching = np.unique(np.concatenate((labels[0], labels[-1], labels[:, 0], labels[:, -1])))
    is_outside = np.zeros(int(labels.max()) + 1, dtype=np.bool_)
    is_outside[touching] = True
    is_outside[0] = False  # the background of `connectedComponents` is the image
    padding = np.asarray(is_outside[labels])
    return None if float(padding.mean()) > _MAX_PADDING_SHARE else padding


def _as_stored(value: int, stored: NDArray[Any], bits: int) -> int:
    """Return a value as the image's samples hold it.

    The same 16 bits are -2000 or 63536 by a representation (SS or US) that files get wrong; of
    these, samples of fewer bits hold the lowest.
    """
    limits = np.iinfo(stored.dtype)
    if limits.min <= value <= limits.max:
        return value
    bits = min(bits, 8 * stored.dtype.itemsize)
    if bits < 16 and value & (2**bits - 1) == 0:
        return value  # no bit of it is left
    value &= 2**bits - 1
    return value - 2**bits if limits.min < 0 and value >= 2 ** (bits - 1) else value


Mask = NDArray[np.bool_]
# A shutter that leaves less than this share of an image belongs to another one.
_MIN_OPEN_SHARE = 0.2
# Overlay groups (PS3.5 7.6): 6000 to 601E, even.
_OVERLAY_GROUPS = range(0x6000, 0x6020, 2)


def shutter_of(dataset: Dataset, shape: tuple[int, int]) -> tuple[Mask | None, bool]:
    """Find the pixels that the display shutter hides (PS3.3 C.7.6.11, C.7.6.15).

    Where several shapes are named, a pixel has to lie in all of them to be shown.

    Parameters
    ----------
    shape
        (rows, columns) of the stored image.

    Returns
    -------
    hidden : numpy.ndarray or None
        bool, shape (rows, columns), true for hidden pixels; None where there are none.
    is_ignored : bool
        Whether a stated shutter is left out: it lacks its geometry, or leaves less than a fifth
        of the image.
    """
    shapes = [value for value in values_of(dataset, "ShutterShape") if value not in ("", "NONE")]
    masks = [_OPEN[name](dataset, shape) for name in shapes if name in _OPEN]
    if not masks:
        return None, bool(shapes)
    known = [mask for mask in masks if mask is not None]
    is_ignored = len(known) < len(shapes)
    if not known:
        return None, True
    is_open = np.logical_and.reduce(known)
    if float(is_open.mean()) < _MIN_OPEN_SHARE:
        return None, True
    return (None if is_open.all() else ~is_open), is_ignored


def _rectangle(dataset: Dataset, shape: tuple[int, int]) -> Mask | None:
    keywords = (
        "ShutterUpperHorizontalEdge",
        "ShutterLowerHorizontalEdge",
        "ShutterLeftVerticalEdge",
        "ShutterRightVerticalEdge",
    )
    edges = [numbers_of(dataset, keyword)[:1] for keyword in keywords]
    if not all(edges):
        return None
    # The edges themselves are shown.
    top, bottom, left, right = (edge[0] for edge in edges)
    rows, columns = _positions(shape)
    return (rows >= top) & (rows <= bottom) & (columns >= left) & (columns <= right)


def _circle(dataset: Dataset, shape: tuple[int, int]) -> Mask | None:
    center = numbers_of(dataset, "CenterOfCircularShutter")
    radius = numbers_of(dataset, "RadiusOfCircularShutter")
    if len(center) != 2 or len(radius) != 1 or radius[0] <= 0:
        return None
    rows, columns = _positions(shape)
    return np.asarray((rows - center[0]) ** 2 + (columns - center[1]) ** 2 <= radius[0] ** 2)


def _polygon(dataset: Dataset, shape: tuple[int, int]) -> Mask | None:
    values = numbers_of(dataset, "VerticesOfThePolygonalShutter")
    if len(values) < 6 or len(values) % 2 or max(map(abs, values)) > 1e6:
        return None
    # Row and column of each vertex, from 1; OpenCV wants column and row, from 0.
    vertices = np.round(np.array(values).reshape(-1, 2)[:, ::-1] - 1).astype(np.int32)
    canvas = np.zeros(shape, dtype=np.uint8)
    cv2.fillPoly(canvas, [vertices], 1)
    return canvas.astype(np.bool_)


def _bitmap(dataset: Dataset, shape: tuple[int, int]) -> Mask | None:
    """Return the pixels whose bit in the shutter's overlay is 0."""
    groups = numbers_of(dataset, "ShutterOverlayGroup")
    if len(groups) != 1 or groups[0] not in _OVERLAY_GROUPS:
        return None
    group = int(groups[0])
    try:
        bits = dataset.overlay_array(group)
        origin = [int(value) for value in dataset[group, 0x0050].value]
    # The overlay may be missing or damaged in any way.
    except Exception:
        return None
    if bits.ndim != 2 or len(origin) != 2:
        return None
    is_open = np.ones(shape, dtype=np.bool_)
    top, left = origin[0] - 1, origin[1] - 1
    inside = bits[max(0, -top) :, max(0, -left) :].astype(np.bool_)
    top, left = max(0, top), max(0, left)
    inside = inside[: max(0, shape[0] - top), : max(0, shape[1] - left)]
    is_open[top : top + inside.shape[0], left : left + inside.shape[1]] = ~inside
    return is_open


def _positions(shape: tuple[int, int]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return row and column numbers from 1, shapes (rows, 1) and (1, columns)."""
    rows, columns = np.ogrid[1 : shape[0] + 1, 1 : shape[1] + 1]
    return rows.astype(np.float64), columns.astype(np.float64)


_OPEN: dict[str, Callable[[Dataset, tuple[int, int]], Mask | None]] = {
    "RECTANGULAR": _rectangle,
    "CIRCULAR": _circle,
    "POLYGONAL": _polygon,
    "BITMAP": _bitmap,
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Displayed:
    """An image as a screen shows it.

    Attributes
    ----------
    pixels
        float32, shape (rows, columns), 0..1, air and padding dark whatever the file's polarity.
    flags
        Corrections and omissions.
    """

    pixels: FloatImage
    flags: tuple[Flag, ...] = ()


def to_display(
    samples: Samples, dataset: Dataset, hidden: NDArray[np.bool_] | None = None
) -> Displayed:
    """Apply modality LUT, VOI and photometric interpretation (PS3.3 C.11, PS3.4 N.2).

    The first VOI table that is whole and belongs to the image is taken, else the first such
    window. Overlays (groups 60xx) are not part of the image and left out.

    Parameters
    ----------
    samples
        Stored values, shape (rows, columns), or (rows, columns, 3) for RGB.
    hidden
        bool, shape (rows, columns): pixels that the display shutter hides. Like padding they take
        no part in windowing and are black.

    Raises
    ------
    FileRejected
        If the image is in colours, its modality LUT is broken without a rescale slope beside it,
        or a part of it was never written.
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
        grey = stretch_range(grey)
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
    # Slopes that flatten the image or exceed all bounds are typing errors.
    if (slope, intercept) == (1.0, 0.0) or slope == 0.0 or not reach < MAX_VALUE:
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
    stated = windows_of(dataset)
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
    return stretch_range(values, shown)


def _is_inverse(dataset: Dataset) -> bool:
    # MONOCHROME1 and Presentation LUT Shape INVERSE state the same thing twice in DX
    # (PS3.3 C.8.11.3.1.2): one inversion, not two.
    photometric = code_of(dataset, "PhotometricInterpretation")
    shape = code_of(dataset, "PresentationLUTShape")
    return photometric == "MONOCHROME1" or (photometric == "MONOCHROME2" and shape == "INVERSE")
