"""Display shutters: what they hide is black and has no say in the window."""

from pathlib import Path

import numpy as np
import pytest

from lungwatch.errors import Flag
from lungwatch.imaging.display import shutter_of
from lungwatch.imaging.radiograph import ReadPolicy
from tests.support.radiographs import radiograph, read

SHAPE = (80, 100)
ROWS, COLUMNS = np.mgrid[1 : SHAPE[0] + 1, 1 : SHAPE[1] + 1]
RECTANGLE = {
    "ShutterShape": "RECTANGULAR",
    "ShutterUpperHorizontalEdge": 11,
    "ShutterLowerHorizontalEdge": 70,
    "ShutterLeftVerticalEdge": 16,
    "ShutterRightVerticalEdge": 90,
}
CIRCLE = {
    "ShutterShape": "CIRCULAR",
    "CenterOfCircularShutter": [40, 50],
    "RadiusOfCircularShutter": 35,
}
POLYGON = {
    "ShutterShape": "POLYGONAL",
    "VerticesOfThePolygonalShutter": [10, 20, 10, 90, 70, 90, 70, 20],
}
IN_RECTANGLE = (ROWS >= 11) & (ROWS <= 70) & (COLUMNS >= 16) & (COLUMNS <= 90)
IN_CIRCLE = (ROWS - 40) ** 2 + (COLUMNS - 50) ** 2 <= 35**2
IN_POLYGON = (ROWS >= 10) & (ROWS <= 70) & (COLUMNS >= 20) & (COLUMNS <= 90)


def _bitmap(is_open: np.ndarray, origin: tuple[int, int] = (1, 1)) -> dict[str, object]:
    bits = np.packbits(~is_open, bitorder="little").tobytes()
    return {
        "ShutterShape": "BITMAP",
        "ShutterOverlayGroup": 0x6002,
        "group": (is_open.shape, origin, bits + b"\0" * (len(bits) % 2)),
    }


def _dataset(changes: dict[str, object], **more: object):
    changes = {**changes, **more}
    group = changes.pop("group", None)
    dataset = radiograph(**changes)
    if group:
        (rows, columns), origin, bits = group
        dataset.add_new(0x60020010, "US", rows)
        dataset.add_new(0x60020011, "US", columns)
        dataset.add_new(0x60020040, "CS", "G")
        dataset.add_new(0x60020050, "SS", list(origin))
        dataset.add_new(0x60020100, "US", 1)
        dataset.add_new(0x60020102, "US", 0)
        dataset.add_new(0x60023000, "OW", bits)
    return dataset


@pytest.mark.parametrize(
    ("changes", "is_open"),
    [
        (RECTANGLE, IN_RECTANGLE),
        (CIRCLE, IN_CIRCLE),
        (POLYGON, IN_POLYGON),
        (
            {**RECTANGLE, **CIRCLE, "ShutterShape": ["RECTANGULAR", "CIRCULAR"]},
            IN_RECTANGLE & IN_CIRCLE,
        ),
        (
            {**RECTANGLE, **POLYGON, "ShutterShape": ["POLYGONAL", "RECTANGULAR"]},
            IN_RECTANGLE & IN_POLYGON,
        ),
        (_bitmap(IN_CIRCLE), IN_CIRCLE),
        (_bitmap(np.zeros((20, 30), bool), (-9, 81)), ~((ROWS <= 10) & (COLUMNS >= 81))),
        (
            {**RECTANGLE, "ShutterLowerHorizontalEdge": 99, "ShutterUpperHorizontalEdge": -5},
            (COLUMNS >= 16) & (COLUMNS <= 90),
        ),
    ],
)
def test_hides_what_lies_outside_of_it(changes: dict[str, object], is_open: np.ndarray) -> None:
    hidden, is_ignored = shutter_of(_dataset(changes), SHAPE)
    assert not is_ignored
    assert hidden is not None
    assert (hidden == ~is_open).all()


@pytest.mark.parametrize(
    "changes",
    [
        {"ShutterShape": "POLYGONAL", "VerticesOfThePolygonalShutter": [10, 10]},
        {"ShutterShape": "POLYGONAL", "VerticesOfThePolygonalShutter": [10, 10, 70, 70]},
        {"ShutterShape": "POLYGONAL"},
        {"ShutterShape": "CIRCULAR", "CenterOfCircularShutter": [40, 50]},
        {**CIRCLE, "RadiusOfCircularShutter": 0},
        {**CIRCLE, "RadiusOfCircularShutter": 5},
        {**CIRCLE, "CenterOfCircularShutter": [4000, 5000]},
        {**RECTANGLE, "ShutterLeftVerticalEdge": 95},
        {**RECTANGLE, "ShutterRightVerticalEdge": ""},
        {**_bitmap(IN_CIRCLE), "ShutterOverlayGroup": 0x6004},
        {"ShutterShape": "BITMAP"},
        {"ShutterShape": "HEXAGONAL"},
    ],
)
def test_one_without_a_sensible_shape_is_left_out(
    changes: dict[str, object], tmp_path: Path
) -> None:
    found = read(_dataset(changes), tmp_path)
    assert (found.pixels == read(radiograph(), tmp_path).pixels).all()
    assert found.flags == (Flag.SHUTTER_IGNORED,)


@pytest.mark.parametrize(
    "changes",
    [
        {"ShutterShape": "NONE"},
        {"ShutterShape": ""},
        {"ShutterLeftVerticalEdge": 50, "ShutterRightVerticalEdge": 60},
        {
            **RECTANGLE,
            "ShutterUpperHorizontalEdge": 1,
            "ShutterLowerHorizontalEdge": 80,
            "ShutterLeftVerticalEdge": 1,
            "ShutterRightVerticalEdge": 100,
        },
    ],
)
def test_an_open_one_changes_nothing(changes: dict[str, object], tmp_path: Path) -> None:
    found = read(_dataset(changes), tmp_path)
    assert (found.pixels == read(radiograph(), tmp_path).pixels).all()
    assert found.flags == ()


@pytest.mark.parametrize("window", [{}, {"WindowCenter": None, "WindowWidth": None}])
@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_a_bright_surround_is_as_good_as_a_black_one(
    tmp_path: Path, photometric: str, window: dict[str, object]
) -> None:
    """It is hidden whatever its value, and the range is that of what is shown."""
    image = (ROWS * 20 + COLUMNS * 10).astype(np.uint16)
    images = []
    for surround in (0, 4095):
        pixels = np.where(IN_CIRCLE, image, np.uint16(surround))
        dataset = radiograph(pixels, **CIRCLE, **window, PhotometricInterpretation=photometric)
        found = read(dataset, tmp_path)
        assert found.flags == (Flag.SHUTTER_APPLIED,)
        images.append(found.pixels)
    assert (images[0] == images[1]).all()
    assert (images[0][~IN_CIRCLE] == 0).all()
    assert images[0][IN_CIRCLE].max() > 0.3


def test_edges_count_from_one_in_the_stored_image(tmp_path: Path) -> None:
    """The shutter is laid over the stored image, before that is turned."""
    pixels = np.full(SHAPE, 4095, np.uint16)
    pixels[10:70, 15:90] = (1000 + ROWS * 20 + COLUMNS)[10:70, 15:90]
    dataset = radiograph(pixels, **RECTANGLE, PatientOrientation=["R", "H"])
    found = read(dataset, tmp_path, ReadPolicy(min_side_px=32))
    # The black outside is a frame, and cut.
    assert found.flags == (
        Flag.SHUTTER_APPLIED,
        Flag.ORIENTATION_CORRECTED,
        Flag.FRAME_REMOVED,
    )
    assert found.pixels.shape == (60, 75)
    assert found.pixels[0, 0] == pytest.approx(pixels[69, 89] / 4095, abs=0.001)
