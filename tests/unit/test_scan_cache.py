"""A scan reads a file once, unless it has changed; no patient's ID is left behind."""

import dataclasses
import os
import shutil

import cv2
import numpy as np
import pytest

from lungwatch.training.data import scan as module
from lungwatch.training.data.dataset import Sample
from lungwatch.training.data.duplicates import together
from lungwatch.training.data.scan import ScanCache, scan


@pytest.fixture
def samples(tmp_path):
    rng = np.random.default_rng(0)
    found = []
    for index in range(5):
        path = tmp_path / f"{index}.png"
        assert cv2.imwrite(str(path), rng.integers(0, 255, (80, 70), np.uint8))
        found.append(Sample(path=path, finding="NORMAL"))
    return found


@pytest.fixture
def read(monkeypatch):
    real, paths = module.read_radiograph, []
    monkeypatch.setattr(
        module, "read_radiograph", lambda path: paths.append(path.name) or real(path)
    )
    return paths


def plain(looks):
    return [
        {
            f.name: value.tolist() if isinstance(value, np.ndarray) else value
            for f in dataclasses.fields(look)
            for value in [getattr(look, f.name)]
        }
        for look in looks
    ]


def test_a_second_scan_reads_nothing_and_finds_the_same(samples, tmp_path, read):
    first, _ = scan(samples, cache=ScanCache(tmp_path / "cache"))
    assert len(read) == 5
    again, _ = scan(samples, cache=ScanCache(tmp_path / "cache"))
    assert len(read) == 5
    assert plain(again) == plain(first) == plain(scan(samples)[0])


def test_a_changed_file_is_read_again_and_a_broken_block_is_no_harm(samples, tmp_path, read):
    scan(samples, cache=ScanCache(tmp_path / "cache"))
    changed = samples[2].path
    os.utime(changed, ns=(0, 1))
    scan(samples, cache=ScanCache(tmp_path / "cache"))
    assert read[5:] == ["2.png"]
    for block in (tmp_path / "cache").glob("*.npz"):
        block.write_bytes(b"broken")
    looks, _ = scan(samples, cache=ScanCache(tmp_path / "cache"))
    assert len(looks) == 5
    assert len(read) == 11


def test_an_unreadable_file_is_tried_again(samples, tmp_path, read):
    samples[0].path.write_bytes(b"nothing")
    for _ in range(2):
        _, unreadable = scan(samples, cache=ScanCache(tmp_path / "cache"))
        assert [bad.sample.path.name for bad in unreadable] == ["0.png"]
    assert read.count("0.png") == 2
    assert read.count("1.png") == 1


def test_a_patients_images_stay_together_and_the_id_is_not_written(tmp_path, rg1):
    found = []
    for name in ("a.dcm", "b.dcm"):
        shutil.copy(rg1, tmp_path / name)
        found.append(Sample(path=tmp_path / name, finding="NORMAL"))
    known, _ = scan(found)
    patient = known[0].patient_id
    assert patient
    for _ in range(2):
        looks, _ = scan(found, cache=ScanCache(tmp_path / "cache"))
        assert looks[0].patient_id == looks[1].patient_id != patient
        assert together(looks, []) == [0, 0]
    for file in (tmp_path / "cache").iterdir():
        assert patient.encode() not in file.read_bytes()
