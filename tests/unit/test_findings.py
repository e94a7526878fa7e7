"""Findings beside COVID: read from the graph, calibrated by the contract, checked at the start."""

import shutil
from dataclasses import replace
from importlib import resources
from pathlib import Path

import numpy as np
import pytest

from lungwatch.contract import METADATA_KEY, ModelContract
from lungwatch.daemon.pipeline.model import Classifier
from lungwatch.errors import ModelError
from lungwatch.models import SHIPPED_DEFAULT
from lungwatch.preprocess import golden_input

onnx = pytest.importorskip("onnx")
gated = pytest.importorskip("tests.support.bundles")

SHIPPED = Path(str(resources.files("lungwatch.models"))) / SHIPPED_DEFAULT


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return gated.opacity_bundle(SHIPPED, tmp_path_factory.mktemp("made"), logit=0.25)


def changed(bundle, folder, change, *, without=()):
    """A copy of the bundle with another contract, and without some outputs."""
    copy = Path(shutil.copytree(bundle, folder / "changed"))
    model = onnx.load_model_from_string((copy / "model.onnx").read_bytes())
    kept = [output for output in model.graph.output if output.name not in without]
    del model.graph.output[:]
    model.graph.output.extend(kept)
    (told,) = [entry for entry in model.metadata_props if entry.key == METADATA_KEY]
    told.value = change(ModelContract.from_json(told.value)).to_json()
    gated.write(copy, {"model.onnx": model.SerializeToString()}, name="two")
    return copy


def test_the_probability_is_calibrated_by_the_findings_own_curve(bundle):
    classifier = Classifier.load(bundle)
    batch = np.repeat(golden_input(classifier.contract.preprocess)[np.newaxis], 3, axis=0)
    scores = classifier.run(batch)
    assert len(scores) == 3
    for one in scores:
        assert one.label == "NEGATIVE"
        assert one.findings == {
            "covid": one.probability,
            "opacity": pytest.approx(1 / (1 + np.exp(-1.5)), abs=1e-6),
        }
        np.testing.assert_array_equal(one.further_cams, one.cam[1:])
        np.testing.assert_array_equal(one.further_peaks, one.cam_peak[1:])


def test_maps_of_findings_are_optional(tmp_path):
    classifier = Classifier.load(gated.opacity_bundle(SHIPPED, tmp_path, logit=0.0, maps=False))
    (one,) = classifier.run(golden_input(classifier.contract.preprocess)[np.newaxis])
    assert one.findings["opacity"] == pytest.approx(1 / (1 + np.exp(-1.0)), abs=1e-6)
    assert (one.further_cams, one.further_peaks) == (None, None)


def test_a_shipped_model_without_findings_has_covid_alone():
    classifier = Classifier.load(SHIPPED)
    (one,) = classifier.run(golden_input(classifier.contract.preprocess)[np.newaxis])
    if classifier.contract.findings:
        pytest.skip("the shipped model has findings of its own")
    assert one.findings == {"covid": one.probability}


def test_a_graph_without_the_output_that_its_contract_promises_is_refused(bundle, tmp_path):
    copy = changed(bundle, tmp_path, lambda contract: contract, without=("findings",))
    with pytest.raises(ModelError, match=r"the outputs [^;]*not pixels and .*findings"):
        Classifier.load(copy)


def test_another_number_of_findings_than_the_contract_names_is_refused(bundle, tmp_path):
    def double(contract):
        (one,) = contract.findings
        golden = replace(contract.golden, findings=contract.golden.findings * 2)
        return replace(contract, findings=(one, replace(one, name="nodule")), golden=golden)

    with pytest.raises(ModelError, match="scores 1 findings, its contract names 2"):
        Classifier.load(changed(bundle, tmp_path, double))


@pytest.mark.parametrize("off", [0.1, -0.1])
def test_another_golden_answer_of_a_finding_is_refused_by_its_name(bundle, tmp_path, off):
    def otherwise(contract):
        (told,) = contract.golden.findings
        return replace(contract, golden=replace(contract.golden, findings=(told + off,)))

    with pytest.raises(ModelError, match="probability of 'opacity'"):
        Classifier.load(changed(bundle, tmp_path, otherwise))
