"""Patient Orientation: every frontal image is turned the right way up before it is scored."""

import itertools
from multiprocessing import Pipe
from pathlib import Path

import numpy as np
import pydicom
import pytest

from lungwatch.daemon.pacs.source import read_source
from lungwatch.daemon.pipeline import decode
from lungwatch.daemon.pipeline.decode import Decoded, decode_file
from lungwatch.errors import Flag
from lungwatch.imaging.radiograph import ReadPolicy
from lungwatch.imaging.reader import read_radiograph
from lungwatch.preprocess import PreprocessSpec
from tests.support.radiographs import radiograph, read

# Unlike itself in every other position.
UPRIGHT = (np.arange(80)[:, np.newaxis] * 30 + np.arange(100) * 11).astype(np.uint16)


def _stored(row: str, column: str) -> np.ndarray:
    """Store the upright image so that rows and columns run where they are said to."""
    if row in "LR":
        rows = UPRIGHT if row == "L" else UPRIGHT[:, ::-1]
        return np.ascontiguousarray(rows if column == "F" else rows[::-1])
    columns = UPRIGHT.T if column == "L" else UPRIGHT.T[::-1]
    return np.ascontiguousarray(columns if row == "F" else columns[:, ::-1])


@pytest.mark.parametrize(
    ("row", "column"), [*itertools.product("LR", "FH"), *itertools.product("FH", "LR")]
)
def test_an_image_stored_in_any_position_is_upright(tmp_path: Path, row: str, column: str) -> None:
    dataset = radiograph(_stored(row, column), PatientOrientation=[row, column])
    found = read(dataset, tmp_path)
    expected = read(radiograph(UPRIGHT, PatientOrientation=["L", "F"]), tmp_path)
    assert (found.pixels == expected.pixels).all()
    assert found.orientation_known
    corrected = () if (row, column) == ("L", "F") else (Flag.ORIENTATION_CORRECTED,)
    assert found.flags == corrected
    # What the file holds is told as it is.
    assert (found.meta.rows, found.meta.columns) == (dataset.Rows, dataset.Columns)


@pytest.mark.parametrize(
    ("stated", "row", "column"),
    [
        (["LF", "FR"], "L", "F"),
        (["RA", "FP"], "R", "F"),
        (["fl", "r"], "F", "R"),
        (["R ", " H"], "R", "H"),
        (["HLA", "LFP"], "H", "L"),
    ],
)
def test_the_main_direction_counts(
    tmp_path: Path, stated: list[str], row: str, column: str
) -> None:
    found = read(radiograph(_stored(row, column), PatientOrientation=stated), tmp_path)
    assert (found.pixels == read(radiograph(UPRIGHT), tmp_path).pixels).all()
    assert found.orientation_known


@pytest.mark.parametrize(
    "stated",
    [
        None,
        "",
        "R",
        ["R"],
        ["", ""],
        ["LEFT", "FOOT"],
        ["R", ""],
        ["R", "L"],
        ["H", "F"],
        ["R", "R"],
        ["RL", "H"],
        ["X", "H"],
        ["R", "H", "F"],
        ["LE", "CD"],
    ],
)
def test_what_makes_no_sense_changes_nothing(tmp_path: Path, stated: object) -> None:
    found = read(radiograph(UPRIGHT, PatientOrientation=stated or ""), tmp_path)
    assert (found.pixels == read(radiograph(UPRIGHT), tmp_path).pixels).all()
    assert found.flags == ()
    assert not found.orientation_known


def test_flips_that_were_done_are_not_done_again(tmp_path: Path) -> None:
    """PS3.3 C.8.11.4: Field of View Rotation and Flip describe what the pixels went through."""
    dataset = radiograph(
        UPRIGHT,
        PatientOrientation=["L", "F"],
        FieldOfViewRotation="90",
        FieldOfViewHorizontalFlip="YES",
    )
    assert (read(dataset, tmp_path).pixels == read(radiograph(UPRIGHT), tmp_path).pixels).all()


def test_long_pixels_are_made_square_before_the_image_is_turned(tmp_path: Path) -> None:
    """The spacings are those of stored rows and columns."""
    stored = _stored("F", "R")
    dataset = radiograph(stored, PatientOrientation=["F", "R"], ImagerPixelSpacing=[0.2, 0.1])
    rows, columns = stored.shape
    found = read(dataset, tmp_path, ReadPolicy(min_side_px=32))
    assert found.pixels.shape == (columns // 2, rows)


def test_a_real_radiograph_is_the_same_from_every_position(tmp_path: Path, rg1: Path) -> None:
    """0.063 for one, 0.063 for all: not one grey value differs."""
    dataset = pydicom.dcmread(rg1)
    stored = dataset.pixel_array
    expected = read_radiograph(rg1).pixels
    for turns, orientation in ((1, ["F", "R"]), (2, ["R", "H"]), (3, ["H", "L"])):
        turned = np.ascontiguousarray(np.rot90(stored, turns))
        dataset.Rows, dataset.Columns = turned.shape
        dataset.PixelData, dataset.PatientOrientation = turned.tobytes(), orientation
        found = read(dataset, tmp_path)
        assert (found.pixels == expected).all()
        assert Flag.ORIENTATION_CORRECTED in found.flags


def test_what_is_sent_back_says_how_it_lies(tmp_path: Path) -> None:
    cases = ((["F", "R"], ["L", "F"]), (["LEFT", "FOOT"], []), (["A", "F"], ["A", "F"]))
    for stated, sent in cases:
        path = tmp_path / "image.dcm"
        dataset = radiograph(
            UPRIGHT, PatientOrientation=stated, StudyInstanceUID="1.2.3", SeriesInstanceUID="1.2.4"
        )
        with pydicom.config.disable_value_validation():
            pydicom.dcmwrite(path, dataset, enforce_file_format=True)
        assert list(read_source(path).attributes.PatientOrientation) == sent


def test_what_is_known_of_it_reaches_the_daemon(tmp_path: Path) -> None:
    policy, spec = ReadPolicy(), PreprocessSpec(size_px=16)
    setup = decode.DecoderSetup(policy=policy, spec=spec, overlay_side_px=64, memory_mb=512)
    for orientation, is_known in ((["F", "R"], True), ("", False)):
        read(radiograph(UPRIGHT, PatientOrientation=orientation), tmp_path)
        decoded = decode_file(tmp_path / "image", policy=policy, spec=spec, overlay_side_px=64)
        ours, theirs = Pipe()
        with ours, theirs:
            decode.send_decoded(theirs, decoded)
            received = decode.receive(ours, setup)
        assert isinstance(received, Decoded)
        assert received.orientation_known is decoded.orientation_known is is_known
        assert received.flags == decoded.flags
