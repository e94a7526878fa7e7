"""Lung fields are found alike in NumPy and in a graph, and sources join in as pairs by rule."""

import csv

import cv2
import numpy as np
import pytest

from lungwatch.errors import DatasetError
from lungwatch.preprocess import PreprocessSpec
from lungwatch.training.data.dataset import Sample
from lungwatch.training.networks.lungs import cut_field
from lungwatch.training.recipes.fields import Finder, paired_sources, read_fields

CELLS = 20
SPEC = PreprocessSpec(size_px=40)


def chances(speck: bool = False):
    """Two lungs of high chance, float32 (20, 20), and far from them a speck of one cell."""
    found = np.full((CELLS, CELLS), 0.02, np.float32)
    found[5:15, 4:9] = found[5:15, 12:17] = 0.95
    if speck:
        found[1, 1] = 0.95
    return found


def xray(side=80):
    rng = np.random.default_rng(0)
    return rng.uniform(0.2, 0.8, (side, side)).astype(np.float32)


def test_a_field_is_the_exact_box_of_the_lungs_without_specks():
    plain, specked = cut_field(xray(), chances()), cut_field(xray(), chances(speck=True))
    assert np.array_equal(plain.pixels, specked.pixels)
    # Ten cells of four pixels by thirteen.
    assert plain.pixels.shape == plain.lungs.shape
    assert abs(plain.pixels.shape[0] - 40) <= 2
    assert abs(plain.pixels.shape[1] - 52) <= 2
    for edge in (plain.lungs[0], plain.lungs[-1], plain.lungs[:, 0], plain.lungs[:, -1]):
        assert edge.any()
    assert not plain.lungs[:, plain.lungs.shape[1] // 2].any()


def test_a_picture_without_lungs_is_its_own_field():
    field = cut_field(xray(), np.zeros((CELLS, CELLS), np.float32))
    assert field.pixels.shape == (80, 80)
    assert field.lungs.all()


def test_a_large_field_is_shrunk_to_what_the_network_sees():
    field = cut_field(xray(600), chances())
    assert max(field.pixels.shape) == 192


def sample(source, finding, split="train"):
    return Sample(path=None, finding=finding, source=source, split=split)


def test_a_source_with_one_finding_is_no_pair():
    samples = [
        *[sample("both", "NORMAL")] * 3,
        *[sample("both", "OTHER_PNEUMONIA")] * 3,
        *[sample("normals", "NORMAL")] * 9,
        *[sample("covid", "COVID")] * 9,
        *[sample("few", "NORMAL")] * 9,
        *[sample("few", "OTHER_PNEUMONIA")] * 2,
        *[sample("few", "OTHER_PNEUMONIA", "test")] * 9,
    ]
    assert paired_sources(samples, 3) == {"both"}


def write(root, rows):
    """Write pictures of 64 px, and their manifest."""
    rng = np.random.default_rng(len(rows))
    with (root / "manifest.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("file", "label", "split", "source", "patient"))
        for number, (label, split, source, patient) in enumerate(rows):
            name = f"{number}.png"
            picture = rng.integers(40, 255, (64, 64)).astype(np.uint8)
            assert cv2.imwrite(str(root / name), picture)
            writer.writerow((name, label, split, source, patient))


@pytest.fixture
def ready(tmp_path):
    root = tmp_path / "ready"
    root.mkdir()
    labels = ("NORMAL", "OTHER", "OPACITY")
    write(root, [(label, split, "r", "") for split in ("train", "val") for label in labels])
    return root


def test_pairs_come_without_covid_and_without_patients_of_other_splits(ready, tmp_path):
    whole = tmp_path / "whole"
    whole.mkdir()
    rows = [
        *[("NORMAL", "train", "a", str(n)) for n in range(3)],
        *[("OTHER_PNEUMONIA", "train", "a", str(n)) for n in range(10, 13)],
        ("COVID", "train", "a", "20"),
        ("NORMAL", "val", "a", "0"),
        ("OTHER_PNEUMONIA", "test", "a", "30"),
        *[("NORMAL", "train", "b", str(n)) for n in range(5)],
    ]
    write(whole, rows)
    seen = []

    def find(pixels):
        seen.append(len(pixels))
        return np.stack([chances()] * len(pixels))

    data = read_fields(ready, whole, Finder(spec=SPEC, find=find), fewest=3)
    assert {group: len(found) for group, found in data.fields.items()} == {
        ("r", 0): 1,
        ("r", 1): 1,
        ("r", 2): 1,
    }
    assert {group: len(found) for group, found in data.pairs.items()} == {("a", 0): 2, ("a", 2): 3}
    assert set(data.val) == {("r", 0), ("r", 1), ("r", 2), ("a", 0)}
    assert data.about["pairs"] == {"name": "whole", "sources": ["a"], "train": 5, "dropped": 1}
    assert sum(seen) == 8


def test_unknown_labels_and_a_data_set_without_pairs_are_refused(ready, tmp_path):
    whole = tmp_path / "whole"
    whole.mkdir()
    write(whole, [("NORMAL", "train", "a", ""), ("COVID", "val", "a", "")])
    finder = Finder(spec=SPEC, find=lambda pixels: np.stack([chances()] * len(pixels)))
    with pytest.raises(DatasetError, match="no source has 50 training images each"):
        read_fields(ready, whole, finder)
    (ready / "more").mkdir()
    write(ready / "more", [("COVID", "train", "r", ""), ("NORMAL", "val", "r", "")])
    with pytest.raises(DatasetError, match="unknown labels: COVID"):
        read_fields(ready / "more")
