"""Data sets are found in every layout, and refused with the fault's name."""

from pathlib import Path

import cv2
import numpy as np
import pytest

from lungwatch.errors import ConfigError, DatasetError
from lungwatch.preprocess import PreprocessSpec
from lungwatch.training.data.dataset import (
    LabelMap,
    Sample,
    dataset_name,
    describe,
    licences,
    list_dataset,
    load_dataset,
    select,
)
from lungwatch.training.data.pixels import read_pixels, targets
from lungwatch.training.fitting.tasks import epoch_batches, sampling_weights


def image(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    grey = np.random.default_rng(len(str(path))).integers(0, 256, (80, 90), dtype=np.uint8)
    assert cv2.imwrite(str(path), grey)
    return path


def manifest(folder, text):
    (folder / "manifest.csv").write_text(text, encoding="utf-8")
    return folder


def test_folders_by_class_are_one_unsplit_set_that_serves_as_its_own_test_split(tmp_path):
    for finding in ("COVID", "NORMAL", "OTHER_PNEUMONIA"):
        image(tmp_path / finding / "a.png")
    samples = load_dataset(tmp_path)
    assert [s.finding for s in samples] == ["COVID", "NORMAL", "OTHER_PNEUMONIA"]
    assert select(samples, "test") == samples
    assert targets(samples).tolist() == [1.0, 0.0, 0.0]


def test_folders_by_split_and_class_keep_their_splits(tmp_path):
    for split in ("train", "test"):
        for finding in ("COVID", "NORMAL"):
            image(tmp_path / split / finding / f"{split}.png")
    samples = load_dataset(tmp_path)
    assert {s.path.name for s in select(samples, "train")} == {"train.png"}
    assert {s.path.name for s in select(samples, "test")} == {"test.png"}


def test_a_manifest_brings_source_patient_and_licence(tmp_path):
    image(tmp_path / "x" / "a.png")
    image(tmp_path / "x" / "b.png")
    manifest(
        tmp_path,
        "file,label,split,source,patient,licence,extra\n"
        "x/a.png,COVID,train,here,p1,CC BY 4.0,1\n"
        "x/b.png,NORMAL,val,there,p2, ,2\n",
    )
    for location in (tmp_path, tmp_path / "manifest.csv"):
        first, second = load_dataset(location)
        assert (first.source, first.patient, first.split) == ("here", "p1", "train")
        assert dataset_name(location) == tmp_path.name
    assert describe([first, second]) == {"here/COVID": 1, "there/NORMAL": 1}
    assert licences([first, second]) == {"CC BY 4.0": 1, "not stated": 1}


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("file,label\nmissing.png,COVID\n", r"manifest\.csv:2: no such file: missing\.png"),
        ("file,label\na.png,COVID-19\n", "unknown label 'COVID-19'"),
        ("file,label,split\na.png,COVID,dev\n", "unknown split 'dev'"),
        ("name,label\na.png,COVID\n", "column missing: file"),
        ("file,label\n", "no images listed"),
    ],
)
def test_a_faulty_manifest_is_refused_with_the_line_and_the_fault(tmp_path, text, fault):
    image(tmp_path / "a.png")
    with pytest.raises(DatasetError, match=fault):
        load_dataset(manifest(tmp_path, text))


def test_a_binary_file_is_no_manifest(tmp_path):
    with pytest.raises(DatasetError, match="no manifest"):
        load_dataset(image(tmp_path / "a.png"))


def test_a_missing_or_empty_folder_is_named(tmp_path):
    with pytest.raises(DatasetError, match="nowhere"):
        load_dataset(tmp_path / "nowhere")
    with pytest.raises(DatasetError, match="no images found"):
        load_dataset(tmp_path)


def test_an_empty_split_and_one_class_only_are_named():
    one = [Sample(path=Path("a"), finding="COVID", split="train")]
    with pytest.raises(DatasetError, match="'val' is empty"):
        select(one, "val")
    with pytest.raises(DatasetError, match=r"one class only \(COVID\)"):
        select(one, "train")


def test_an_unreadable_file_is_named(tmp_path):
    (tmp_path / "broken.png").write_text("no picture")
    with pytest.raises(DatasetError, match=r"broken\.png"):
        read_pixels(
            [Sample(path=tmp_path / "broken.png", finding="COVID")], PreprocessSpec(size_px=32)
        )


def test_pixels_come_in_the_samples_order(tmp_path):
    paths = [image(tmp_path / f"{'x' * n}.png") for n in range(1, 9)]
    samples = [Sample(path=path, finding="COVID") for path in paths]
    spec = PreprocessSpec(size_px=32)
    together = read_pixels(samples, spec, workers=4)
    alone = np.concatenate([read_pixels([s], spec) for s in samples])
    np.testing.assert_array_equal(together, alone)


def groups():
    return [
        *[Sample(path=Path(f"a{i}"), finding="COVID", source="a") for i in range(10)],
        *[Sample(path=Path(f"b{i}"), finding="NORMAL", source="b") for i in range(64)],
        *[Sample(path=Path(f"c{i}"), finding="OTHER_PNEUMONIA", source="a") for i in range(4)],
    ]


def test_both_classes_are_drawn_equally_and_small_groups_more_than_their_number():
    weights = sampling_weights(groups())
    assert weights.sum() == pytest.approx(1.0)
    assert weights[:10].sum() == pytest.approx(0.5)
    # Shares in proportion to the roots: 8 to 2 instead of 64 to 4.
    assert weights[10:74].sum() / weights[74:].sum() == pytest.approx(4.0)


def test_an_epoch_draws_each_image_as_often_as_its_weight_says_to_within_one():
    weights = sampling_weights(groups())
    order = np.concatenate(epoch_batches(weights, np.random.default_rng(3), 200))
    counts = np.bincount(order, minlength=len(weights))
    assert len(order) == 200
    assert np.abs(counts - 200 * weights).max() < 1.0 + 1e-9


def test_a_class_folder_that_is_no_finding_is_named_counted_and_refused_without_a_map(tmp_path):
    for place in ("COVID/a", "NORMAL/b", "PNEUMONIA/c", "PNEUMONIA/d", "MASKS/e"):
        image(tmp_path / f"{place}.png")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "readme.txt").write_text("no image")
    with pytest.raises(DatasetError, match=r"'MASKS' \(1 images\), 'PNEUMONIA' \(2 images\)"):
        load_dataset(tmp_path)
    with pytest.raises(DatasetError, match=r"--label-map 'MASKS=.*'MASKS=ignore'"):
        load_dataset(tmp_path)
    labels = LabelMap.parse(["PNEUMONIA=OTHER_PNEUMONIA", "MASKS=ignore"])
    listing = list_dataset(tmp_path, labels)
    assert [s.finding for s in listing.samples] == ["COVID", "NORMAL"] + 2 * ["OTHER_PNEUMONIA"]
    assert listing.labels.mapped == {"PNEUMONIA": 2}
    assert listing.labels.ignored == {"MASKS": 1}
    assert load_dataset(tmp_path, labels) == listing.samples


def test_images_in_folders_within_class_folders_and_unknown_splits_do_not_vanish(tmp_path):
    for place in ("train/COVID/images/a", "train/COVID/masks/a", "train/NORMAL/b", "valid/COVID/c"):
        image(tmp_path / f"{place}.png")
    (tmp_path / "train" / "NORMAL" / "loop").symlink_to(tmp_path / "train")
    with pytest.raises(DatasetError, match=r"'COVID/images' .*'COVID/masks' .*'valid/COVID'"):
        load_dataset(tmp_path)
    labels = LabelMap.parse(["COVID/images=COVID", "COVID/masks=ignore", "valid/COVID=ignore"])
    assert [(s.finding, s.split, s.path.name) for s in load_dataset(tmp_path, labels)] == [
        ("NORMAL", "train", "b.png"),
        ("COVID", "train", "a.png"),
    ]


def test_unknown_labels_of_a_manifest_are_counted_and_mapped(tmp_path):
    for name in "abcd":
        image(tmp_path / f"{name}.png")
    text = "file,label\na.png,COVID\nb.png,Viral=x\nc.png,Viral=x\nd.png,\n"
    with pytest.raises(
        DatasetError, match=r"unknown label '' \(1 images\), 'Viral=x' \(2 images\)"
    ):
        load_dataset(manifest(tmp_path, text))
    labels = LabelMap.parse(["Viral=x=OTHER_PNEUMONIA", "=ignore"])
    assert [s.finding for s in load_dataset(tmp_path, labels)] == ["COVID"] + 2 * [
        "OTHER_PNEUMONIA"
    ]
    with pytest.raises(DatasetError, match="leaves out all 4 images"):
        load_dataset(tmp_path, LabelMap.parse(["COVID=ignore", "Viral=x=ignore", "=ignore"]))


@pytest.mark.parametrize("texts", [["PNEUMONIA"], ["A=PNEUMONIA"], ["A=COVID", "A=NORMAL"]])
def test_a_map_that_cannot_be_read_is_refused(texts):
    with pytest.raises(ConfigError, match="--label-map"):
        LabelMap.parse(texts)
