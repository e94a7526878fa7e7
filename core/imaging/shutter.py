"""Display shutters: what of an image is not to be shown (PS3.3 C.7.6.11, C.7.6.15)."""

from collections.abc import Callable

import cv2
import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from lungwatch.imaging.attributes import numbers_of, values_of

Mask = NDArray[np.bool_]

# A shutter that leaves less than this share of an image belongs to another one.
_MIN_OPEN_SHARE = 0.2
# Overlay groups (PS3.5 7.6): 6000 to 601E, even.
_OVERLAY_GROUPS = range(0x6000, 0x6020, 2)


def shutter_of(dataset: Dataset, shape: tuple[int, int]) -> tuple[Mask | None, bool]:
    """Find what the display shutter hides.

    Parameters
    ----------
    dataset
        The attributes that may hold Shutter Shape (0018,1600) and its geometry, in rows and
        columns of the stored image, counted from 1. Where several shapes are named, what every
        one of them leaves open is shown.
    shape
        (rows, columns) of the stored image.

    Returns
    -------
    hidden : numpy.ndarray or None
        bool, shape (rows, columns), true for what is hidden; None where nothing is.
    is_ignored : bool
        Whether a shutter was stated that makes no sense: without its geometry, or leaving less
        than a fifth of the image. It is left out.
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
    """Return what the shutter's overlay leaves open: the pixels whose bit is 0."""
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
