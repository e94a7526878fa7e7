"""Geometry: square pixels, orientation, and frames around an X-ray."""

from collections.abc import Callable

import cv2
import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from lungwatch.errors import FileRejected, Reason
from lungwatch.imaging.radiograph import Box, FloatImage, numbers_of, values_of

# Rounding of the spacings that files state.
_SQUARE_TOLERANCE = 0.01
# Detectors and film scanners stay well within; more is a typing error.
_MAX_PIXEL_RATIO = 4.0
# Row spacing, that is, a pixel's height, comes first: PS3.3 10.7.1.3, C.7.6.3.1.7.
_SPACING_KEYWORDS = (
    "ImagerPixelSpacing",
    "PixelSpacing",
    "NominalScannedPixelSpacing",
    "PixelAspectRatio",
)


def square_pixels(pixels: FloatImage, dataset: Dataset) -> FloatImage:
    """Resample an image, (rows, columns), to square pixels by reducing its finer side.

    It is returned as it is if its pixels are square within 1 %, or their size is not stated.

    Raises
    ------
    FileRejected
        If a pixel is stated to be more than four times as long as wide.
    """
    ratio = _height_to_width(dataset)
    if abs(ratio - 1) <= _SQUARE_TOLERANCE:
        return pixels
    if not 1 / _MAX_PIXEL_RATIO <= ratio <= _MAX_PIXEL_RATIO:
        raise FileRejected(
            Reason.UNSUPPORTED_PIXEL_FORMAT,
            f"a pixel's height is stated as {ratio:.3g} times its width",
        )
    rows, columns = pixels.shape
    if ratio > 1:
        size = max(1, round(columns / ratio)), rows
    else:
        size = columns, max(1, round(rows * ratio))
    return np.asarray(cv2.resize(pixels, size, interpolation=cv2.INTER_AREA), dtype=np.float32)


def _height_to_width(dataset: Dataset) -> float:
    for keyword in _SPACING_KEYWORDS:
        values = numbers_of(dataset, keyword)
        if len(values) == 2 and min(values) > 0 and max(values) < float("inf"):
            return values[0] / values[1]
    return 1.0


_OPPOSITE = {"L": "R", "R": "L", "A": "P", "P": "A", "H": "F", "F": "H"}
# A direction is named by up to three letters, the main one first.
_MOST_LETTERS = 3
# A frontal view on a light box: the patient's right at the viewer's left.
UPRIGHT = ("L", "F")


def directions_of(dataset: Dataset) -> tuple[str, str] | None:
    """Return the main direction of rows and columns by Patient Orientation (PS3.3 C.7.6.1.1.1).

    Each is one of A, P, L, R, H, F. None where the attribute is absent, empty or invalid (a single
    value, words, opposites, one axis twice).
    """
    sides = values_of(dataset, "PatientOrientation")
    if len(sides) != len(UPRIGHT) or not all(_is_direction(side) for side in sides):
        return None
    row, column = sides[0][0], sides[1][0]
    return None if column in (row, _OPPOSITE[row]) else (row, column)


def is_orientation_known(dataset: Dataset) -> bool:
    """Return whether a file says which side of a frontal image is the patient's left."""
    directions = directions_of(dataset)
    return directions is not None and not set("AP") & set(directions)


def turn_upright(pixels: FloatImage, dataset: Dataset) -> FloatImage:
    """Turn and mirror an image so that its rows run to the patient's left, its columns down.

    It is returned as it is if it is upright, or if the orientation is not stated. Field of View
    Rotation and Horizontal Flip (0018,7032), (0018,7034) are ignored: they describe what was done
    to the stored pixels before (PS3.3 C.8.11.4).
    """
    directions = directions_of(dataset)
    if directions is None or directions == UPRIGHT or not is_orientation_known(dataset):
        return pixels
    row, column = directions
    turned = pixels
    if row in ("H", "F"):
        turned, (row, column) = turned.T, (column, row)
    if row == "R":
        turned = turned[:, ::-1]
    if column == "H":
        turned = turned[::-1]
    return np.ascontiguousarray(turned)


def _is_direction(side: str) -> bool:
    letters = set(side)
    return (
        0 < len(side) <= _MOST_LETTERS
        and len(letters) == len(side)
        and letters <= set(_OPPOSITE)
        and not any(_OPPOSITE[letter] in letters for letter in letters)
    )


Mask = NDArray[np.uint8]
Shares = NDArray[np.float32]
# Frames are searched on a thinned image.
_MOST_PX = 512
# Deviation of a frame's grey value: the noise of JPEG on an even surface.
_TOLERANCE = 0.03
# Smallest difference between a picture and its frame where they meet.
_STEP = 0.08
# Share of a frame's line that may differ: dust, a ringing edge, a small letter.
_STRAY_SHARE = 0.02
# Share of a picture's outermost line that differs from the frame at once. A body's outline is
# round, so that its outermost line has little beside the air.
_EDGE_SHARE = 0.5
# The same where two sides are known: there may be air within the picture as dark as the frame.
_LAST_EDGE_SHARE = 0.15
_SURE_SIDES = 2
# In a viewer: how full of letters a panel's line may be, and how full a picture's line must be.
_PANEL_SHARE = 0.35
_PICTURE_SHARE = 0.75
_MOST_OUTSIDE = 0.15
# Lines between the last of the frame and the first of the picture: a block of JPEG.
_BLUR_SHARE = 0.008
_LEAST_BLUR_PX = 3
# Of both opposite sides together. Narrower ones change little, and cutting them may as well.
_MIN_MARGINS = 0.04
# A wider one on one side alone, black or white, is not a frame but data that are missing.
_MOST_ONE_SIDED = 0.25
_ONE_SIDED = 0.015
# A picture has at least this share of the sides.
_MIN_PICTURE = 0.2
# White paper around a black bar around an X-ray.
_MOST_LAYERS = 4


def frame_box(pixels: FloatImage) -> Box | None:
    """Return the box of the picture within a frame; None where an image, 0..1, has no frame.

    A frame (border, letterbox bar, a viewer's panel) has one grey value and ends abruptly at
    straight lines parallel to the image's sides. What fades, curves or slopes is air, a body or a
    collimator's shadow, and stays. Only pixels count, so that a PNG, a DICOM file and a training
    image are cut alike.
    """
    step = max(1, -(-max(pixels.shape) // _MOST_PX))
    small = pixels[::step, ::step]
    whole = Box(top=0, bottom=small.shape[0], left=0, right=small.shape[1])
    box = whole
    for layer in range(_MOST_LAYERS):
        inner = _inner(box.of(small), _MIN_MARGINS if layer == 0 else 0.0)
        if inner is None:
            break
        box = Box(
            top=box.top + inner.top,
            bottom=box.top + inner.bottom,
            left=box.left + inner.left,
            right=box.left + inner.right,
        )
    if box == whole:
        return None
    # A thinned line stands for those beside it; lines that may belong to the frame are cut.
    rows, columns = pixels.shape
    return Box(
        top=box.top * step,
        bottom=rows if box.bottom == whole.bottom else (box.bottom - 1) * step + 1,
        left=box.left * step,
        right=columns if box.right == whole.right else (box.right - 1) * step + 1,
    )


def _inner(image: FloatImage, least: float) -> Box | None:
    """Find the picture within the outermost frame of an image, unless it is below `least`."""
    if min(image.shape) < 16:
        return None
    for level in _levels(image):
        away = np.abs(image - np.float32(level))
        # uint8, since OpenCV averages them many times as fast as NumPy averages bool.
        differs, stands_out = (
            (away > least_away).view(np.uint8) for least_away in (_TOLERANCE, _STEP)
        )
        found = (
            _plain(differs, stands_out),
            _panelled(differs, stands_out, _extent),
            _panelled(differs, stands_out, _longest),
        )
        boxes = [
            box
            for box in found
            if box is not None and _is_plausible(box, image.shape, level, least)
        ]
        if boxes:
            # Where letters stand beside a picture, the larger box holds them as well.
            return min(boxes, key=lambda box: (box.bottom - box.top) * (box.right - box.left))
    return None


def _levels(image: FloatImage) -> list[float]:
    """Return the even grey values of an image's sides."""
    levels: list[float] = []
    for line in (image[0], image[-1], image[:, 0], image[:, -1]):
        level = float(np.median(line))
        is_even = float(np.mean(np.abs(line - level) > _TOLERANCE)) <= _STRAY_SHARE
        if is_even and all(abs(level - known) > _TOLERANCE for known in levels):
            levels.append(level)
    return levels


def _plain(differs: Mask, stands_out: Mask) -> Box | None:
    """Find a picture with nothing around it.

    Parameters
    ----------
    differs, stands_out
        uint8, shape (rows, columns), 0 or 1: pixels that differ from the frame's grey value, and
        that differ clearly.
    """
    rows, columns = _extent(_by_row(differs)), _extent(_by_column(differs))
    # Shares within the other two sides: a wide frame would dilute them.
    for _ in range(2):
        if rows is None or columns is None:
            return None
        rows = _extent(_by_row(differs[:, columns]))
        columns = _extent(_by_column(differs[rows])) if rows is not None else None
    if rows is None or columns is None:
        return None
    height, width = differs.shape
    sides = _sides(differs, stands_out, rows, columns)
    found = [_edge(out, start, blur, _EDGE_SHARE) for _, out, start, blur in sides]
    if sum(edge is not None for edge in found) >= _SURE_SIDES:
        found = [
            edge if edge is not None else _edge(out, start, blur, _LAST_EDGE_SHARE)
            for edge, (_, out, start, blur) in zip(found, sides, strict=True)
        ]
    top, bottom, left, right = (edge or 0 for edge in found)
    return Box(top=top, bottom=height - bottom, left=left, right=width - right)


def _panelled(
    differs: Mask, stands_out: Mask, lines: Callable[[Shares, float], slice | None]
) -> Box | None:
    """Find a picture beside which there are letters, as in a screenshot of a viewer.

    Parameters
    ----------
    differs, stands_out
        As in `_plain`.
    lines
        Finds the picture's lines by their shares: `_extent` from the first full one to the last,
        since there may be air within the picture; `_longest` the longest run, since a title may
        be as full.
    """
    height, width = differs.shape
    rows, columns = slice(0, height), slice(0, width)
    least = _PICTURE_SHARE / 2
    for _ in range(3):
        found_columns = lines(_by_column(differs[rows]), least)
        if found_columns is None:
            return None
        columns = found_columns
        found_rows = lines(_by_row(differs[:, columns]), least)
        if found_rows is None:
            return None
        rows = found_rows
    if rows == slice(0, height) and columns == slice(0, width):
        return None
    if not all(_is_panel(*side) for side in _sides(differs, stands_out, rows, columns)):
        return None
    picture = differs[rows, columns]
    strays = cv2.countNonZero(differs) - cv2.countNonZero(picture)
    if strays > _MOST_OUTSIDE * (differs.size - picture.size):
        return None
    return Box(top=rows.start, bottom=rows.stop, left=columns.start, right=columns.stop)


_Side = tuple[Shares, Shares, int, int]


def _sides(differs: Mask, stands_out: Mask, rows: slice, columns: slice) -> tuple[_Side, ...]:
    """Return, for top, bottom, left and right: profiles from outside, first line, blur."""
    height, width = differs.shape
    a, b = _by_row(differs[:, columns]), _by_row(stands_out[:, columns])
    c, d = _by_column(differs[rows]), _by_column(stands_out[rows])
    return (
        (a, b, rows.start, _blur(height)),
        (a[::-1], b[::-1], height - rows.stop, _blur(height)),
        (c, d, columns.start, _blur(width)),
        (c[::-1], d[::-1], width - columns.stop, _blur(width)),
    )


def _is_panel(differs: Shares, stands_out: Shares, start: int, blur: int) -> bool:
    """Return whether a picture begins abruptly behind a few letters; profiles as in `_edge`."""
    if not start:
        return True
    outside = differs[max(0, start - 2 * blur) : max(0, start - blur)]
    inside = slice(start, start + 2 * blur)
    return (
        outside.size > 0
        and float(outside.max()) <= _PANEL_SHARE
        and float(differs[inside].max()) >= _PICTURE_SHARE
        and float(stands_out[inside].max()) >= _EDGE_SHARE
    )


def _by_row(mask: Mask) -> Shares:
    return np.asarray(cv2.reduce(mask, 1, cv2.REDUCE_AVG, dtype=cv2.CV_32F), np.float32).ravel()


def _by_column(mask: Mask) -> Shares:
    return np.asarray(cv2.reduce(mask, 0, cv2.REDUCE_AVG, dtype=cv2.CV_32F), np.float32).ravel()


def _extent(share: Shares, least: float = _STRAY_SHARE) -> slice | None:
    lines = np.flatnonzero(share > least)
    return slice(int(lines[0]), int(lines[-1]) + 1) if lines.size else None


def _longest(share: Shares, least: float) -> slice | None:
    steps = np.diff(np.concatenate(([0], (share > least).astype(np.int8), [0])))
    starts, stops = np.flatnonzero(steps == 1), np.flatnonzero(steps == -1)
    if not starts.size:
        return None
    best = int(np.argmax(stops - starts))
    return slice(int(starts[best]), int(stops[best]))


def _edge(profile: Shares, start: int, blur: int, least: float) -> int | None:
    """Return the first line of the picture; None where it does not begin abruptly.

    Parameters
    ----------
    profile
        Share of each line that stands out from the frame, from the outside inwards.
    start
        The first line that is not the frame's.
    blur
        Lines that an edge may take.
    least
        Share that the picture's first line has.
    """
    begun = np.flatnonzero(profile[start : start + blur + 1] >= least)
    return start + int(begun[0]) if begun.size else None


def _blur(side: int) -> int:
    return max(_LEAST_BLUR_PX, round(_BLUR_SHARE * side))


def _is_plausible(box: Box, shape: tuple[int, ...], level: float, least: float) -> bool:
    """Return whether a box is a picture in its frame, not a sliver, and not half of an image."""
    height, width = shape
    margins = (
        (box.top / height, (height - box.bottom) / height),
        (box.left / width, (width - box.right) / width),
    )
    widest = max(map(sum, margins))
    if not max(least, 1e-9) <= widest <= 1 - _MIN_PICTURE:
        return False
    if _TOLERANCE < level < 1 - _TOLERANCE:
        return True
    return not any(max(pair) > _MOST_ONE_SIDED and min(pair) < _ONE_SIDED for pair in margins)
