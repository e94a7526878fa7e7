"""Frames: uniform borders, letterbox bars, collimation and viewers' panels around an X-ray.

A network that is shown the frame reads it as air or bone, and its shape as a hospital's habit.
Frames are found in the pixels alone, so that a PNG, a DICOM file and a training image are cut
alike.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from lungwatch.imaging.radiograph import Box, FloatImage

# Found on a thinned image, since a frame is as uniform there.
_MOST_PX = 1024
# What a frame's grey value may differ by: what JPEG leaves of an even surface.
_TOLERANCE = 0.03
# What a picture differs by, at least, where it meets its frame.
_STEP = 0.08
# Share of a frame's line that may differ: dust, a ringing edge, a small letter.
_STRAY_SHARE = 0.02
# Share of a picture's outermost line that must differ from the frame at once. An outline of a
# body is round, so that its outermost line touches little of the air beside it.
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
    """Find the picture within a frame.

    A frame is of one grey value, ends at straight lines, parallel to the image's sides, and the
    picture begins there at once. What fades, curves or slopes is air, a body or a collimator's
    shadow, and stays.

    Parameters
    ----------
    pixels
        float32, shape (rows, columns), 0..1.

    Returns
    -------
    Box or None
        Where the picture is; None where there is no frame.
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
    # A thinned line stands for those beside it: of these, none that may be the frame's is kept.
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
        for box in (
            _plain(image, level),
            _panelled(image, level, _extent),
            _panelled(image, level, _longest),
        ):
            if box is not None and _is_plausible(box, image.shape, level, least):
                return box
    return None


def _levels(image: FloatImage) -> list[float]:
    """Return the grey values that a side of an image has along most of its length."""
    levels: list[float] = []
    for line in (image[0], image[-1], image[:, 0], image[:, -1]):
        level = float(np.median(line))
        is_even = float(np.mean(np.abs(line - level) > _TOLERANCE)) <= _STRAY_SHARE
        if is_even and all(abs(level - known) > _TOLERANCE for known in levels):
            levels.append(level)
    return levels


def _plain(image: FloatImage, level: float) -> Box | None:
    """Find a picture around which there is nothing at all."""
    away = np.abs(image - np.float32(level))
    differs, stands_out = away > _TOLERANCE, away > _STEP
    rows, columns = _extent(differs.mean(axis=1)), _extent(differs.mean(axis=0))
    # Shares of what is within the other two sides: a wide frame would dilute them.
    for _ in range(2):
        if rows is None or columns is None:
            return None
        rows = _extent(differs[:, columns].mean(axis=1))
        columns = _extent(differs[rows].mean(axis=0)) if rows is not None else None
    if rows is None or columns is None:
        return None
    height, width = image.shape
    by_row = stands_out[:, columns].mean(axis=1)
    by_column = stands_out[rows].mean(axis=0)
    profiles = (
        (by_row, rows.start, _blur(height)),
        (by_row[::-1], height - rows.stop, _blur(height)),
        (by_column, columns.start, _blur(width)),
        (by_column[::-1], width - columns.stop, _blur(width)),
    )
    found = [_edge(*profile, _EDGE_SHARE) for profile in profiles]
    if sum(edge is not None for edge in found) >= _SURE_SIDES:
        found = [
            edge if edge is not None else _edge(*profile, _LAST_EDGE_SHARE)
            for edge, profile in zip(found, profiles, strict=True)
        ]
    top, bottom, left, right = (edge or 0 for edge in found)
    return Box(top=top, bottom=height - bottom, left=left, right=width - right)


def _panelled(
    image: FloatImage, level: float, lines: Callable[[NDArray[np.floating], float], slice | None]
) -> Box | None:
    """Find a picture beside which there are letters, as in a screenshot of a viewer.

    `lines` finds the picture's lines by their shares: all from the first full one to the last,
    since there may be air within the picture, or else the longest run, since a title may be as
    full.
    """
    differs = np.abs(image - np.float32(level)) > _TOLERANCE
    height, width = image.shape
    rows, columns = slice(0, height), slice(0, width)
    least = _PICTURE_SHARE / 2
    for _ in range(3):
        by_column = lines(differs[rows].mean(axis=0), least)
        if by_column is None:
            return None
        columns = by_column
        by_row = lines(differs[:, columns].mean(axis=1), least)
        if by_row is None:
            return None
        rows = by_row
    sides = (
        (differs[:, columns].mean(axis=1), rows.start, _blur(height)),
        (differs[:, columns].mean(axis=1)[::-1], height - rows.stop, _blur(height)),
        (differs[rows].mean(axis=0), columns.start, _blur(width)),
        (differs[rows].mean(axis=0)[::-1], width - columns.stop, _blur(width)),
    )
    for profile, start, blur in sides:
        outside = profile[max(0, start - 2 * blur) : max(0, start - blur)]
        inside = profile[start : start + 2 * blur]
        if start and (
            outside.size == 0
            or float(outside.max()) > _PANEL_SHARE
            or float(inside.max()) < _PICTURE_SHARE
        ):
            return None
    outside = differs.copy()
    outside[rows, columns] = False
    area = differs.size - (rows.stop - rows.start) * (columns.stop - columns.start)
    if area == 0 or float(outside.sum()) / area > _MOST_OUTSIDE:
        return None
    return Box(top=rows.start, bottom=rows.stop, left=columns.start, right=columns.stop)


def _extent(share: NDArray[np.floating], least: float = _STRAY_SHARE) -> slice | None:
    lines = np.flatnonzero(share > least)
    return slice(int(lines[0]), int(lines[-1]) + 1) if lines.size else None


def _longest(share: NDArray[np.floating], least: float) -> slice | None:
    steps = np.diff(np.concatenate(([0], (share > least).astype(np.int8), [0])))
    starts, stops = np.flatnonzero(steps == 1), np.flatnonzero(steps == -1)
    if not starts.size:
        return None
    best = int(np.argmax(stops - starts))
    return slice(int(starts[best]), int(stops[best]))


def _edge(profile: NDArray[np.floating], start: int, blur: int, least: float) -> int | None:
    """Return the first line of the picture, None where it does not begin at once.

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
    """Whether a box is a picture in its frame, not a sliver, and not half of an image."""
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
