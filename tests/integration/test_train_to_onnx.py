"""Training and export end to end: a bundle that answers as its trained network does."""

import csv
import json
import shutil
import sys
from dataclasses import replace

import cv2
import numpy as np
import onnxruntime
import pytest
from click.testing import CliRunner

from lungwatch.cli.main import main
from lungwatch.contract import (
    CAM,
    CAM_PEAK,
    INPUT,
    LOGITS,
    METADATA_KEY,
    OUTPUTS,
    PROBABILITY,
    ModelContract,
)
from lungwatch.errors import ConfigError, DatasetError, MissingExtraError, ModelError
from lungwatch.imaging.reader import read_radiograph
from lungwatch.preprocess import PreprocessSpec, golden_digest, golden_input, preprocess
from lungwatch.training.data.dataset import load_dataset
from lungwatch.training.evaluation.evaluation import EvaluationRequest, run_evaluation
from lungwatch.training.evaluation.scorers import KerasScorer, load_scorer
from lungwatch.training.fitting.run import Progress
from lungwatch.training.fitting.trainer import FitConfig
from lungwatch.training.networks.backbones import BaselineConfig, build_baseline
from lungwatch.training.recipes.classifiers import train_baseline

pytest.importorskip("tensorflow", reason="needs TensorFlow (extra 'train')")
pytest.importorskip("tf2onnx", reason="needs tf2onnx (extra 'train')")

# The largest share of these tests is TensorFlow tracing graphs, not training.

NETWORK = BaselineConfig(size_px=32, filters=(8, 16, 16), dense_units=16, dropout=0.2)
# The pictures look alike on purpose: `leaks="allow"`.
FITTING = FitConfig(epochs=4, batch_size=16, learning_rate=3e-3, patience=4, seed=11)


def radiograph(rng, covid):
    """Two dark lungs on a bright body; with `covid`, a bright blob low in one of them."""
    y, x = np.mgrid[0:72, 0:80]
    image = np.full((72, 80), 170.0)
    for centre in (24, 56):
        image -= 110 * (((x - centre) / 13) ** 2 + ((y - 34) / 26) ** 2 < 1)
    if covid:
        cx, cy = rng.choice([22, 58]) + rng.integers(-3, 4), 44 + rng.integers(-6, 7)
        image += 90 * np.exp(-(((x - cx) / 6.0) ** 2) - ((y - cy) / 6.0) ** 2)
    return np.clip(image + rng.normal(0, 12, image.shape), 0, 255).astype(np.uint8)


def fill(folder, split, finding, count, seed):
    rng = np.random.default_rng(seed)
    place = folder / split / finding
    place.mkdir(parents=True)
    for index in range(count):
        assert cv2.imwrite(str(place / f"{index:03d}.png"), radiograph(rng, finding == "COVID"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("blobs")
    for seed, (split, count) in enumerate([("train", 48), ("val", 20), ("test", 20)]):
        fill(folder, split, "COVID", count, 10 * seed)
        fill(folder, split, "NORMAL", count // 2, 10 * seed + 1)
        fill(folder, split, "OTHER_PNEUMONIA", count // 2, 10 * seed + 2)
    return folder


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "toy"
    train_baseline(data, folder, network=NETWORK, fitting=FITTING, leaks="allow")
    return folder


@pytest.fixture(scope="module")
def bundle(data, run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundles")
    arguments = ["--name", "toy", "--version", "0.1.0", "-o", str(folder), "--data", str(data)]
    result = CliRunner().invoke(main, ["export", str(run), *arguments, "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["id"] == "toy-0.1.0"
    return folder / "toy-0.1.0"


def session(bundle):
    return onnxruntime.InferenceSession(str(bundle / "model.onnx"))


def contract_of(bundle):
    return ModelContract.from_json(
        session(bundle).get_modelmeta().custom_metadata_map[METADATA_KEY]
    )


def test_a_run_folder_holds_what_is_needed_to_understand_and_repeat_it(run):
    names = {path.name for path in run.iterdir()}
    assert names == {
        "config.json",
        "environment.json",
        "state.json",
        "history.csv",
        "history.png",
        "metrics.json",
        "model.keras",
        "checkpoint-0004.keras",
        "checkpoint-0004.npz",
        "data.csv",
        "learnt.json",
    }
    config = json.loads((run / "config.json").read_text())
    assert config["fit"]["seed"] == 11
    assert config["data"]["train"] == {
        "unknown/COVID": 48,
        "unknown/NORMAL": 24,
        "unknown/OTHER_PNEUMONIA": 24,
    }
    with (run / "history.csv").open() as file:
        assert [int(row["epoch"]) for row in csv.DictReader(file)] == [1, 2, 3, 4]
    assert "keras" in json.loads((run / "environment.json").read_text())["packages"]


def test_the_exported_graph_tells_the_peaks_that_its_maps_were_scaled_by(bundle, data):
    """The contract's reference is the 95th percentile over validation images called COVID."""
    contract = contract_of(bundle)
    samples = [sample for sample in load_dataset(data) if sample.split == "val"]
    pixels = np.stack(
        [preprocess(read_radiograph(s.path).pixels, contract.preprocess) for s in samples]
    )
    logits, cam, peak = session(bundle).run([LOGITS, CAM, CAM_PEAK], {INPUT: pixels})
    assert peak.shape == (len(samples), 2)
    # One of the two maps is empty where all of the evidence speaks for one class.
    assert ((cam.max(axis=(2, 3)) > 0) == (peak > 0)).all()
    labels = [
        contract.decision.label(contract.calibration.probability(float(pair[1] - pair[0])))
        for pair in logits
    ]
    called = np.array(labels) == "COVID"
    assert called.any()
    assert contract.map_reference == pytest.approx(np.percentile(peak[called, 1], 95), rel=1e-5)
    assert f"whose end is {contract.map_reference:.4g}" in (bundle / "card.md").read_text()


def test_the_same_seed_gives_the_same_metrics(data, run, tmp_path):
    again = train_baseline(
        data, tmp_path / "again", network=NETWORK, fitting=FITTING, leaks="allow"
    )
    assert again == json.loads((run / "metrics.json").read_text())
    assert (tmp_path / "again" / "history.csv").read_text() == (run / "history.csv").read_text()


def test_an_interrupted_run_resumes_to_the_same_metrics(data, run, tmp_path):
    def interrupt(epoch, batch, batches):
        if (epoch, batch) == (3, 2):
            raise KeyboardInterrupt

    broken = tmp_path / "broken"
    with pytest.raises(KeyboardInterrupt):
        train_baseline(
            data,
            broken,
            network=NETWORK,
            fitting=FITTING,
            leaks="allow",
            progress=Progress(on_batch=interrupt),
        )
    assert not (broken / "metrics.json").exists()
    resumed = train_baseline(
        data, broken, network=NETWORK, fitting=FITTING, leaks="allow", resume=True
    )
    assert resumed == json.loads((run / "metrics.json").read_text())
    assert {path.name for path in broken.iterdir()} == {path.name for path in run.iterdir()}


def test_a_run_is_neither_overwritten_nor_resumed_with_another_configuration(data, run):
    with pytest.raises(ConfigError, match="holds a run already"):
        train_baseline(data, run, network=NETWORK, fitting=FITTING, leaks="allow")
    with pytest.raises(ConfigError, match=r"another configuration \(fit\)"):
        train_baseline(
            data,
            run,
            network=NETWORK,
            fitting=replace(FITTING, seed=12),
            leaks="allow",
            resume=True,
        )


def test_a_run_is_not_resumed_with_other_data(data, run, tmp_path):
    changed, copy = tmp_path / "data", tmp_path / "run"
    shutil.copytree(data, changed)
    shutil.copytree(run, copy)
    (changed / "train" / "COVID" / "000.png").unlink()
    with pytest.raises(ConfigError, match=r"1 removed \(train/COVID/000\.png\)"):
        train_baseline(changed, copy, network=NETWORK, fitting=FITTING, leaks="allow", resume=True)


def test_evaluation_says_which_images_the_bundle_learnt_from(bundle, data):
    arguments = ["evaluate", str(bundle), str(data), "--bootstrap", "0", "--split"]
    found = CliRunner().invoke(main, [*arguments, "train"]).stdout
    assert "training images: 96 of the 96 images (train/COVID/000.png" in found
    assert "without them: no figures" in found
    assert "none of the 40 images" in CliRunner().invoke(main, [*arguments, "test"]).stdout


def test_a_diverged_run_and_one_that_learnt_nothing_are_not_exported(run, tmp_path):
    def exported(folder):
        arguments = ["--name", "bad", "--version", "1.0.0", "-o", str(tmp_path / "out")]
        result = CliRunner().invoke(main, ["export", str(folder), *arguments])
        assert result.exit_code == 1
        assert len(result.stderr.splitlines()) == 1
        return result.stderr

    chance = tmp_path / "chance"
    shutil.copytree(run, chance)
    metrics = json.loads((chance / "metrics.json").read_text())
    metrics["validation"]["roc_auc"] = 0.52
    (chance / "metrics.json").write_text(json.dumps(metrics))
    assert "ROC-AUC 0.520 on validation images, not above 0.55" in exported(chance)

    broken = tmp_path / "broken"
    shutil.copytree(run, broken)
    scorer = KerasScorer(run)
    layer = scorer.model.get_layer("head_hidden")
    kernel, bias = layer.get_weights()
    layer.set_weights([np.zeros_like(kernel), bias])
    scorer.model.save(broken / "model.keras")
    assert "images the same answer" in exported(broken)
    kernel[0, 0] = np.nan
    layer.set_weights([kernel, bias])
    scorer.model.save(broken / "model.keras")
    assert "are not finite: the training diverged" in exported(broken)


def test_the_graph_has_the_contracts_names_and_a_free_batch_size(bundle):
    onnx = session(bundle)
    contract = contract_of(bundle)
    assert [item.name for item in onnx.get_inputs()] == [INPUT]
    assert {item.name for item in onnx.get_outputs()} == {*OUTPUTS, CAM_PEAK}
    for count in (1, 3):
        batch = np.zeros((count, 32, 32, 1), np.float32)
        found = dict(zip(OUTPUTS, onnx.run(list(OUTPUTS), {INPUT: batch}), strict=True))
        side = contract.cam_side_px
        assert found["probability"].shape == (count,)
        assert found["logits"].shape == (count, 2)
        assert found["cam"].shape == (count, 2, side, side)
        assert found["embedding"].shape == (count, contract.embedding_size)


def test_onnx_keras_and_automatic_differentiation_agree_on_the_data_sets_images(bundle):
    parity = contract_of(bundle).provenance["parity"]
    assert parity["images"] == 50
    assert parity["probability"] <= 1e-5
    assert parity["cam"] <= 1e-3
    assert parity["gradient"] <= 1e-4


def test_two_logits_give_the_sigmoids_probability(bundle):
    pixels = np.random.default_rng(0).random((8, 32, 32, 1), dtype=np.float32)
    probability, logits = session(bundle).run([PROBABILITY, LOGITS], {INPUT: pixels})
    softmax = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(softmax[:, 1], probability, atol=1e-6)


def test_maps_fill_0_to_1_or_are_zero_and_exclude_each_other(bundle):
    pixels = np.random.default_rng(0).random((8, 32, 32, 1), dtype=np.float32)
    cam = session(bundle).run(["cam"], {INPUT: pixels})[0]
    peaks = cam.max(axis=(2, 3))
    assert cam.min() >= 0.0
    assert np.all((np.abs(peaks - 1.0) < 1e-6) | (peaks == 0.0))
    assert np.all(cam[:, 0] * cam[:, 1] == 0.0)


def test_the_contract_round_trips_and_its_golden_answer_replays(bundle, run):
    contract = contract_of(bundle)
    assert ModelContract.from_json(contract.to_json()) == contract
    assert contract.golden.input_sha256 == golden_digest()
    golden = golden_input(contract.preprocess)[np.newaxis]
    probability, cam = session(bundle).run([PROBABILITY, "cam"], {INPUT: golden})
    assert probability[0] == pytest.approx(contract.golden.probability, abs=1e-6)
    assert cam[0].mean() == pytest.approx(contract.golden.cam_mean, abs=1e-6)
    metrics = json.loads((run / "metrics.json").read_text())
    assert contract.decision.threshold == metrics["decision"]["threshold"]
    assert str(run.parent) not in contract.to_json()


def test_evaluating_the_bundle_reproduces_its_contracts_figures_and_the_keras_networks(
    bundle, run, data
):
    recorded = contract_of(bundle).metrics[f"{data.name}/test"]
    result = CliRunner().invoke(main, ["evaluate", str(bundle), str(data), "--json"])
    assert result.exit_code == 0, result.output
    (found,) = json.loads(result.stdout)
    (one,) = run_evaluation(KerasScorer(run), EvaluationRequest(data=[data]))
    of_keras = one.result
    for name, value in recorded.items():
        assert found[name] == value
        if isinstance(value, int | float):
            assert of_keras[name] == pytest.approx(value, abs=1e-4)


def test_a_bare_keras_file_needs_data_for_its_threshold(run, data, tmp_path):
    bare = tmp_path / "bare.keras"
    bare.write_bytes((run / "model.keras").read_bytes())
    arguments = ["export", str(bare), "--name", "bare", "--version", "1.0.0", "-o", str(tmp_path)]
    refused = CliRunner().invoke(main, arguments)
    assert refused.exit_code == 1
    assert "validation split" in refused.stderr
    arguments += ["--data", str(data), "--threshold-rule", "balanced"]
    accepted = CliRunner().invoke(main, arguments)
    assert accepted.exit_code == 0, accepted.output
    assert f"{data.name}/test: ROC-AUC" in accepted.stdout
    card = (tmp_path / "bare-1.0.0" / "card.md").read_text()
    assert "largest smaller one of sensitivity and specificity on validation" in card


def test_parity_holds_on_a_real_chest_radiograph():
    pytest.importorskip("data_store", reason="needs pydicom-data (extra 'demo')")
    from pydicom.data import get_testdata_file

    from lungwatch.export.graph import compare, to_onnx

    path = get_testdata_file("RG1_UNCR.dcm", download=False)
    from pathlib import Path

    spec = PreprocessSpec(size_px=64)
    pixels = preprocess(read_radiograph(Path(path)).pixels, spec)[np.newaxis]
    model = build_baseline(replace(NETWORK, size_px=64), mean=0.5, std=0.25)
    parity = compare(model, to_onnx(model).SerializeToString(), pixels, "a real radiograph")
    parity.check()
    assert parity.images == 1


def test_a_network_without_the_head_is_refused():
    import keras

    from lungwatch.export.graph import to_onnx

    plain = keras.Sequential([keras.Input((32, 32, 1)), keras.layers.Flatten()])
    with pytest.raises(ModelError, match="head"):
        to_onnx(plain)


def test_what_cannot_be_trained_on_is_refused_by_name(data, tmp_path):
    def train(location):
        train_baseline(location, tmp_path / "run", network=NETWORK, fitting=FITTING, leaks="allow")

    with pytest.raises(DatasetError, match="nowhere"):
        train(tmp_path / "nowhere")
    with pytest.raises(DatasetError, match="'train' is empty"):
        train(data / "train")
    one_class = tmp_path / "one"
    fill(one_class, "train", "COVID", 2, 0)
    fill(one_class, "val", "COVID", 2, 1)
    with pytest.raises(DatasetError, match="one class only"):
        train(one_class)
    assert not (tmp_path / "run").exists()


def test_a_missing_extra_is_named(monkeypatch, data, tmp_path):
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    with pytest.raises(MissingExtraError, match=r"lungwatch\[train\]"):
        train_baseline(data, tmp_path / "run", network=NETWORK, fitting=FITTING, leaks="allow")


def test_the_command_line_trains_and_says_what_came_out(data, tmp_path):
    result = CliRunner().invoke(
        main,
        [
            "train",
            "baseline",
            str(data),
            "--out",
            str(tmp_path / "run"),
            "--epochs",
            "1",
            "--size",
            "32",
            "--batch-size",
            "32",
            "--leaks",
            "allow",
        ],
    )
    assert result.exit_code == 0, result.output
    assert "best epoch 1 of 1" in result.stdout
    assert "epoch 1: loss" in result.stderr
    assert load_scorer(tmp_path / "run").judgement.preprocess.size_px == 32
