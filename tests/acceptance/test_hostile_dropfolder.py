"""One daemon, a drop folder full of malice: each file has one end or is left alone, it goes on.

What single readers make of damaged bytes is in the unit tests; here are the whole commands.
"""

import csv
import io
import json
import os
import socket
import stat
import struct
import threading
import time
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian

from tests.support.record import sha256
from tests.support.waits import wait_for

PATIENT = "Zzyzxson"
NAMES = [
    b"--help",
    b"-rf ..png",
    b"x..%2f..%2fetc%2fpasswd.png",
    "x\u2215..\u2215..\u2215lookalike.png".encode(),
    b"new\nline action=ready.png",
    b"not \xff\xfe utf-8.png",
    b"\x1b]0;title\x07\x1b[2J\x9b31m.png",
    "\u202egnp.exe".encode(),
    b"=cmd|' C calc'!A0.png",
    b"@SUM(1+1).png",
    b"<script>alert(1)<img src=x>.png",
    PATIENT.encode() + b"^Ada 19640812.png",
    b"%s%n{0}{home.root}.png",
    b"n" * 251 + b".png",
]
SPARSE_BYTES = 10 << 30
# The malice costs some processes' time and their replacement.
PATIENCE_S = 180


def dicom(syntax=ExplicitVRLittleEndian, **values):
    """A chest radiograph of 64 x 80 pixels, with values that may be none."""
    pixels = (np.indices((64, 80)).sum(axis=0) * 25).astype(np.uint16)
    image = Dataset()
    image.SOPClassUID = "1.2.840.10008.5.1.4.1.1.1.1"
    image.SOPInstanceUID, image.StudyInstanceUID = "1.2.3", "1.2"
    image.Modality, image.BodyPartExamined, image.ViewPosition = "DX", "CHEST", "PA"
    image.SamplesPerPixel, image.PhotometricInterpretation = 1, "MONOCHROME2"
    image.Rows, image.Columns = pixels.shape
    image.BitsAllocated, image.BitsStored, image.HighBit = 16, 12, 11
    image.PixelRepresentation, image.PixelData = 0, pixels.tobytes()
    image["PixelData"].VR = "OW"
    for keyword, value in values.items():
        with pydicom.config.disable_value_validation():
            setattr(image, keyword, value)
    image.file_meta = FileMetaDataset()
    image.file_meta.TransferSyntaxUID = syntax
    buffer = io.BytesIO()
    with pydicom.config.disable_value_validation():
        image.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def with_tail(tail):
    """A DICOM file that goes on with what nobody would write."""
    return dicom(InstitutionName=PATIENT) + tail


def nested_sequences(levels):
    """Referenced series within each other, of undefined length."""
    sequence = struct.pack("<HH2sHL", 0x0040, 0xA730, b"SQ", 0, 0xFFFFFFFF)
    item = struct.pack("<HHL", 0xFFFE, 0xE000, 0xFFFFFFFF)
    return (sequence + item) * levels


def deflated_bomb():
    whole = dicom(syntax=ExplicitVRLittleEndian)
    meta_bytes = int.from_bytes(whole[140:144], "little")
    body = whole[144 + meta_bytes :] + struct.pack("<HH2sHL", 0x7FE1, 0x1010, b"OB", 0, 900 << 20)
    image = pydicom.dcmread(io.BytesIO(dicom(syntax=DeflatedExplicitVRLittleEndian)))
    head = io.BytesIO()
    image.save_as(head, enforce_file_format=True)
    start = 144 + int.from_bytes(head.getvalue()[140:144], "little")
    deflater = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    packed = deflater.compress(body) + b"".join(
        deflater.compress(bytes(1 << 20)) for _ in range(600)
    )
    return head.getvalue()[:start] + packed + deflater.flush()


def png(side, *, extra=b"", rows=b""):
    def chunk(kind, data):
        return (
            struct.pack(">L", len(data)) + kind + data + struct.pack(">L", zlib.crc32(kind + data))
        )

    header = struct.pack(">LLBBBBB", side, side, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + chunk(b"IDAT", rows)
        + chunk(b"IEND", b"")
    )  # fmt: skip


def text_bomb():
    """A PNG of a few pixels with a comment that inflates to a gibibyte."""
    data = b"Comment\0\0" + zlib.compress(bytes(64 << 20), 9) * 16
    chunk = struct.pack(">L", len(data)) + b"zTXt" + data
    chunk += struct.pack(">L", zlib.crc32(b"zTXt" + data))
    return png(8, extra=chunk, rows=zlib.compress(bytes(72)))


def bombs():
    """Content -> the reasons for which it may be refused; None for one that is scored."""
    tricks = {
        "PatientID": "../../x",
        "PatientName": f"{PATIENT}^\x1b[31m<b>=1+1",
        "SOPInstanceUID": "1/../../../x",
        "StudyInstanceUID": "../../study",
        "AccessionNumber": "=1+1|'x'!A",
        "InstitutionName": "<script>alert(1)</script>\x1b]0;x\x07",
        "StationName": "-2+3+cmd",
    }
    zeros = zlib.compressobj(9)
    rows = zeros.compress(bytes(100 << 20)) + zeros.flush()
    return {
        "tags": (dicom(**tricks), None),
        "rows": (dicom(Rows=65535, Columns=65535), {"too_large", "truncated"}),
        "frames": (dicom(NumberOfFrames=2**31 - 1), {"multi_frame", "too_large", "unreadable"}),
        "deep": (with_tail(nested_sequences(10_000)), {"unreadable"}),
        "garbage": (
            with_tail(nested_sequences(1) + os.urandom(1 << 20) * 100),
            {"unreadable", "truncated", "decoder_out_of_memory", "decoder_timed_out"},
        ),
        "deflated": (deflated_bomb(), {"too_large"}),
        "png": (png(65535, rows=rows), {"too_large"}),
        "png text": (text_bomb(), {"too_small", "unreadable", "truncated", "no_contrast"}),
        "text": (b"#!/bin/sh\nrm -rf /\n", {"not_an_image"}),
        "empty": (b"", {"truncated", "not_an_image"}),
    }


def snapshot(folder):
    """Everything below a folder that a program might have changed."""
    found = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        content = path.read_bytes() if stat.S_ISREG(status.st_mode) else None
        found[str(path)] = (status.st_mode, status.st_uid, status.st_mtime_ns, content)
    return found


def put_special(home, outside):
    """What is no file to be taken; the names of what was put."""
    incoming = home.incoming
    os.mkfifo(incoming / "fifo.png")
    with socket.socket(socket.AF_UNIX) as end:
        end.bind(os.path.relpath(incoming / "socket"))
    names = ["fifo.png", "socket", "passwd.png", "dangling.png", "folder.png", "loop"]
    with suppress(PermissionError):
        os.mknod(incoming / "device", 0o600 | stat.S_IFCHR, os.makedev(1, 5))
        names.append("device")
    (incoming / "passwd.png").symlink_to("/etc/passwd")
    (incoming / "dangling.png").symlink_to("nowhere")
    (incoming / "folder.png").symlink_to(outside)
    (incoming / "loop").symlink_to(incoming)
    (incoming / "a" / "b").mkdir(parents=True)
    (incoming / "a" / "b" / "up").symlink_to("../..")
    names.append("a/b/up")
    return names


def exchange(path, contents, seconds):
    """Put one file after another in a file's place, cut it, and let it grow, for a while."""
    until = time.monotonic() + seconds
    number = 0
    while time.monotonic() < until:
        content = contents[number % len(contents)]
        beside = path.with_name(f".exchange-{number}")
        beside.write_bytes(content)
        beside.rename(path)
        with suppress(FileNotFoundError), path.open("r+b") as file:
            file.truncate(len(content) // 2)
            file.seek(len(content) // 2)
            file.write(content[len(content) // 2 :])
        number += 1
        time.sleep(0.01)


@pytest.fixture(scope="module")
def attacked(make_home, picture):
    """A home after all of it, its daemon stopped in order, and what was dropped."""
    patch = pytest.MonkeyPatch()
    home = make_home(STABILITY_S="0.5", MIN_FREE_MB="0")
    outside = home.root.parent / "outside"
    (outside / "folder").mkdir(parents=True)
    (outside / "folder" / "x.png").write_bytes(picture(900))
    linked = picture(901)
    (outside / "linked.png").write_bytes(linked)
    (outside / "linked.png").chmod(0o640)
    patch.chdir(home.root.parent)  # a socket's path has to be short
    named = {name: picture(1000 + number) for number, name in enumerate(NAMES)}
    bad = bombs()
    swapped = [picture(1100 + number) for number in range(3)]
    with home.daemon() as daemon:
        special = put_special(home, outside)
        before = snapshot(outside)
        os.link(outside / "linked.png", home.incoming / "hard link.png")
        for name, content in named.items():
            (home.incoming / os.fsdecode(name)).write_bytes(content)
        for name, (content, _) in bad.items():
            home.drop(f"{PATIENT} {name}", content)
        # Hidden until they are what they are to be: the daemon is quick.
        sparse = home.drop(".sparse.png", b"x")
        os.truncate(sparse, SPARSE_BYTES)
        sparse.rename(home.incoming / "sparse.png")
        home.drop(".locked/x.png", picture(902))
        (home.incoming / ".locked").chmod(0)
        locked = (home.incoming / ".locked").rename(home.incoming / "locked")
        thread = threading.Thread(target=exchange, args=(home.incoming / "swap.png", swapped, 3.0))
        thread.start()
        thread.join()
        home.drop("swap.png", swapped[-1])
        after = picture(1200)
        home.drop("after.png", after)
        contents = [*named.values(), *(content for content, _ in bad.values()), linked, after]
        home.wait_until_ended([*contents, swapped[-1]], PATIENCE_S)
        wait_for(lambda: not home.files("work"), home.log, PATIENCE_S)
        assert daemon.stop() == 0, daemon.log()
        log = daemon.log()
    locked.chmod(0o700)
    patch.undo()
    home.bad, home.named, home.linked, home.swapped = bad, named, linked, swapped
    home.special, home.outside, home.before, home.said = special, outside, before, log
    return home


def test_each_file_has_exactly_one_end(attacked):
    rows = {row.sha256: row for row in attacked.rows()}
    assert all(row.has_ended and row.is_kept for row in rows.values())
    for content in [*attacked.named.values(), attacked.linked]:
        assert rows[sha256(content)].state == "done"
    for name, (content, reasons) in attacked.bad.items():
        row = rows[sha256(content)]
        if reasons is None:
            assert row.state == "done", (name, row)
        else:
            assert row.reason in reasons, (name, row)
            assert row.attempts == 1, (name, row)
    for row in rows.values():
        assert (attacked.root / row.path).is_file()
        assert not (attacked.root / row.path).is_symlink()
    assert rows[sha256(attacked.swapped[-1])].state == "done"


def test_what_is_no_file_or_too_large_is_left_where_it_is(attacked):
    assert (attacked.incoming / "sparse.png").stat().st_size == SPARSE_BYTES
    assert "larger than 8 GiB" in attacked.said
    for name in attacked.special:
        assert os.path.lexists(attacked.incoming / name), name
    assert attacked.said.count("action=left_alone") >= len(attacked.special)
    assert not attacked.files("work")


def test_nothing_outside_of_the_home_is_touched(attacked):
    assert snapshot(attacked.outside) == attacked.before
    beside = {path.name for path in attacked.root.parent.iterdir()}
    assert beside <= {"home", "outside"} | {name for name in beside if name.startswith("stderr-")}
    assert Path("/etc/passwd").stat().st_mode & 0o777 == 0o644


def test_the_log_is_whole_lines_that_name_nobody(attacked):
    log = attacked.said
    assert "Traceback" not in log
    assert all(char == "\n" or char.isprintable() for char in log)
    for word in (PATIENT, "19640812", "<script>", "cmd|", "../../x", "lookalike"):
        assert word.lower() not in log.lower(), word
    assert log.count("action=ready") == 1
    assert all(line.startswith(("20", "action=")) or "action=" in line for line in log.splitlines())


def assert_steers_nothing(text):
    """No escape, bell, bidirectional or other control character but line feed and tab."""
    assert [char for char in text if not char.isprintable() and char not in "\n\t"] == []


def test_no_command_s_output_steers_a_terminal_or_ends_in_a_traceback(attacked, monkeypatch):
    # The environment names whoever runs a command, in any bytes.
    monkeypatch.setenv("LOGNAME", os.fsdecode(b"\x1b[2J\n\xff"))
    listed = json.loads(attacked.command("results", "list", "--json").stdout)
    hostile = [
        str(one["id"])
        for one in listed
        if one["patient_id"] == "../../x" or "\x1b" in one["source_name"]
    ]
    assert len(hostile) >= 2
    expected = {
        ("results", "list"): 0,
        ("results", "list", "--json"): 0,
        ("results", "show", hostile[0]): 0,
        ("results", "show", hostile[-1], "--json"): 0,
        ("results", "show", "../../x"): 1,
        ("results", "stats"): 0,
        ("results", "export", "-o", "exported.csv"): 0,
        ("doctor",): 0,
        ("reconcile",): 0,
        ("retry", "--failed"): 0,
        ("audit", "list"): 0,
        ("audit", "list", "--json"): 0,
    }
    for words, status in expected.items():
        said = attacked.command(*words)
        assert said.returncode == status, (words, said.stdout, said.stderr)
        assert "Traceback" not in said.stderr
        assert_steers_nothing(said.stdout)
        assert_steers_nothing(said.stderr)
    noted = json.loads(said.stdout)
    assert "results export" in {row["action"] for row in noted}
    assert all("LOGNAME=\x1b[2J\n\\udcff" in row["environment"] for row in noted)
    (attacked.root.parent / "exported.csv").unlink()


def test_no_exported_cell_is_a_formula_and_every_value_is_kept(attacked, tmp_path):
    for ending in ("csv", "json"):
        done = attacked.command("results", "export", "-o", str(tmp_path / f"out.{ending}"))
        assert done.returncode == 0, done.stderr
        assert_steers_nothing(done.stdout)
    text = (tmp_path / "out.csv").read_bytes().decode("utf-8")
    rows = list(csv.DictReader(io.StringIO(text, newline="")))
    for row in rows:
        for name, value in row.items():
            is_number = name in ("probability", "logit", "threshold") and value != ""
            assert is_number or not value.startswith(tuple("=+-@\t\r")), (name, value)
    assert "'=cmd|' C calc'!A0.png" in {row["source_name"] for row in rows}
    values = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert len(values) == len(rows) == len(attacked.rows())
    assert "=cmd|' C calc'!A0.png" in {value["source_name"] for value in values}
