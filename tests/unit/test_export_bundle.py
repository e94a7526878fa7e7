"""Bundles are written whole, proved by digest, and never changed under their name."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest

from lungwatch import RESEARCH_USE_ONLY
from lungwatch.contract import Calibration, Decision, Golden, ModelContract
from lungwatch.errors import ConfigError, ModelError
from lungwatch.export.card import write_card
from lungwatch.export.exporter import ExportRequest, write_bundle
from lungwatch.export.graph import Parity
from lungwatch.preprocess import PreprocessSpec

FIGURES = {
    "positives": 3,
    "negatives": 4,
    "roc_auc": 0.912,
    "pr_auc": 0.8,
    "accuracy": 0.7,
    "sensitivity": 0.6,
    "specificity": 0.5,
    "f1": 0.4,
    "ece": 0.1,
    "brier": 0.2,
    "tp": 1,
    "fp": 1,
    "tn": 3,
    "fn": 2,
    "uncertain": 0.05,
    "probes": {"COVID vs NORMAL": {"roc_auc": 0.873, "positives": 3, "negatives": 4}},
}


def contract():
    parity = Parity(images=9, kind="synthetic", probability=1e-7, cam=1e-6, gradient=1e-7)
    return ModelContract(
        name="toy",
        version="1.2.3",
        family="toy network",
        preprocess=PreprocessSpec(size_px=32),
        cam_side_px=2,
        embedding_size=4,
        decision=Decision(threshold=0.4, uncertain_low=0.35, uncertain_high=0.45),
        calibration=Calibration(slope=1.5, intercept=-0.25),
        golden=Golden(input_sha256="0" * 64, probability=0.5, cam_mean=0.1),
        provenance={"parity": parity.to_dict()},
        metrics={"some/test": FIGURES},
    )


def test_a_bundle_lists_the_digest_of_each_of_its_files(tmp_path):
    folder = write_bundle(tmp_path, model=b"graph", contract=contract(), card="# card\n")
    assert folder == tmp_path / "toy-1.2.3"
    about = json.loads((folder / "bundle.json").read_text())
    assert about["sha256"] == {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest()
        for name in ("model.onnx", "card.md")
    }
    assert [p.name for p in tmp_path.iterdir()] == ["toy-1.2.3"]


def test_a_version_that_exists_is_only_replaced_on_request(tmp_path):
    folder = write_bundle(tmp_path, model=b"first", contract=contract(), card="")
    with pytest.raises(ConfigError, match="exists already"):
        write_bundle(tmp_path, model=b"second", contract=contract(), card="")
    assert (folder / "model.onnx").read_bytes() == b"first"
    write_bundle(tmp_path, model=b"second", contract=contract(), card="", replace=True)
    assert (folder / "model.onnx").read_bytes() == b"second"


def test_the_card_says_research_only_and_shows_every_figure():
    card = write_card(contract(), notes="**Confounds.** Many.")
    assert RESEARCH_USE_ONLY in card
    assert "| some/test | 7 | 3 | 0.912 |" in card
    assert "| some/test | COVID vs NORMAL | 0.873 (3 vs 4) |" in card
    assert "Threshold 0.4000" in card
    assert "**Confounds.** Many." in card


FIT = {
    "learning_rate": 1e-3,
    "batch_size": 32,
    "seed": 1,
    "keep": "best",
    "augmentation": {"zoom": 0.2},
}


def card_of(**provenance):
    parity = contract().provenance["parity"]
    return write_card(replace(contract(), provenance={"parity": parity, **provenance}))


def test_the_card_of_a_run_that_stopped_by_validation_names_its_best_epoch():
    card = card_of(
        fit=FIT,
        epochs=30,
        best_epoch=28,
        trained_on="train",
        calibrated_on="validation split",
    )
    assert "best of 30 epochs by calibrated validation loss: 28." in card
    assert "- Augmentation, no flips: zoom 0.2." in card
    assert "- Calibration and threshold were fixed on the validation split." in card


def test_the_card_of_a_retrained_run_says_what_it_learnt_from_and_what_fixed_its_threshold():
    fixed_on = "4 of 12 images of the validation split that the network did not learn from"
    card = card_of(
        fit=FIT,
        epochs=12,
        best_epoch=12,
        trained_on="train and two thirds of val",
        calibrated_on=fixed_on,
    )
    assert "best of" not in card
    assert "learnt from train and two thirds of val" in card
    assert "without the latter: 12." in card
    assert f"fixed on the {fixed_on}." in card


def test_the_card_of_a_guided_run_says_that_the_last_weights_are_kept_and_how_it_was_guided():
    card = card_of(
        fit={**FIT, "keep": "last"},
        epochs=8,
        best_epoch=8,
        network={"backbone": "efficientnet-lite0", "weights": "imagenet", "stride": 16},
        guidance={
            "objective": {"other_target": 0.1, "ranking": 0.25, "lungs": 0.5},
            "group_robust": 0.05,
            "domain_adversarial": 0.0,
        },
        threshold_rule="balanced",
    )
    assert "the last weights of 8 epochs are kept." in card
    assert "best of" not in card
    assert "efficientnet-lite0, cut at 16 pixels a cell" in card
    assert "evidence outside the lungs 0.5. Groups of finding and source" in card
    assert "(group DRO): step 0.05.\n" in card
    assert "Domain-adversarial" not in card
    assert "largest smaller one of sensitivity and specificity on validation" in card
    assert "Augmentation, no flips" not in card


def test_the_card_of_a_joined_network_names_its_members():
    card = card_of(members=[{"family": "one network"}, {"family": "another"}])
    assert "calibrated logits of 2 networks: one network, another." in card


@pytest.mark.parametrize("field", ["probability", "cam", "gradient"])
@pytest.mark.parametrize("value", [2e-3, float("nan")])
def test_any_difference_above_its_limit_or_without_a_value_is_refused(field, value):
    found = {"probability": 0.0, "cam": 0.0, "gradient": 0.0, field: value}
    with pytest.raises(ModelError, match="differs"):
        Parity(images=1, kind="synthetic", **found).check()


@pytest.mark.parametrize(
    ("name", "version"), [("../x", "1.0.0"), ("X", "1.0.0"), ("x", "1.0"), ("x", "../1")]
)
def test_names_and_versions_that_are_no_folder_names_are_refused(name, version):
    with pytest.raises(ConfigError):
        ExportRequest(model=Path("m"), name=name, version=version, folder=Path())
