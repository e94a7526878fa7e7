"""Lanes and turns of the intake: what is large or odd, and whose file is taken next."""

import io
import os
import struct
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pydicom
import pytest
from pydicom.uid import ExplicitVRBigEndian, ImplicitVRLittleEndian

from lungwatch.daemon.intake.eligibility import NameRules, Snapshot, WriterState
from lungwatch.daemon.intake.lanes import Candidate, LaneRules, Turns, look_at
from lungwatch.daemon.intake.watch import DropScan
from lungwatch.daemon.stage import InFlight, Lane
from lungwatch.files import FileKind
from tests.support.clock import ManualClock
from tests.support.pictures import archive, dicom, png

RULES = LaneRules(from_bytes=1 << 20, from_pixels=1000 * 1000, readable_bytes=4 << 20)


def lane_of(path: Path) -> Lane:
    return RULES.lane_of(Snapshot.of(path.lstat(), 0.0), look_at(path))


def jpeg(side_px: int) -> bytes:
    return cv2.imencode(".jpg", np.zeros((side_px, side_px), np.uint8))[1].tobytes()


def huge_png() -> bytes:
    """Return the beginning of a picture of 119 megapixels."""
    return png(1)[:16] + struct.pack(">II", 10_900, 10_900) + png(1)[24:]


def recoded(syntax: str, side_px: int) -> bytes:
    dataset = pydicom.dcmread(io.BytesIO(dicom(1)))
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.Rows = dataset.Columns = side_px
    file = io.BytesIO()
    pydicom.dcmwrite(
        file, dataset, implicit_vr=syntax == ImplicitVRLittleEndian,
        little_endian=syntax != ExplicitVRBigEndian, enforce_file_format=True,
    )  # fmt: skip
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "lane"),
    [
        (png(1), Lane.ORDINARY),
        (dicom(1), Lane.ORDINARY),
        (jpeg(64), Lane.ORDINARY),
        (jpeg(64)[:2] + b"\xff\xe1\xff\xff" + bytes(65533) + jpeg(64)[2:], Lane.ORDINARY),
        (jpeg(1200), Lane.SLOW),
        (jpeg(64)[:20], Lane.SLOW),
        (b"\xff\xd8" + b"\xff\xfe\x00\x02" * 1000 + jpeg(64)[2:], Lane.SLOW),
        (huge_png(), Lane.SLOW),
        (png(1)[:20], Lane.SLOW),
        (archive({"x.png": png(1)}), Lane.SLOW),
        (b"no image", Lane.SLOW),
        (b"", Lane.SLOW),
        (png(1) + bytes(1 << 20), Lane.SLOW),
        (recoded(ImplicitVRLittleEndian, 64), Lane.ORDINARY),
        (recoded(ExplicitVRBigEndian, 64), Lane.ORDINARY),
        (recoded(ImplicitVRLittleEndian, 1200), Lane.SLOW),
        (recoded(ExplicitVRBigEndian, 1200), Lane.SLOW),
    ],
)
def test_a_file_of_many_bytes_or_pixels_or_of_no_known_size_takes_the_slow_lane(
    tmp_path, content, lane
):
    path = tmp_path / "x"
    path.write_bytes(content)
    assert lane_of(path) is lane


def test_a_sparse_file_is_large_and_a_large_one_of_no_kind_is_not_even_claimed(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"no image")
    os.truncate(path, 8 << 30)
    snapshot, look = Snapshot.of(path.lstat(), 0.0), look_at(path)
    assert snapshot.allocated_bytes < 1 << 20
    assert (look.kind, look.writer) == (FileKind.OTHER, WriterState.NONE)
    assert RULES.by_size(snapshot) is Lane.SLOW
    assert RULES.refusal(snapshot, look) == "no image, and larger than 4 MiB"
    path.write_bytes(png(1))
    os.truncate(path, 8 << 30)
    assert RULES.refusal(Snapshot.of(path.lstat(), 0.0), look_at(path)) is None


def test_a_fifo_that_took_a_files_name_holds_up_nothing(tmp_path):
    os.mkfifo(tmp_path / "x")
    assert look_at(tmp_path / "x").kind is FileKind.OTHER


def candidate(name: str, came_at_s: float, *, uid: int = 1, folder: str = "a") -> Candidate:
    return Candidate(
        path=Path(folder, name),
        uid=uid,
        folder=folder,
        came_at_s=came_at_s,
        lane=Lane.ORDINARY,
        claim=lambda: None,
    )


def taken(turns: Turns, most: int = 1000) -> list[str]:
    return [file.path.name for file in iter(turns.pop, None)][:most]


def test_the_oldest_comes_first_and_every_fourth_is_the_newest():
    turns = Turns()
    for number in (3, 1, 4, 2, 8, 6, 7, 5):
        turns.add(candidate(str(number), number))
    assert taken(turns) == ["1", "2", "3", "8", "4", "5", "6", "7"]
    assert len(turns) == 0


def test_a_flood_of_one_user_or_folder_delays_another_ones_file_by_a_turn():
    turns = Turns()
    for number in range(1000):
        turns.add(candidate(f"flood {number}", number, folder=f"f{number % 100}"))
    turns.add(candidate("other user", 5000, uid=2))
    turns.add(candidate("newer", 6000))
    assert taken(turns, 4).index("other user") <= 1
    turns = Turns()
    for number in range(1000):
        turns.add(candidate(f"flood {number}", number))
    turns.add(candidate("other folder", 500, folder="b"))
    assert "other folder" in taken(turns, 3)


def test_a_file_behind_a_flood_of_its_own_folder_is_taken_within_four():
    turns = Turns()
    for number in range(1000):
        turns.add(candidate(f"flood {number}", number))
    turns.add(candidate("X-ray", 1000))
    assert "X-ray" in taken(turns, 4)


def test_a_removed_or_replaced_file_is_not_taken_twice():
    turns = Turns()
    for number in range(500):
        turns.add(candidate("same", number))
        turns.add(candidate("gone", number))
    turns.discard(str(Path("a", "gone")))
    assert taken(turns) == ["same"]
    turns.add(candidate("gone", 1))
    assert taken(turns) == ["gone"]


def test_neither_lane_takes_the_others_slots():
    slots = InFlight(2, 1)
    assert slots.acquire(0, Lane.SLOW)
    assert not slots.acquire(0, Lane.SLOW)
    assert slots.acquire(0)
    assert slots.acquire(0)
    assert not slots.acquire(0)
    assert slots.by_lane == {Lane.ORDINARY: 2, Lane.SLOW: 1}
    assert slots.count == 3
    slots.release(Lane.SLOW)
    assert not slots.acquire(0)
    assert slots.acquire(0, Lane.SLOW)


@pytest.fixture
def scan(tmp_path, monkeypatch):
    """A scan of a drop folder; what it logs is in `said`."""
    said: list[str] = []
    monkeypatch.setattr(
        "lungwatch.daemon.intake.watch.event", lambda *_, **fields: said.append(fields["reason"])
    )
    found = DropScan(tmp_path, NameRules(), skip_log_s=30.0, clock=ManualClock(), beat=lambda: None)
    found.said = said
    return found


def scan_twice(scan: DropScan) -> int:
    for _ in range(2):
        list(scan.files())
        scan.unusable.forget_gone(scan.seen)
    return len(scan.unusable)


def test_a_folder_beyond_path_max_is_logged_once(scan, tmp_path):
    name = "d" * 200
    descriptor = os.open(tmp_path, os.O_RDONLY)
    for _ in range(30):
        os.mkdir(name, dir_fd=descriptor)
        deeper = os.open(name, os.O_RDONLY, dir_fd=descriptor)
        os.close(descriptor)
        descriptor = deeper
    os.close(descriptor)
    assert scan_twice(scan) == 1
    assert scan.said == ["File name too long"]


def test_a_file_that_cannot_be_examined_is_logged_once(scan, tmp_path, monkeypatch):
    """As in a folder that may be listed and not searched; its names need not be UTF-8."""
    (tmp_path / os.fsdecode(b"\xff\xfe.png")).touch()
    (tmp_path / "link").symlink_to("nowhere")
    monkeypatch.setattr(DropScan, "_usable", partial(_denied))
    monkeypatch.setattr(os.path, "lexists", lambda _: False)
    assert scan_twice(scan) == 2
    assert scan.said == ["Permission denied"] * 2


def _denied(*_: object) -> None:
    raise PermissionError(13, "Permission denied")


def test_what_was_removed_is_forgotten_and_said_again_if_it_comes_back(scan, tmp_path):
    (tmp_path / "link").symlink_to("nowhere")
    assert scan_twice(scan) == 1
    (tmp_path / "link").unlink()
    assert scan_twice(scan) == 0
    (tmp_path / "link").symlink_to("nowhere")
    assert scan_twice(scan) == 1
    assert len(scan.said) == 2


def test_a_known_file_is_not_examined_again(scan, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).touch()
    known = {str(tmp_path / "a")}
    found = dict(scan.files(known))
    assert found[str(tmp_path / "a")] is None
    assert found[tmp_path / "b"].size_bytes == 0
    assert scan.seen == {str(tmp_path / "a"), str(tmp_path / "b")}
