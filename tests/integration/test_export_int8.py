"""An int8 bundle answers as the float network does, says so, and is refused where it does not."""

import json
from pathlib import Path

import cv2
import numpy as np
import onnxruntime
import pytest
from click.testing import CliRunner

from lungwatch.bundle import read_bundle
from lungwatch.cli.main import main
from lungwatch.comparison import DriftReference
from lungwatch.contract import INPUT, LOGITS
from lungwatch.daemon.pipeline.model import Classifier
from lungwatch.export import quantise
from lungwatch.preprocess import golden_input
from lungwatch.training.data.dataset import load_dataset, select
from lungwatch.training.data.pixels import read_pixels, targets
from lungwatch.training.evaluation.calibration import fit_calibration
from lungwatch.training.evaluation.scorers import OnnxScorer
from lungwatch.training.fitting.trainer import FitConfig
from lungwatch.training.networks.backbones import BaselineConfig
from lungwatch.training.recipes.classifiers import train_baseline

pytest.importorskip("tensorflow", reason="needs TensorFlow (extra 'train')")
pytest.importorskip("tf2onnx", reason="needs tf2onnx (extra 'train')")
onnx = pytest.importorskip("onnx", reason="needs onnx (extra 'train')")
pytest.importorskip("sympy", reason="needs sympy (extra 'train')")

# The largest share of these tests is TensorFlow tracing graphs, not quantising.

FIGURES = {"Leave one source out": {"elsewhere": {"ROC-AUC": 0.8125, "images": 44}}}


def picture(rng, covid):
    """A grey field with noise; with `covid`, a bright blob. Told apart without a miss."""
    y, x = np.mgrid[0:80, 0:80]
    image = np.full((80, 80), 90.0)
    if covid:
        cx, cy = rng.integers(24, 57, 2)
        image += 120 * np.exp(-(((x - cx) / 14.0) ** 2) - ((y - cy) / 14.0) ** 2)
    image[:4] = 0
    image[-4:] = 255
    return np.clip(image + rng.normal(0, 6, image.shape), 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("fields"), np.random.default_rng(3)
    for split, count in (("train", 40), ("val", 16), ("test", 16)):
        for finding in ("COVID", "NORMAL"):
            place = folder / split / finding
            place.mkdir(parents=True)
            for index in range(count):
                file = place / f"{index:03d}.png"
                assert cv2.imwrite(str(file), picture(rng, finding == "COVID"))
    return folder


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "toy"
    network = BaselineConfig(size_px=32, filters=(8, 16, 16), dense_units=16, dropout=0.1)
    fitting = FitConfig(epochs=6, batch_size=16, learning_rate=3e-3, patience=6, seed=5)
    # The fields are alike by design, which the search for copies would refuse.
    train_baseline(data, folder, network=network, fitting=fitting, leaks="allow")
    return folder


def export(run, out, *more):
    arguments = ["--name", "toy", "--version", "0.1.0", "-o", str(out), "--int8", *more]
    return CliRunner().invoke(main, ["export", str(run), *arguments])


@pytest.fixture(scope="module")
def exported(data, run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundles")
    figures = folder / "figures.json"
    figures.write_text(json.dumps(FIGURES))
    result = export(run, folder, "--data", str(data), "--figures", str(figures), "--json")
    assert result.exit_code == 0, result.output
    # Nothing but the answer may stand on stdout.
    return folder / "toy-0.1.0", json.loads(result.stdout)


@pytest.fixture(scope="module")
def scorer(exported):
    return OnnxScorer((exported[0] / "model.onnx").read_bytes())


def test_the_bundle_has_a_reference_for_drift_of_the_validation_images(exported, scorer, data):
    files = read_bundle(exported[0])
    files.check_digests()
    drift = DriftReference.from_json(files.drift, scorer.contract.embedding_size)
    assert drift.source == f"{data.name}/val"
    assert drift.values["logit"].count == 32
    assert "component_1" in drift.values
    assert drift.tags == {}


def test_the_contract_and_the_card_tell_what_quantising_cost(exported, scorer, data):
    bundle, told = exported
    about = scorer.contract.provenance["quantisation"]
    assert told["quantisation"] == about
    assert about["images"] == {"unknown/COVID": 40, "unknown/NORMAL": 40}
    assert set(about["fidelity"]) == {f"{data.name}/val", f"{data.name}/test"}
    for split, cost in about["fidelity"].items():
        assert cost["loss"] < 0.005
        assert cost["map_cosine"] > 0.9
        measured = scorer.contract.metrics[split]["roc_auc"]
        assert cost["roc_auc_int8"] == pytest.approx(measured, abs=1e-6)
    card = (bundle / "card.md").read_text()
    assert "## Quantisation" in card
    assert "before quantisation" in card
    assert f"| {data.name}/val | 32 |" in card


def test_parity_with_keras_is_that_of_the_float_graph(scorer):
    parity = scorer.contract.provenance["parity"]
    assert parity["probability"] <= 1e-5
    assert parity["gradient"] <= 1e-4


def test_every_convolution_counts_in_int8_and_the_head_in_float(exported, scorer):
    nodes = onnx.load(exported[0] / "model.onnx").graph.node
    made_by = {name: node.op_type for node in nodes for name in node.output}
    convolutions = [node for node in nodes if node.op_type == "Conv"]
    assert len(convolutions) == scorer.contract.provenance["quantisation"]["convolutions"]
    for node in convolutions:
        assert {made_by[name] for name in node.input[:2]} == {"DequantizeLinear"}
    for node in nodes:
        if node.op_type in ("MatMul", "Gemm"):
            assert not any(made_by.get(name) == "DequantizeLinear" for name in node.input)


def test_calibration_is_fitted_to_the_int8_graphs_own_logits(scorer, data):
    samples = select(load_dataset(data), "val")
    pixels = read_pixels(samples, scorer.judgement.preprocess)
    fitted = fit_calibration(targets(samples), scorer.logits(pixels))
    assert scorer.contract.calibration.slope == pytest.approx(fitted.slope, rel=1e-4)
    assert scorer.contract.calibration.intercept == pytest.approx(fitted.intercept, abs=1e-4)


@pytest.mark.parametrize("threads", [1, 2])
def test_the_daemon_takes_it_with_any_number_of_threads(exported, threads):
    classifier = Classifier.load(exported[0], threads=threads)
    assert classifier.contract.golden.tolerance == 0.02


def test_the_answer_does_not_depend_on_the_batch(exported, scorer):
    session = onnxruntime.InferenceSession(str(exported[0] / "model.onnx"))
    golden = golden_input(scorer.judgement.preprocess)[np.newaxis]
    alone = session.run([LOGITS], {INPUT: golden})[0]
    for count in (2, 7):
        together = session.run([LOGITS], {INPUT: np.repeat(golden, count, axis=0)})[0]
        np.testing.assert_allclose(together, np.repeat(alone, count, axis=0), atol=1e-3)


def test_evaluate_and_verify_take_it_like_any_other(exported, scorer, data):
    bundle, _ = exported
    result = CliRunner().invoke(main, ["evaluate", str(bundle), str(data), "--json"])
    assert result.exit_code == 0, result.output
    (found,) = json.loads(result.stdout)
    assert found["roc_auc"] == scorer.contract.metrics[f"{data.name}/test"]["roc_auc"]
    verified = CliRunner().invoke(main, ["model", "verify", str(bundle)])
    assert verified.exit_code == 0, verified.output


def test_tables_from_elsewhere_are_in_the_card_and_the_contract(exported, scorer):
    assert scorer.contract.metrics["figures"] == FIGURES
    card = (exported[0] / "card.md").read_text()
    assert "### Leave one source out" in card
    assert "| elsewhere | 0.812 | 44 |" in card


def test_without_data_it_is_refused(run, tmp_path):
    refused = export(run, tmp_path)
    assert refused.exit_code == 1
    assert "--data" in refused.stderr


def test_a_loss_too_large_or_a_file_too_large_writes_nothing(run, data, tmp_path, monkeypatch):
    out = tmp_path / "out"
    large = export(run, out, "--data", str(data), "--max-mb", "0.001")
    assert large.exit_code == 1
    assert "more than 0.001" in large.stderr
    monkeypatch.setattr(quantise, "LOSS_LIMIT", -1.0)
    lost = export(run, out, "--data", str(data))
    assert lost.exit_code == 1
    assert "ROC-AUC on validation, the limit is" in lost.stderr
    assert not Path(out).exists()
