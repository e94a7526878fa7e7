"""`lungwatch dataset`: faults are named, reports stand alone, splits keep patients together."""

import csv
import json
import re
import shutil
from collections import defaultdict

import cv2
import numpy as np
import pytest
from click.testing import CliRunner

from lungwatch import RESEARCH_USE_ONLY
from lungwatch.cli.main import main
from lungwatch.training.data.dataset import load_dataset

pytest.importorskip("sklearn", reason="needs scikit-learn (extra 'train')")
pytest.importorskip("matplotlib", reason="needs matplotlib (extra 'train')")

pytestmark = pytest.mark.slow

CLASSES = ("COVID", "NORMAL", "OTHER_PNEUMONIA")


def write(path, seed, *, edge=None):
    """A picture of its own for every seed, with an edge of about a given grey, so not a frame."""
    rng = np.random.default_rng(seed)
    coarse = rng.uniform(40, 200, (24, 22)).astype(np.float32)
    image = np.clip(cv2.resize(coarse, (110, 120), interpolation=cv2.INTER_CUBIC), 0, 255)
    if edge is not None:
        bordered = rng.uniform(edge - 10, edge + 10, (148, 138)).astype(np.float32)
        bordered[14:-14, 14:-14] = image
        image = bordered
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), image.astype(np.uint8))


@pytest.fixture
def data(tmp_path):
    seed = 0
    for split, count in (("train", 8), ("val", 4), ("test", 4)):
        for finding in CLASSES:
            for index in range(count):
                write(tmp_path / "data" / split / finding / f"{index}.png", seed)
                seed += 1
    return tmp_path / "data"


def run(*args, code=0):
    result = CliRunner().invoke(main, ["dataset", *map(str, args)])
    assert result.exit_code == code, result.output
    return result


def test_a_sound_data_set_passes(data):
    found = json.loads(run("check", data, "--json").stdout)
    assert found["files"] == 48
    assert found["problems"] == []
    assert found["duplicates"] == []
    assert {c["feature"] for c in found["confounds"]} == {"size", "border", "histogram", "all"}
    assert RESEARCH_USE_ONLY in run("check", data).stdout


def test_a_leaked_copy_is_named_with_both_its_places(data):
    original = cv2.imread(str(data / "train/COVID/3.png"), cv2.IMREAD_GRAYSCALE)
    copy = cv2.resize(original, (100, 108), interpolation=cv2.INTER_AREA)
    assert cv2.imwrite(str(data / "test/COVID/leaked.jpg"), copy)
    found = json.loads(run("check", data, "--json", code=1).stdout)
    (problem,) = found["problems"]
    assert problem.startswith("leak: ")
    assert "train/COVID/3.png" in problem
    assert "test/COVID/leaked.jpg" in problem


def test_one_x_ray_under_two_labels_is_a_conflict(data):
    shutil.copy(data / "train/COVID/0.png", data / "train/NORMAL/other.png")
    found = json.loads(run("check", data, "--json", code=1).stdout)
    (problem,) = found["problems"]
    assert problem.startswith("label conflict: ")
    assert found["duplicates"][0]["identical"] is True
    assert found["duplicates"][0]["leak"] is False


def test_an_unreadable_file_is_named_by_every_command(data, tmp_path):
    (data / "val/NORMAL/broken.png").write_bytes(b"no picture")
    assert "unreadable: " in run("check", data, code=1).stdout
    assert "broken.png" in run("explore", data).stdout
    refused = run("split", data, "-o", tmp_path / "split", code=1)
    assert "broken.png" in refused.stderr
    assert not (tmp_path / "split/manifest.csv").exists()


def test_an_empty_split_is_named(data):
    shutil.rmtree(data / "val")
    (problem,) = json.loads(run("check", data, "--json", code=1).stdout)["problems"]
    assert "split 'val' holds no images" in problem


def test_one_class_only_is_named(data, tmp_path):
    for split in ("train", "val", "test"):
        for finding in CLASSES[1:]:
            shutil.rmtree(data / split / finding)
    problems = json.loads(run("check", data, "--json", code=1).stdout)["problems"]
    assert any("split 'train' holds COVID alone" in problem for problem in problems)
    refused = run("split", data, "-o", tmp_path / "split", code=1)
    assert "one class only (COVID)" in refused.stderr


def test_a_border_that_betrays_the_class_is_found_and_noise_is_not(tmp_path):
    for index in range(30):
        for finding, edge in (("COVID", 10), ("NORMAL", 60)):
            write(tmp_path / "shown" / finding / f"{index}.png", index + 500 * edge, edge=edge)
            write(tmp_path / "hidden" / finding / f"{index}.png", index + 500 * edge)

    def area(name):
        found = json.loads(run("check", tmp_path / name, "--json").stdout)
        areas = {c["feature"]: c["roc_auc"] for c in found["confounds"]}
        return areas["border"], found["verdict"]

    shown, sentence = area("shown")
    hidden, _ = area("hidden")
    assert shown > 0.99
    assert "can be predicted without the lungs" in sentence
    assert hidden < 0.75


def test_the_report_stands_alone_and_escapes_names(data, tmp_path):
    (data / "train/COVID/<script>x&.png").write_bytes(b"no picture")
    out = tmp_path / "out"
    found = json.loads(run("explore", data, "-o", out, "--json").stdout)
    page = (out / "report.html").read_text(encoding="utf-8")
    assert found["files"] == 49
    assert found["distribution"]["train"] == {"COVID": 9, "NORMAL": 8, "OTHER_PNEUMONIA": 8}
    assert RESEARCH_USE_ONLY in page
    assert "<script" not in page
    assert "&lt;script&gt;x&amp;.png" in page
    sources = re.findall(r'(?:src|href)="([^"]{0,30})', page)
    assert len(sources) >= 12
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    for name in ("width_shift", "rotation_deg", "zoom", "contrast", "brightness", "all combined"):
        assert f"Augmentation: {name}" in page


def test_the_same_seed_gives_the_same_results(data, tmp_path):
    for name in ("a", "b"):
        run("explore", data, "-o", tmp_path / name, "--seed", 3)
    for file in ("report.html", "results.json", "images.csv"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_a_run_folder_holds_what_was_asked_with_what_and_what_came_out(data, tmp_path):
    shutil.copy(data / "train/COVID/0.png", data / "test/NORMAL/leak.png")
    for command, code in (("explore", 0), ("check", 1)):
        out = tmp_path / command
        printed = json.loads(run(command, data, "-o", out, "--seed", 7, "--json", code=code).stdout)
        assert json.loads((out / "results.json").read_text()) == printed
        assert json.loads((out / "config.json").read_text())["seed"] == 7
        assert "packages" in json.loads((out / "environment.json").read_text())
        plots = sorted((out / "plots").glob("*.png"))
        assert len(plots) >= 2
        assert all(cv2.imread(str(plot)).std() > 1 for plot in plots)
    page = (tmp_path / "check" / "report.html").read_text(encoding="utf-8")
    assert "leak.png" in page
    assert RESEARCH_USE_ONLY in page
    assert re.findall(r'src="([^"]{0,22})', page) == ["data:image/png;base64,"] * len(plots)
    with (tmp_path / "explore" / "images.csv").open(newline="", encoding="utf-8") as file:
        assert len(list(csv.DictReader(file))) == 49


def test_an_interrupted_exploration_goes_on_and_ends_as_an_uninterrupted_one(
    data, tmp_path, monkeypatch
):
    from lungwatch.training.data import scan as module

    run("explore", data, "-o", tmp_path / "whole")
    real, read = module.read_radiograph, []

    def interrupted(path):
        read.append(path)
        if len(read) == 20:
            raise KeyboardInterrupt
        return real(path)

    monkeypatch.setattr(module, "read_radiograph", interrupted)
    CliRunner().invoke(main, ["dataset", "explore", str(data), "-o", str(tmp_path / "part")])
    assert not (tmp_path / "part" / "results.json").exists()
    again = []
    monkeypatch.setattr(module, "read_radiograph", lambda path: again.append(path) or real(path))
    refused = run("explore", data, "-o", tmp_path / "part", code=1)
    assert "resume" in refused.stderr
    run("explore", data, "-o", tmp_path / "part", "--resume")
    assert 0 < len(again) < 48
    for file in ("report.html", "results.json", "images.csv"):
        assert (tmp_path / "part" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


def test_a_folder_with_something_else_in_it_is_left_alone(data, tmp_path):
    kept = tmp_path / "other" / "mine.txt"
    kept.parent.mkdir()
    kept.write_text("mine")
    assert "not empty" in run("check", data, "-o", kept.parent, code=1).stderr
    assert list(kept.parent.iterdir()) == [kept]


@pytest.fixture
def patients(tmp_path):
    """120 images of two sources, three of each patient; one image twice under two patients."""
    folder = tmp_path / "patients"
    rows = ["file,label,source,patient,view,patient_known"]
    for index in range(120):
        finding, source = CLASSES[index // 40], "ab"[index % 2]
        write(folder / f"{index}.png", 1 if index == 47 else index)
        rows.append(f"{index}.png,{finding},{source},p{index // 6},AP,0")
    (folder / "manifest.csv").write_text("\n".join(rows))
    return folder


def test_a_split_keeps_patients_and_copies_together_and_classes_alike(patients, tmp_path):
    run("split", patients, "-o", tmp_path / "split", "--val", 0.2, "--test", 0.2)
    samples = load_dataset(tmp_path / "split")
    assert len(samples) == 120
    where = defaultdict(set)
    for sample in samples:
        where[sample.source, sample.patient].add(sample.split)
    assert all(len(splits) == 1 for splits in where.values())
    by_name = {sample.path.name: sample.split for sample in samples}
    assert by_name["1.png"] == by_name["47.png"]
    for finding in CLASSES:
        held = [s.split for s in samples if s.finding == finding]
        assert held.count("val") in range(5, 12)
        assert held.count("test") in range(5, 12)


def test_a_manifest_says_what_the_older_one_said_and_depends_on_the_seed_alone(patients, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run("split", patients, "-o", tmp_path / name, "--seed", seed)
    a, b, c = ((tmp_path / name / "manifest.csv").read_text() for name in "abc")
    assert a == b != c
    row = next(csv.DictReader(a.splitlines()))
    assert row["file"] == "../patients/0.png"
    assert (row["view"], row["patient_known"], row["w"], row["h"]) == ("AP", "0", "110", "120")


def test_a_split_leaves_a_run_folder_that_is_gone_on_in(patients, tmp_path):
    out = tmp_path / "split"
    found = json.loads(run("split", patients, "-o", out, "--json").stdout)
    assert found["images"] == found["all"]["train"] + found["all"]["val"] + found["all"]["test"]
    assert json.loads((out / "config.json").read_text())["val"] == 0.15
    assert "git" in json.loads((out / "environment.json").read_text())
    results = json.loads((out / "results.json").read_text())
    assert results["strata"] == found["strata"]
    (plot,) = (out / "plots").iterdir()
    assert cv2.imread(str(plot)).shape[1] > 300
    assert "Split of data set" in (out / "report.html").read_text()
    manifest = (out / "manifest.csv").read_bytes()
    (out / "manifest.csv").unlink()
    assert "holds a run already" in run("split", patients, "-o", out, code=1).stderr
    run("split", patients, "-o", out, "--resume")
    assert (out / "manifest.csv").read_bytes() == manifest
    other = run("split", patients, "-o", out, "--resume", "--seed", 2, code=1)
    assert "another configuration" in other.stderr


def test_a_manifest_is_never_overwritten(patients):
    before = (patients / "manifest.csv").read_bytes()
    refused = run("split", patients, "-o", patients, code=1)
    assert "is not empty" in refused.stderr
    assert (patients / "manifest.csv").read_bytes() == before


def test_shares_that_leave_nothing_to_train_on_are_refused(patients, tmp_path):
    refused = run("split", patients, "-o", tmp_path / "split", "--val", 0.6, "--test", 0.5, code=1)
    assert "together below 1" in refused.stderr


def test_a_dicom_is_read_and_its_patient_id_stays_out_of_the_manifest(data, tmp_path, rg1):
    shutil.copy(rg1, data / "train/NORMAL/rg1.dcm")
    found = json.loads(run("explore", data, "--json").stdout)
    assert found["formats"] == {"PNG": 48, "DICOM": 1}
    run("split", data, "-o", tmp_path / "split")
    text = (tmp_path / "split/manifest.csv").read_text()
    (row,) = (row for row in csv.DictReader(text.splitlines()) if row["file"].endswith(".dcm"))
    assert row["patient"] == "dicom-0001"


@pytest.mark.parametrize("command", ["check", "explore"])
def test_names_are_no_markup_in_a_report(data, tmp_path, command):
    """Whoever names a file, a source or a patient does not write the page that tells of it."""
    evil = "<img src=x onerror=alert(1)>"
    rows = []
    for path in sorted(data.rglob("*.png")):
        split, finding = path.relative_to(data).parts[:2]
        rows.append([str(path.relative_to(data)), finding, split, f"{evil}source", ""])
    shutil.copy(data / "train/COVID/1.png", data / f"train/COVID/{evil}.png")
    (data / f"val/COVID/{evil}broken.png").write_bytes(b"no image")
    for name, split in (
        (f"train/COVID/{evil}.png", "train"),
        (f"val/COVID/{evil}broken.png", "val"),
    ):
        rows.append([name, "COVID", split, f"{evil}source", f"{evil}patient"])
    with (data / "manifest.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["file", "label", "split", "source", "patient"], *rows])
    out = tmp_path / "report"
    CliRunner().invoke(main, ["dataset", command, str(data), "-o", str(out)])
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "&lt;img src=x onerror=alert(1)&gt;" in page
    assert "<img src=x" not in page
