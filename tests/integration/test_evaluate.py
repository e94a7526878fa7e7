"""`lungwatch evaluate`, on drawn radiographs: what it says, what it writes, what it refuses."""

import base64
import csv
import json
import re
from importlib import resources
from pathlib import Path

import cv2
import numpy as np
import pytest
from click.testing import CliRunner

from lungwatch import RESEARCH_USE_ONLY
from lungwatch.cli.main import main
from lungwatch.contract import Calibration, Decision
from lungwatch.errors import DatasetError, ModelError
from lungwatch.models import SHIPPED_DEFAULT
from lungwatch.preprocess import PreprocessSpec
from lungwatch.training.data.dataset import load_dataset
from lungwatch.training.data.splits import LearntImages, prefixes, sha256_of
from lungwatch.training.evaluation.calibration import Aim
from lungwatch.training.evaluation.evaluation import (
    EvaluationRequest,
    ThresholdSource,
    aim_threshold,
    evaluate_logits,
    run_evaluation,
    score,
)
from lungwatch.training.evaluation.metrics import FIGURES, Bootstrap, figures
from lungwatch.training.evaluation.report import choose_cases, over_image
from lungwatch.training.evaluation.scorers import Judgement, load_scorer

pytest.importorskip("matplotlib", reason="needs matplotlib (extra 'train')")

pytestmark = pytest.mark.slow

NASTY = "<img src=x onerror=alert(1)>&$a$.png"
QUICK = ["--bootstrap", "50"]


def radiograph(rng, brightness):
    """Two dark lungs on a bright body."""
    y, x = np.mgrid[0:72, 0:80]
    image = np.full((72, 80), brightness, dtype=float)
    for centre in (24, 56):
        image -= 90 * (((x - centre) / 13) ** 2 + ((y - 34) / 26) ** 2 < 1)
    return np.clip(image + rng.normal(0, 12, image.shape), 0, 255).astype(np.uint8)


def draw(path, rng, brightness):
    path.parent.mkdir(parents=True, exist_ok=True)
    done, data = cv2.imencode(".png", radiograph(rng, brightness))
    assert done
    path.write_bytes(data.tobytes())


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two sources; COVID brighter on average. One source's test split holds COVID only."""
    folder = tmp_path_factory.mktemp("data") / "drawn"
    rng = np.random.default_rng(5)
    lines = []
    counts = {"COVID": 12, "NORMAL": 8, "OTHER_PNEUMONIA": 8}
    for split in ("train", "val", "test"):
        for label, count in counts.items():
            for index in range(count):
                name = f"{split}/{label}-{index}.png"
                source = "lone" if label == "COVID" and index < 3 else "mixed"
                draw(folder / name, rng, rng.normal(190 if label == "COVID" else 165, 18))
                lines.append([name, label, split, source])
    draw(folder / "test" / NASTY, rng, 250)
    lines.append([f"test/{NASTY}", "NORMAL", "test", "<b>mixed</b>"])
    with (folder / "manifest.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["file", "label", "split", "source"], *lines])
    return folder


class Brightness:
    """A model that says COVID of what is bright; enough to evaluate an evaluation with."""

    def __init__(self, *, slope=20.0, name="brightness", fit="stretch"):
        self.slope = slope
        self.judgement = Judgement(
            name=name,
            preprocess=PreprocessSpec(size_px=32, intensity="as_is", fit=fit),
            calibration=Calibration(),
            decision=Decision(threshold=0.5, uncertain_low=0.4, uncertain_high=0.6),
        )

    def logits(self, pixels):
        z = self.slope * (pixels.mean(axis=(1, 2, 3)) - 0.6)
        return z.astype(np.float32)

    def maps(self, pixels):
        return np.zeros((len(pixels), 2, 4, 4), dtype=np.float32)


def invoke(*arguments):
    return CliRunner().invoke(main, ["evaluate", *map(str, arguments)])


def test_every_figure_has_an_interval_around_it_and_sources_have_what_they_can(data):
    result = invoke(SHIPPED_DEFAULT, data, *QUICK, "--json")
    assert result.exit_code == 0, result.output
    (found,) = json.loads(result.stdout)
    for name in FIGURES:
        low, high = found["intervals"][name]
        assert 0 <= low <= high <= 1
        # The bootstrap of the calibration error is biased upwards, so it need not hold it.
        assert name == "ece" or low <= found[name] <= high
    lone, mixed = found["sources"]["lone"], found["sources"]["mixed"]
    assert (lone["positives"], lone["negatives"]) == (3, 0)
    assert lone["not_computable"] == ["specificity", "f1", "roc_auc", "pr_auc"]
    assert lone["roc_auc"] is None
    assert lone["intervals"]["roc_auc"] is None
    assert lone["accuracy"] == lone["sensitivity"]
    assert mixed["not_computable"] == []
    assert (mixed["positives"], mixed["negatives"]) == (9, 16)
    assert set(found["probe_intervals"]) == set(found["probes"])
    assert "COVID vs OTHER_PNEUMONIA within mixed" in found["probes"]


def test_the_same_seed_gives_the_same_output_and_none_without_resamples(data):
    first, again = (invoke(SHIPPED_DEFAULT, data, *QUICK, "--json").stdout for _ in range(2))
    assert first == again
    (without,) = json.loads(invoke(SHIPPED_DEFAULT, data, "--bootstrap", 0, "--json").stdout)
    assert without["intervals"] == {}
    (drawn,) = json.loads(first)
    assert {name: drawn[name] for name in FIGURES} == {name: without[name] for name in FIGURES}


def test_the_folder_holds_figures_scores_plots_gallery_and_a_report_that_stands_alone(
    data, tmp_path
):
    out = tmp_path / "out"
    result = invoke(SHIPPED_DEFAULT, data, *QUICK, "-o", out, "--gallery", 30)
    assert result.exit_code == 0, result.output
    assert RESEARCH_USE_ONLY in result.stdout
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["note"] == RESEARCH_USE_ONLY
    (found,) = metrics["results"]
    with (out / "scores.csv").open(newline="", encoding="utf-8") as file:
        scores = list(csv.DictReader(file))
    assert len(scores) == 29
    assert {row["path"] for row in scores} >= {f"test/{NASTY}", "test/COVID-0.png"}
    again = figures(
        [row["label"] == "COVID" for row in scores],
        [float(row["probability"]) for row in scores],
        found["threshold"],
    ).to_dict()
    assert {name: found[name] for name in again} == again
    folder = out / "01-drawn"
    names = {"roc.png", "pr.png", "reliability.png", "confusion.png", "scores.png"}
    names |= {f"gallery-{group}.png" for group in ("tp", "fn", "fp", "tn") if found[group]}
    assert {path.name for path in folder.iterdir()} == names
    for name in names:
        assert cv2.imread(str(folder / name)).std() > 1

    report = (out / "report.html").read_text(encoding="utf-8")
    assert RESEARCH_USE_ONLY in report
    sources = re.findall(r'src="([^"]*)"', report)
    # Five plots, and three pictures of each of the 29 cases.
    assert len(sources) == 5 + 3 * 29
    assert all(source.startswith("data:image/") for source in sources)
    assert base64.b64decode(sources[0].partition(",")[2]).startswith(b"\x89PNG")
    assert not re.search(r"https?://|<script|<link", report)
    assert NASTY not in report
    assert "<b>mixed" not in report
    assert "&lt;img src=x onerror=alert(1)&gt;&amp;$a$.png" in report


def test_a_folder_with_something_in_it_is_left_alone(data, tmp_path):
    kept = tmp_path / "kept.txt"
    kept.write_text("mine")
    result = invoke(SHIPPED_DEFAULT, data, "-o", tmp_path)
    assert result.exit_code == 1
    assert "not empty" in result.stderr
    assert list(tmp_path.iterdir()) == [kept]


def test_an_interrupted_evaluation_keeps_what_was_scored(data, tmp_path, monkeypatch):
    from lungwatch.training.evaluation import evaluation

    whole, part = tmp_path / "whole", tmp_path / "part"
    arguments = [SHIPPED_DEFAULT, data, "--split", "val", *QUICK, "--gallery", 0]
    threshold = ["--threshold-data", data, "--threshold-split", "train"]
    assert invoke(*arguments, *threshold, "-o", whole).exit_code == 0
    real, read = evaluation.read_pixels, []

    def interrupted(samples, spec, **more):
        read.append(len(samples))
        if len(read) == 2:
            raise KeyboardInterrupt
        return real(samples, spec, **more)

    monkeypatch.setattr(evaluation, "read_pixels", interrupted)
    assert invoke(*arguments, *threshold, "-o", part).exit_code != 0
    assert len(read) == 2
    assert "holds a run already" in invoke(*arguments, *threshold, "-o", part).stderr
    assert invoke(*arguments, *threshold, "-o", part, "--resume").exit_code == 0
    # The threshold's cases were not read again.
    assert len(read) == 3
    for name in ("metrics.json", "scores.csv", "config.json", "report.html"):
        assert (part / name).read_bytes() == (whole / name).read_bytes()
    assert "packages" in json.loads((part / "environment.json").read_text())
    other = invoke(*arguments, *threshold, "--seed", 2, "-o", part, "--resume")
    assert "another configuration (seed)" in other.stderr


def test_the_map_is_held_against_drawn_lungs(data, tmp_path):
    rng = np.random.default_rng(1)
    for index in range(3):
        draw(tmp_path / "lungs" / "images" / f"{index}.png", rng, 200)
        mask = np.zeros((72, 80), np.uint8)
        mask[8:60, 11:69] = 255
        (tmp_path / "lungs" / "masks").mkdir(exist_ok=True)
        assert cv2.imwrite(str(tmp_path / "lungs" / "masks" / f"{index}.png"), mask)
    out = tmp_path / "out"
    lungs = ["--lung-masks", tmp_path / "lungs"]
    result = invoke(SHIPPED_DEFAULT, data, *QUICK, *lungs, "-o", out, "--gallery", 0)
    assert result.exit_code == 0, result.output
    assert "COVID map on drawn lungs (3 images" in result.stdout
    (found,) = json.loads((out / "metrics.json").read_text())["results"]
    assert found["lungs"]["images"] == 3
    if found["lungs"]["without_map"] < 3:
        assert found["lungs"]["lung_area"] == pytest.approx(52 * 58 / (72 * 80), abs=0.01)
    assert "Whether the maps lie on the lungs" in (out / "report.html").read_text()
    (tmp_path / "lungs" / "masks" / "1.png").unlink()
    refused = invoke(SHIPPED_DEFAULT, data, *QUICK, *lungs)
    assert refused.exit_code == 1
    assert "1.png" in refused.stderr


def test_a_model_compared_with_itself_does_not_differ(data, tmp_path):
    out = tmp_path / "out"
    arguments = [SHIPPED_DEFAULT, data, "--compare", SHIPPED_DEFAULT, *QUICK]
    (found,) = json.loads(invoke(*arguments, "--json", "-o", out, "--gallery", 0).stdout)
    assert found["comparison"]["delong"]["p_value"] == 1.0
    assert set(found["comparison"]["differences"].values()) == {0.0}
    assert f"Against {SHIPPED_DEFAULT}" in (out / "report.html").read_text()
    with (out / "scores.csv").open(newline="") as file:
        assert all(row["probability"] == row["other_probability"] for row in csv.DictReader(file))
    assert "DeLong: ROC-AUC +0.0000" in invoke(*arguments).stdout


def test_a_better_model_is_told_from_one_that_knows_nothing(data):
    class Noise(Brightness):
        def logits(self, pixels):
            return np.random.default_rng(3).normal(size=len(pixels)).astype(np.float32)

    (found,) = run_evaluation(
        Brightness(),
        EvaluationRequest(data=[data], split=None, bootstrap=Bootstrap(resamples=200)),
        other=Noise(),
    )
    compared = found.result["comparison"]
    assert compared["delong"]["p_value"] < 0.01
    assert compared["intervals"]["roc_auc"][0] > 0
    assert compared["differences"]["roc_auc"] == pytest.approx(
        found.result["roc_auc"] - compared["figures"]["roc_auc"], abs=2e-6
    )


def test_the_threshold_is_chosen_on_validation_cases_alone(data):
    request = EvaluationRequest(
        data=[data],
        threshold=ThresholdSource(aim=Aim.parse("sensitivity=1"), data=data),
        bootstrap=Bootstrap(resamples=0),
    )
    scorer = Brightness()
    (found,) = run_evaluation(scorer, request)
    choice = found.result["threshold_choice"]
    assert (choice["split"], choice["images"], choice["sensitivity"]) == ("val", 28, 1.0)
    val = [s for s in load_dataset(data) if s.split == "val"]
    p = score(scorer, val).probabilities
    positive = np.array([s.positive for s in val])
    below = p[p < p[positive].min()].max()
    assert below < found.result["threshold"] < p[positive].min()
    assert found.result["uncertain"] == 0.0
    assert scorer.judgement.decision.threshold == 0.5


def test_the_command_line_chooses_a_threshold_and_says_so(data):
    arguments = ["--threshold-aim", "specificity=0.9", "--threshold-data", data]
    result = invoke(SHIPPED_DEFAULT, data, *QUICK, *arguments)
    assert result.exit_code == 0, result.output
    assert "threshold chosen for specificity=0.9 on drawn, split val" in result.stdout


def test_images_that_are_tested_may_not_choose_the_threshold(data):
    aim = ["--threshold-data", data, "--threshold-split", "all"]
    result = invoke(SHIPPED_DEFAULT, data, *aim)
    assert result.exit_code == 1
    assert "29 of the images that choose the threshold" in result.stderr
    source = ThresholdSource(aim=Aim(kind="youden"), data=data, split="test")
    with pytest.raises(DatasetError, match="among those"):
        aim_threshold(Brightness(), source, tested=load_dataset(data))


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--threshold-aim", "youden"], 2, "needs --threshold-data"),
        (["--threshold-aim", "f1", "--threshold-data", "."], 1, "sensitivity=0.95"),
        (["--split", "holdout"], 2, "holdout"),
        (["--bootstrap", "-1"], 2, "bootstrap"),
        (["--compare", "nowhere"], 1, "nowhere: no model"),
    ],
)
def test_options_that_make_no_sense_are_refused(data, arguments, code, message):
    result = invoke(SHIPPED_DEFAULT, data, *arguments)
    assert result.exit_code == code, result.output
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_a_set_of_one_class_is_refused_naming_what_cannot_be_computed(tmp_path):
    rng = np.random.default_rng(0)
    draw(tmp_path / "covid" / "COVID" / "a.png", rng, 180)
    draw(tmp_path / "normal" / "NORMAL" / "a.png", rng, 180)
    covid = invoke(SHIPPED_DEFAULT, tmp_path / "covid")
    assert covid.exit_code == 1
    assert "(COVID): specificity, f1, roc_auc, pr_auc cannot be computed" in covid.stderr
    normal = invoke(SHIPPED_DEFAULT, tmp_path / "normal")
    assert normal.exit_code == 1
    assert "(NORMAL): sensitivity, f1, roc_auc, pr_auc cannot be computed" in normal.stderr


def test_no_images_no_such_split_and_an_unreadable_file_are_refused_by_name(tmp_path, data):
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "no images found" in invoke(SHIPPED_DEFAULT, empty).stderr
    rng = np.random.default_rng(0)
    draw(tmp_path / "flat" / "COVID" / "a.png", rng, 180)
    draw(tmp_path / "flat" / "NORMAL" / "a.png", rng, 180)
    refused = invoke(SHIPPED_DEFAULT, tmp_path / "flat", "--split", "val")
    assert refused.exit_code == 1
    assert "split 'val' is empty (splits found: none)" in refused.stderr
    (tmp_path / "flat" / "NORMAL" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    broken = invoke(SHIPPED_DEFAULT, tmp_path / "flat", "-o", tmp_path / "out")
    assert broken.exit_code == 1
    assert "broken.png" in broken.stderr
    assert not (tmp_path / "out" / "metrics.json").exists()


def test_a_model_that_answers_with_no_number_is_refused(data):
    class Broken(Brightness):
        def logits(self, pixels):
            return np.full(len(pixels), np.nan, dtype=np.float32)

    with pytest.raises(ModelError, match="no finite number"):
        score(Broken(), load_dataset(data)[:2])


def test_the_gallery_shows_the_surest_errors_and_never_more_than_asked(data):
    samples = load_dataset(data)
    scored = score(Brightness(), samples)
    cases = choose_cases(scored, 2, seed=1)
    assert cases == choose_cases(scored, 2, seed=1)
    p, y, said = scored.probabilities, scored.targets > 0.5, scored.called
    members = {"tp": said & y, "fn": ~said & y, "fp": said & ~y, "tn": ~said & ~y}
    for group, inside in members.items():
        chosen = [index for name, index in cases if name == group]
        assert len(chosen) == min(2, inside.sum())
        assert all(inside[index] for index in chosen)
    worst = [index for name, index in cases if name == "fp"]
    assert worst
    assert p[worst[0]] == p[members["fp"]].max()


def test_maps_of_a_padded_input_are_cut_to_the_image():
    maps = np.zeros((2, 4, 4), dtype=np.float32)
    maps[:, :, 1:3] = 1.0
    spec = PreprocessSpec(size_px=32, fit="pad")
    cut = over_image(maps, (200, 100), spec)
    assert cut.shape == (2, 32, 16)
    assert cut.min() > 0.4
    assert over_image(maps, (200, 100), PreprocessSpec(size_px=32)) is maps


def test_progress_counts_every_image_of_every_model(data):
    seen = []

    def on_total(total):
        seen.append(total)
        return lambda count: seen.append(-count)

    run_evaluation(
        Brightness(),
        EvaluationRequest(data=[data, data], bootstrap=Bootstrap(resamples=0)),
        other=Brightness(),
        on_total=on_total,
    )
    assert seen[0] == 4 * 29
    assert sum(seen) == 0


def test_the_shipped_graphs_probability_is_the_softmax_of_its_two_logits(data):
    from lungwatch.contract import INPUT, LOGITS, PROBABILITY
    from lungwatch.training.data.pixels import read_pixels
    from lungwatch.training.networks.heads import decide, softmax

    scorer = load_scorer(Path(SHIPPED_DEFAULT))
    pixels = read_pixels(load_dataset(data), scorer.judgement.preprocess)
    pairs, probability = scorer.session.run([LOGITS, PROBABILITY], {INPUT: pixels})
    assert softmax(pairs)[:, 1] == pytest.approx(probability, abs=1e-6)
    assert (pairs[:, 0] == -pairs[:, 1]).all()
    assert (decide(pairs) == (scorer.logits(pixels) >= 0)).all()


def test_a_keras_file_is_evaluated_like_a_bundle(data, tmp_path):
    pytest.importorskip("tensorflow", reason="needs TensorFlow (extra 'train')")
    from lungwatch.training.networks.backbones import BaselineConfig, build_baseline

    config = BaselineConfig(size_px=32, filters=(4, 4), dense_units=4, dropout=0.0)
    file = tmp_path / "tiny.keras"
    build_baseline(config, mean=0.5, std=0.25).save(file)
    out = tmp_path / "out"
    arguments = ["--compare", SHIPPED_DEFAULT, "--threshold-data", data, *QUICK]
    result = invoke(file, data, *arguments, "-o", out, "--gallery", 1, "--json")
    assert result.exit_code == 0, result.output
    (found,) = json.loads(result.stdout)
    assert found["model"] == "tiny"
    assert found["comparison"]["model"] == SHIPPED_DEFAULT
    assert found["threshold_choice"]["aim"] == "youden"
    assert "Grad-CAM map for COVID" in (out / "report.html").read_text()


@pytest.mark.shared_data
@pytest.mark.parametrize("name", ["open-cxr", "covid-xray"])
def test_evaluating_the_shipped_bundle_reproduces_its_card_to_the_third_decimal(shared_data, name):
    card = (
        Path(str(resources.files("lungwatch.models"))) / SHIPPED_DEFAULT / "card.md"
    ).read_text()
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in card.splitlines()]
    heads = next(cells for cells in lines if cells[:1] == ["set"] and "ECE" in cells)
    stated = dict(
        zip(
            heads,
            next(c for c in lines if c[:1] == [f"{name}/test"] and len(c) == len(heads)),
            strict=True,
        )
    )
    result = invoke(SHIPPED_DEFAULT, shared_data / name, "--bootstrap", 0, "--json")
    assert result.exit_code == 0, result.output
    (found,) = json.loads(result.stdout)
    for head in heads[3:]:
        figure = head.lower().replace("-", "_")
        assert float(stated[head]) == pytest.approx(found[figure], abs=5.01e-4), head
    for probe, values in found["probes"].items():
        said = next(cells[2] for cells in lines if cells[:2] == [f"{name}/test", probe])
        assert float(said.split()[0]) == pytest.approx(values["roc_auc"], abs=5.01e-4), probe


def test_images_that_were_learnt_from_are_counted_named_and_left_out_once(data):
    samples = [s for s in load_dataset(data) if s.split == "test"]
    known, unknown = samples[:3] + samples[-6:], samples[3:-6]
    learnt = LearntImages(train=prefixes(sha256_of([s.path for s in known])))
    request = EvaluationRequest(data=[data], bootstrap=Bootstrap(resamples=20))
    (found,) = run_evaluation(Brightness(), request, learnt=learnt)
    told = found.result["learnt"]
    assert told["images"] == len(known)
    assert len(told["names"]) == 5
    assert set(told["names"]) <= {s.path.relative_to(data).as_posix() for s in known}
    alone = evaluate_logits(Brightness().judgement, unknown, score(Brightness(), unknown).logits)
    assert {name: told["without"][name] for name in FIGURES} == {n: alone[n] for n in FIGURES}
    assert set(told["without"]["intervals"]) == set(FIGURES)
    (none,) = run_evaluation(Brightness(), request, learnt=LearntImages())
    assert none.result["learnt"] == {"images": 0, "names": [], "without": None}
    (unrecorded,) = run_evaluation(Brightness(), request)
    assert unrecorded.result["learnt"] is None


def test_intervals_are_over_patients_where_they_are_known(data, tmp_path):
    """Every image twice, under one patient: the intervals are those of the images once."""
    lines = ["file,label,split,patient"]
    for sample in load_dataset(data):
        if sample.split == "test":
            lines += 2 * [f"{sample.path},{sample.finding},test,{sample.path.stem}"]
    manifest = tmp_path / "twice.csv"
    manifest.write_text("\n".join(lines) + "\n")
    request = EvaluationRequest(data=[data, manifest], bootstrap=Bootstrap(resamples=50))
    once, twice = (found.result for found in run_evaluation(Brightness(), request))
    assert (once["patients"], once["bootstrap"]["over"]) == (None, "images")
    assert twice["patients"] == {"positives": 12, "negatives": 17}
    assert twice["bootstrap"]["over"] == "patients"
    for name in FIGURES:
        assert twice["intervals"][name] == pytest.approx(once["intervals"][name], abs=2e-6), name
    assert once["sources"]["lone"]["too_few"] == list(FIGURES)
    shown = invoke(SHIPPED_DEFAULT, data, *QUICK).stdout
    assert "(too few)" in shown
    assert "fewer than 10 patients" in shown


def test_a_folder_without_a_finding_is_refused_and_mapped(tmp_path):
    rng = np.random.default_rng(0)
    for index in range(2):
        for label, brightness in (("COVID", 190), ("NORMAL", 160), ("PNEUMONIA", 170)):
            draw(tmp_path / "set" / label / f"{index}.png", rng, brightness)
    refused = invoke(SHIPPED_DEFAULT, tmp_path / "set")
    assert refused.exit_code == 1
    assert "'PNEUMONIA' (2 images)" in refused.stderr
    for meaning, negatives, told in (("OTHER_PNEUMONIA", 4, "mapped"), ("ignore", 2, "ignored")):
        option = ["--label-map", f"PNEUMONIA={meaning}", "--bootstrap", 0]
        (found,) = json.loads(invoke(SHIPPED_DEFAULT, tmp_path / "set", *option, "--json").stdout)
        assert found["negatives"] == negatives
        assert found["labels"][told] == {"PNEUMONIA": 2}
        assert f"'PNEUMONIA' {told}: 2" in invoke(SHIPPED_DEFAULT, tmp_path / "set", *option).stdout
