"""A network with a head for opacity is exported with it, calibrated, explained and measured."""

import json
from dataclasses import asdict

import cv2
import numpy as np
import onnxruntime
import pytest

from lungwatch.contract import (
    FINDING_CAMS,
    FINDING_PEAKS,
    FINDINGS,
    INPUT,
    METADATA_KEY,
    Calibration,
    Finding,
    ModelContract,
)
from lungwatch.daemon.pipeline.model import Classifier
from lungwatch.errors import DatasetError, ModelError
from lungwatch.preprocess import golden_input
from lungwatch.training.networks.heads import (
    FEATURES,
    LOGIT,
    POOLED,
    attach_finding,
    attach_head,
    further_findings,
    output_of,
)

keras = pytest.importorskip("keras", reason="needs Keras (extra 'train')")
pytest.importorskip("tensorflow", reason="needs TensorFlow (extra 'train')")
pytest.importorskip("tf2onnx", reason="needs tf2onnx (extra 'train')")

from lungwatch.export.exporter import ExportRequest, export  # noqa: E402
from lungwatch.export.graph import compare, synthetic_images, to_onnx  # noqa: E402
from lungwatch.preprocess import PreprocessSpec  # noqa: E402
from lungwatch.training.data.dataset import load_dataset  # noqa: E402
from lungwatch.training.data.pixels import read_pixels  # noqa: E402
from lungwatch.training.evaluation.calibration import fit_calibration  # noqa: E402
from lungwatch.training.evaluation.metrics import roc_auc  # noqa: E402
from lungwatch.training.evaluation.scorers import KerasScorer, OnnxScorer, predict_logits  # noqa: E402
from lungwatch.training.networks.heads import gradcam  # noqa: E402

SIDE = 32
CONFIG = json.dumps({"preprocess": PreprocessSpec(size_px=SIDE).to_dict()})


def network(*findings: str):
    """A small network of random weights with heads for COVID and for each finding."""
    keras.utils.set_random_seed(5)
    pixels = keras.Input((SIDE, SIDE, 1), name="pixels")
    x = keras.layers.Conv2D(6, 3, strides=2, padding="same", activation="relu")(pixels)
    x = keras.layers.Conv2D(9, 3, strides=2, padding="same", activation="relu")(x)
    x = keras.layers.Activation("linear", name=FEATURES)(x)
    logit = attach_head(x, dense_units=7, dropout=0.2)
    trunk = keras.Model(pixels, logit)
    pooled = trunk.get_layer(POOLED).output
    others = [attach_finding(pooled, name, dense_units=5, dropout=0.2) for name in findings]
    return keras.Model(pixels, [logit, *others]) if others else trunk


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Grey pictures: the brighter, the more there is on them."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(1)
    for split, count in (("train", 6), ("val", 12), ("test", 6)):
        for level, finding in ((60, "NORMAL"), (120, "OTHER_PNEUMONIA"), (180, "COVID")):
            place = folder / split / finding
            place.mkdir(parents=True)
            for index in range(count):
                image = np.clip(rng.normal(level, 30, (72, 72)), 0, 255).astype(np.uint8)
                assert cv2.imwrite(str(place / f"{index}.png"), image)
    return folder


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("network") / "model.keras"
    network("opacity").save(path)
    return path


@pytest.fixture(scope="module")
def exported(data, file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundles")
    request = ExportRequest(model=file, name="two", version="1.0.0", folder=folder, data=data)
    return export(request)


def test_heads_are_found_by_their_layers():
    assert further_findings(network()) == ()
    model = network("opacity", "nodule")
    assert further_findings(model) == ("opacity", "nodule")
    assert output_of(model).output.name == model.get_layer(LOGIT).output.name


def test_the_graph_answers_every_finding_as_keras_does_and_explains_each():
    """Logits to rounding, maps as automatic differentiation, in the network's order."""
    model, spec = network("opacity", "nodule"), PreprocessSpec(size_px=SIDE)
    pixels = synthetic_images(spec, 5)
    graph = to_onnx(model).SerializeToString()
    names = [FINDINGS, FINDING_CAMS, FINDING_PEAKS]
    logits, cams, peaks = onnxruntime.InferenceSession(graph).run(names, {INPUT: pixels})
    assert logits.shape == (5, 2)
    assert cams.shape == (5, 2, 8, 8)
    assert peaks.shape == (5, 2)
    for index, name in enumerate(("opacity", "nodule")):
        alone = output_of(model, name)
        np.testing.assert_allclose(logits[:, index], predict_logits(alone, pixels), atol=1e-5)
        np.testing.assert_allclose(cams[:, index], gradcam(alone, pixels)[:, 1], atol=1e-4)
    assert ((cams.max(axis=(2, 3)) > 0) == (peaks > 0)).all()
    assert peaks.any(), "maps that are all empty would prove nothing"
    compare(model, graph, pixels, "synthetic").check()


def test_parity_looks_at_every_finding():
    """A graph whose opacity answers otherwise is refused, though COVID's answer is right."""
    model, pixels = network("opacity"), synthetic_images(PreprocessSpec(size_px=SIDE), 3)
    graph = to_onnx(model).SerializeToString()
    layer = model.get_layer("opacity_logit")
    layer.set_weights([layer.kernel.numpy(), layer.bias.numpy() + 1])
    with pytest.raises(ModelError, match="probability"):
        compare(model, graph, pixels, "synthetic").check()


def test_the_contract_has_calibration_threshold_golden_answer_and_scale(exported, file, data):
    folder, contract = exported
    (opacity,) = contract.findings
    assert opacity.name == "opacity"
    told = onnxruntime.InferenceSession(str(folder / "model.onnx")).get_modelmeta()
    assert ModelContract.from_json(told.custom_metadata_map[METADATA_KEY]) == contract
    golden = golden_input(contract.preprocess)[np.newaxis]
    logit = predict_logits(output_of(keras.models.load_model(file), "opacity"), golden)[0]
    assert contract.golden.findings == (pytest.approx(1 / (1 + np.exp(-logit)), abs=1e-5),)
    for name, images in (("val", 36), ("test", 18)):
        measured = contract.metrics[f"{data.name}/{name}"]["findings"]["opacity"]
        assert measured["positives"] == images * 2 / 3, "COVID is an opacity too"
        assert measured["negatives"] == images / 3
    assert opacity.map_reference is None or opacity.map_reference > 0


def test_the_card_names_the_finding_and_its_figures(exported):
    folder, contract = exported
    card = (folder / "card.md").read_text(encoding="utf-8")
    assert "finding `opacity`, with a probability of its own: present from " in card
    assert f"{contract.findings[0].threshold:.4f}" in card
    assert "| set | finding | with it | images | ROC-AUC |" in card


def test_the_daemon_scores_what_was_exported(exported, file):
    """Calibrated by the contract, for each image of a batch; the golden picture is replayed."""
    folder, contract = exported
    classifier = Classifier.load(folder)
    pixels = synthetic_images(contract.preprocess, 3)
    logits = predict_logits(output_of(keras.models.load_model(file), "opacity"), pixels)
    for found, logit in zip(classifier.run(pixels), logits, strict=True):
        wanted = contract.findings[0].calibration.probability(float(logit))
        assert found.findings == {
            "covid": found.probability,
            "opacity": pytest.approx(wanted, abs=1e-5),
        }
        assert found.further_cams.shape == (1, 8, 8)


def test_scorers_of_keras_and_onnx_agree(exported, file):
    folder, contract = exported
    pixels = synthetic_images(contract.preprocess, 4)
    of_keras, of_onnx = KerasScorer(file), OnnxScorer((folder / "model.onnx").read_bytes())
    assert of_onnx.finding_logits(pixels).shape == (4, 1)
    np.testing.assert_allclose(
        of_onnx.finding_logits(pixels), of_keras.finding_logits(pixels), atol=1e-5
    )
    np.testing.assert_allclose(of_onnx.logits(pixels), of_keras.logits(pixels), atol=1e-5)


def test_a_run_brings_its_own_calibration(file, data, tmp_path):
    """What `metrics.json` says of a finding is taken over; another network's is refused."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "model.keras").write_bytes(file.read_bytes())
    own = Finding(name="opacity", calibration=Calibration(slope=2, intercept=-1), threshold=0.3)
    metrics = {
        "findings": [asdict(own)],
        "calibration": {"slope": 1.5, "intercept": 0.1},
        "decision": {"threshold": 0.5, "uncertain_low": 0.4, "uncertain_high": 0.6},
        "epochs": 1,
        "best_epoch": 1,
        "parameters": 1,
    }
    (run / "metrics.json").write_text(json.dumps(metrics))
    (run / "config.json").write_text(CONFIG)
    (run / "environment.json").write_text("{}")
    request = ExportRequest(model=run, name="own", version="1.0.0", folder=tmp_path)
    assert export(request)[1].findings == (own,)
    network().save(run / "model.keras")
    with pytest.raises(ModelError, match="lacks: opacity"):
        export(request)


def test_without_data_nothing_reads_the_scores(file, tmp_path):
    """Neither calibration nor threshold is made up."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "model.keras").write_bytes(file.read_bytes())
    (run / "config.json").write_text(CONFIG)
    (run / "environment.json").write_text("{}")
    metrics = {
        "calibration": {"slope": 1.5, "intercept": 0.1},
        "decision": {"threshold": 0.5, "uncertain_low": 0.5, "uncertain_high": 0.5},
        "epochs": 1,
        "best_epoch": 1,
        "parameters": 1,
    }
    (run / "metrics.json").write_text(json.dumps(metrics))
    with pytest.raises(DatasetError, match="opacity"):
        export(ExportRequest(model=run, name="none", version="1.0.0", folder=tmp_path))


def test_int8_fits_the_findings_anew_and_tells_what_was_lost(file, data, tmp_path, monkeypatch):
    """To the quantised graph's own logits; the float graph's figure stands beside."""
    # Random weights on noise lose more than a trained network may.
    monkeypatch.setattr("lungwatch.export.references.LOSS_LIMIT", 0.1)
    request = ExportRequest(
        model=file, name="q", version="1.0.0", folder=tmp_path, data=data, int8=True
    )
    folder, contract = export(request)
    (opacity,) = contract.findings
    samples = [sample for sample in load_dataset(data) if sample.split == "val"]
    scorer = OnnxScorer((folder / "model.onnx").read_bytes())
    logits = scorer.finding_logits(read_pixels(samples, contract.preprocess))
    truth = [sample.finding != "NORMAL" for sample in samples]
    assert opacity.calibration == fit_calibration(truth, logits[:, 0])
    lost = contract.provenance["quantisation"]["findings"]["opacity"]
    assert lost["roc_auc_int8"] == pytest.approx(roc_auc(truth, logits[:, 0]), abs=1e-6)
    assert abs(lost["roc_auc_float"] - lost["roc_auc_int8"]) < 0.1
    assert "ROC-AUC of the finding `opacity` on validation" in (folder / "card.md").read_text()
    Classifier.load(folder)


def test_a_finding_that_loses_too_much_in_int8_is_not_exported(file, data, tmp_path, monkeypatch):
    monkeypatch.setattr("lungwatch.export.references.LOSS_LIMIT", -1.0)
    request = ExportRequest(
        model=file, name="q", version="1.0.0", folder=tmp_path, data=data, int8=True
    )
    with pytest.raises(ModelError, match="int8 costs 'opacity'"):
        export(request)
    assert list(tmp_path.iterdir()) == []


def test_what_the_labels_do_not_tell_is_not_exported(data, tmp_path):
    network("nodule").save(tmp_path / "model.keras")
    request = ExportRequest(
        model=tmp_path / "model.keras", name="n", version="1.0.0", folder=tmp_path, data=data
    )
    with pytest.raises(DatasetError, match="'nodule'"):
        export(request)
