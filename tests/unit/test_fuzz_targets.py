"""Fuzz targets, run on a few hundred inputs and on every input that failed once."""

import io
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from lungwatch.contract import ModelContract
from lungwatch.daemon.home import Home
from lungwatch.daemon.intake.archives import Unpacker
from lungwatch.daemon.intake.custody import OwnedFile
from lungwatch.daemon.intake.eligibility import NameRules
from lungwatch.errors import FileRejected, ModelError, Reason
from lungwatch.imaging.radiograph import ReadPolicy

FUZZ = Path(__file__).parents[2] / "fuzz"
CHANGES = 120


@pytest.fixture(scope="module")
def fuzz():
    """The modules of the folder, which is not installed."""
    sys.path.insert(0, str(FUZZ))
    try:
        import seeds
        import targets

        yield targets, seeds
    finally:
        sys.path.remove(str(FUZZ))


TARGETS = ("dicom", "jpeg", "png", "zip", "contract", "bundle", "config")


@pytest.mark.parametrize("target", TARGETS)
def test_damaged_input_is_refused_with_a_reason_or_read_within_its_promises(fuzz, target):
    targets, seeds = fuzz
    run, random = targets.TARGETS[target], np.random.default_rng(1)
    starts = list(seeds.seeds(target))
    assert set(targets.TARGETS) == set(TARGETS)
    for start in starts:
        run(start)
        for _ in range(CHANGES // len(starts)):
            data = bytearray(start)
            for position in random.integers(0, len(data), random.integers(1, 6)):
                data[position] = random.integers(0, 256)
            run(bytes(data[: random.integers(1, len(data) + 1)]))


def test_the_seeds_of_images_are_read_whole(fuzz, tmp_path):
    """Else the fuzzer would start from refusals."""
    targets, seeds = fuzz
    from lungwatch.imaging.reader import read_radiograph

    for data in seeds.seeds("dicom"):
        (tmp_path / "seed").write_bytes(data)
        pixels = read_radiograph(tmp_path / "seed", targets.POLICY).pixels
        assert pixels.max() > pixels.min()


def test_a_broken_promise_is_noticed(fuzz, monkeypatch):
    """The fuzzer's own check can fail."""
    targets, seeds = fuzz
    monkeypatch.setattr(targets, "read_radiograph", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        targets.read(next(seeds.seeds("dicom")))


def test_a_member_of_a_zip_without_a_name_does_not_end_the_daemon(tmp_path):
    """Found by fuzzing: it raised IndexError, which stopped the service three times over."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("x", b"a")
    data = file.getvalue()
    # The name's length is set to 0 in both headers, and the name taken out.
    local = data.index(b"PK\x03\x04")
    central = data.index(b"PK\x01\x02")
    nameless = (
        data[local : local + 26]
        + b"\x00\x00"
        + data[local + 28 : local + 30]
        + data[local + 31 : central]
        + data[central : central + 28]
        + b"\x00\x00"
        + data[central + 30 : central + 46]
        + data[central + 47 :]
    )
    end = nameless.index(b"PK\x05\x06")
    nameless = (
        nameless[: end + 12]
        + (end - central + 1).to_bytes(4, "little")
        + (central - 1).to_bytes(4, "little")
        + nameless[end + 20 :]
    )
    with zipfile.ZipFile(io.BytesIO(nameless)) as archive:
        assert archive.namelist() == [""]
    home = Home(tmp_path / "home")
    home.prepare()
    (tmp_path / "nameless.zip").write_bytes(nameless)
    with pytest.raises(FileRejected) as refused:
        Unpacker(home, ReadPolicy(), NameRules()).unpack(OwnedFile.open(tmp_path / "nameless.zip"))
    assert refused.value.reason is Reason.BAD_ARCHIVE
    assert list(home.incoming.iterdir()) == list(home.unpacking.iterdir()) == []


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA, zipfile.ZIP_DEFLATED])
def test_a_damaged_stream_of_any_method_does_not_end_the_daemon(tmp_path, method):
    """Found by fuzzing: bzip2's own error looked like the disk's."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        archive.writestr("x", bytes(range(256)) * 20)
    data = bytearray(file.getvalue())
    start = 30 + 1
    data[start : start + 20] = b"\xa5" * 20
    home = Home(tmp_path / "home")
    home.prepare()
    (tmp_path / "damaged.zip").write_bytes(data)
    with pytest.raises(FileRejected) as refused:
        Unpacker(home, ReadPolicy(), NameRules()).unpack(OwnedFile.open(tmp_path / "damaged.zip"))
    assert refused.value.reason is Reason.BAD_ARCHIVE


def test_a_contract_of_endless_brackets_is_refused():
    """Found by thought: the parser runs out of stack, not out of patience."""
    with pytest.raises(ModelError):
        ModelContract.from_json("[" * 200_000)
