"""Shipped bundles: complete, consistent, and without traces of the machine that built them."""

import hashlib
import json
import os
from importlib import resources
from pathlib import Path

import pytest

from lungwatch import RESEARCH_USE_ONLY
from lungwatch.export.card import of_data_sets
from lungwatch.models import SHIPPED_DEFAULT
from lungwatch.training.evaluation.evaluation import EvaluationRequest, run_evaluation
from lungwatch.training.evaluation.scorers import load_scorer

BUNDLE = Path(str(resources.files("lungwatch.models"))) / SHIPPED_DEFAULT
REAL = Path(os.environ.get("LUNGWATCH_TEST_DATA", "")) / "open-cxr"


@pytest.fixture(scope="module")
def scorer():
    return load_scorer(Path(SHIPPED_DEFAULT))


def test_the_shipped_files_are_those_the_bundle_was_made_with():
    digests = json.loads((BUNDLE / "bundle.json").read_text())["sha256"]
    found = {name: hashlib.sha256((BUNDLE / name).read_bytes()).hexdigest() for name in digests}
    assert found == digests
    assert (BUNDLE / "model.onnx").stat().st_size < 20_000_000


def test_the_shipped_contract_names_its_training_and_its_figures(scorer):
    contract = scorer.contract
    assert contract.id == SHIPPED_DEFAULT
    assert {"open-cxr/val", "open-cxr/test", "covid-xray/test"} <= set(contract.metrics)
    assert {"name", "train", "val", "licences", "leaks"} <= set(contract.provenance["data"])
    parity = contract.provenance["parity"]
    assert parity["images"] == 50
    assert parity["probability"] <= 1e-5
    assert parity["cam"] <= 1e-3
    assert parity["gradient"] <= 1e-4


def test_the_shipped_contract_and_card_hold_no_paths_of_the_machine(scorer):
    for text in (scorer.contract.to_json(), (BUNDLE / "card.md").read_text()):
        assert '"/' not in text
        assert "/home/" not in text
        assert "/tmp/" not in text


def test_the_shipped_card_says_research_only_and_shows_the_contracts_figures(scorer):
    card = (BUNDLE / "card.md").read_text()
    assert RESEARCH_USE_ONLY in card
    for name, found in of_data_sets(scorer.contract.metrics).items():
        assert f"| {name} |" in card
        assert f"{found['roc_auc']:.3f}" in card


@pytest.mark.shared_data
@pytest.mark.skipif(not REAL.is_dir(), reason="LUNGWATCH_TEST_DATA holds no open-cxr")
def test_evaluating_the_shipped_model_reproduces_its_cards_figures(scorer):
    (one,) = run_evaluation(scorer, EvaluationRequest(data=[REAL]))
    found = one.result
    recorded = scorer.contract.metrics["open-cxr/test"]
    for name in ("roc_auc", "pr_auc", "accuracy", "sensitivity", "specificity", "ece", "brier"):
        assert found[name] == pytest.approx(recorded[name], abs=5e-4)
