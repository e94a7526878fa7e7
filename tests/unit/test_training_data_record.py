"""A run knows its data again, and a model the images that it learnt from."""

from dataclasses import replace

import pytest

from lungwatch.bundle import read_bundle
from lungwatch.contract import Calibration
from lungwatch.errors import ConfigError, DatasetError, ModelError
from lungwatch.export.exporter import check_validation, check_varied, write_bundle
from lungwatch.export.quantise import val_samples
from lungwatch.training.data.dataset import Sample
from lungwatch.training.data.splits import (
    DataRecord,
    LearntImages,
    learnt_from,
    learnt_of,
    prefixes,
    sha256_of,
)
from lungwatch.training.fitting.preparation import hold_back
from lungwatch.training.fitting.run import RunFolder
from tests.unit.test_export_bundle import contract


def sample(folder, name, **values):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        path.write_bytes(name.encode())
    return Sample(path=path, **({"finding": "COVID", "split": "train"} | values))


def record(folder, samples):
    return DataRecord.of(samples, [s.finding for s in samples], folder)


def begin(root, folder, samples, *, resume=True):
    RunFolder(root=root).begin({"fit": 1}, resume=resume, record=record(folder, samples))


def test_a_run_is_resumed_with_the_data_that_it_began_with(tmp_path):
    data = tmp_path / "data"
    samples = [sample(data, f"{n}.png", patient=f"p{n}") for n in range(4)]
    begin(tmp_path / "run", data, samples, resume=False)
    begin(tmp_path / "run", data, samples[::-1])
    text = (tmp_path / "run" / "data.csv").read_text()
    assert text.splitlines()[0] == "file,sha256,label,split,patient"
    assert "p1" not in text


def test_what_has_changed_is_counted_and_named_and_the_run_left_as_it_is(tmp_path):
    data, run = tmp_path / "data", tmp_path / "run"
    samples = [sample(data, f"{n}.png", patient=f"p{n}") for n in range(5)]
    begin(run, data, samples, resume=False)
    kept = {path.name: path.read_bytes() for path in run.iterdir()}
    (data / "0.png").write_bytes(b"another picture")
    now = [
        samples[0],
        replace(samples[1], finding="NORMAL", split="val"),
        replace(samples[2], patient="p9"),
        samples[3],
        sample(data, "new.png"),
    ]
    with pytest.raises(ConfigError) as refused:
        begin(run, data, now)
    assert (
        "1 added (new.png); 1 removed (4.png); 3 changed (0.png: sha256, 1.png: label, split, "
        "2.png: patient)"
    ) in str(refused.value)
    assert {path.name: path.read_bytes() for path in run.iterdir()} == kept


def test_the_record_of_ten_thousand_images_is_small_and_comes_back():
    digests = [f"{n:064x}"[::-1] for n in range(1, 10_001)]
    learnt = LearntImages(train=prefixes(digests), val=prefixes(digests[:3]))
    assert len(learnt.train) == 10_000
    text = learnt.to_json().encode()
    assert len(text) < 110_000
    assert LearntImages.from_json(text, "learnt.json") == learnt
    with pytest.raises(ModelError, match=r"learnt\.json is damaged"):
        LearntImages.from_json(text[:-9], "learnt.json")


def test_a_bundles_record_is_covered_by_its_digests(tmp_path):
    samples = [sample(tmp_path, "a.png"), sample(tmp_path, "b.png")]
    learnt = LearntImages(train=prefixes(sha256_of([samples[0].path])))
    told = {"model": b"graph", "contract": contract(), "card": ""}
    folder = write_bundle(tmp_path / "with", **told, learnt=learnt.to_json().encode())
    assert learnt_of(folder) == learnt_of(folder / "model.onnx") == learnt
    assert learnt_from(samples, learnt_of(folder)) == [True, False]
    without = write_bundle(tmp_path / "without", **told)
    assert learnt_of(without) is None
    (without / "learnt.json").write_text(LearntImages().to_json())
    with pytest.raises(ModelError, match="does not list it"):
        read_bundle(without).check_digests()
    (folder / "learnt.json").write_text(LearntImages().to_json())
    with pytest.raises(ModelError, match="SHA-256 differs"):
        learnt_of(folder)
    (folder / "learnt.json").unlink()
    with pytest.raises(ModelError, match="SHA-256 differs"):
        learnt_of(folder)


def test_a_third_of_the_patients_of_either_class_calibrates_a_retrained_network(tmp_path):
    samples = [
        Sample(
            path=tmp_path / f"{n}.png",
            finding="COVID" if n < 18 else "NORMAL",
            source="a",
            patient=f"p{n // 2}",
        )
        for n in range(54)
    ]
    chosen = hold_back(samples, tmp_path)
    assert chosen == hold_back(samples, tmp_path)
    patients = [samples[i].patient for i in chosen]
    assert len(patients) == 2 * len(set(patients))
    assert sum(samples[i].positive for i in chosen) == 6
    assert len(chosen) == 18
    # The choice does not hang on the order or on what else there is of the other class.
    turned = samples[::-1]
    assert {turned[i].path for i in hold_back(turned, tmp_path)} == {
        samples[i].path for i in chosen
    }


def test_a_third_that_would_lack_a_class_is_all_of_them(tmp_path):
    mixed = [
        Sample(path=tmp_path / f"{n}.png", finding=finding, patient=f"p{n}")
        for n in range(2)
        for finding in ("COVID", "NORMAL")
    ]
    alone = [replace(one, patient="one") for one in mixed]
    assert hold_back(alone, tmp_path) == [0, 1, 2, 3]


@pytest.mark.parametrize("area", [float("nan"), 0.3, 0.5, 0.55])
def test_a_network_no_better_than_chance_is_refused(area):
    with pytest.raises(ModelError, match="no better than chance"):
        check_validation(area, Calibration(slope=0.7), "net")


def test_a_network_without_a_rising_calibration_or_with_one_answer_is_refused():
    import numpy as np

    check_validation(0.56, Calibration(slope=0.7), "net")
    with pytest.raises(ModelError, match="slope above 0"):
        check_validation(0.56, Calibration(), "net")
    check_varied(np.array([0.1, 0.2], np.float32), "net")
    with pytest.raises(ModelError, match="the same answer"):
        check_varied(np.full(5, 0.1, np.float32), "net")
    with pytest.raises(ModelError, match="diverged"):
        check_varied(np.array([0.1, np.nan], np.float32), "net")


def test_validation_images_that_were_learnt_from_fit_nothing_on_export(tmp_path):
    samples = [
        sample(tmp_path, f"{finding}-{n}.png", finding=finding, split="val")
        for finding in ("COVID", "NORMAL")
        for n in range(3)
    ]
    learnt = LearntImages(train=prefixes(sha256_of([s.path for s in samples[:2]])))
    assert val_samples(samples, "data", None) == samples
    assert val_samples(samples, "data", learnt) == samples[2:]
    all_covid = LearntImages(train=prefixes(sha256_of([s.path for s in samples[:3]])))
    with pytest.raises(DatasetError, match="did not learn from holds one class only"):
        val_samples(samples, "data", all_covid)
