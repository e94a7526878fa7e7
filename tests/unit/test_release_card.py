"""The card shows a release gate as it was measured, failures included, for its own model only."""

import json
from dataclasses import replace
from importlib import resources
from pathlib import Path

import pytest

from lungwatch.bundle import read_bundle
from lungwatch.errors import ConfigError
from lungwatch.export.card import (
    RELEASE_GATE,
    of_data_sets,
    read_release_gate,
    require_same_model,
    write_card,
)
from lungwatch.models import SHIPPED_DEFAULT
from lungwatch.training.evaluation.release_data import Criteria
from lungwatch.training.evaluation.release_gate import ReleaseResult
from lungwatch.training.evaluation.scorers import OnnxScorer

SHIPPED = Path(str(resources.files("lungwatch.models"))) / SHIPPED_DEFAULT


@pytest.fixture
def result():
    criteria = Criteria()
    return ReleaseResult(
        model="some-1.0.0",
        model_sha256="ab" * 32,
        data=("away/test",),
        checks=(
            criteria.judge("auc", "a|way", 0.95, (0.9, 0.97), beside={"view": 0.66}),
            criteria.judge("above_confounds", "away", 0.01, (-0.1, 0.1)),
            criteria.skip("calibration", "away", "too few: 9, at least 50 are needed"),
        ),
    )


def written(tmp_path, values):
    file = tmp_path / "release_gate.json"
    file.write_text(json.dumps(values))
    return file


def test_every_check_has_a_line_with_its_verdict(tmp_path, result):
    found = read_release_gate(written(tmp_path, result.to_dict()))
    before = OnnxScorer(read_bundle(SHIPPED).model).contract
    text = write_card(replace(before, metrics={RELEASE_GATE: found}))
    assert "**The gate is not passed.**" in text
    assert "1 checks pass, 1 fail, 1 were not measured. Measured on some-1.0.0" in text
    assert (
        "| ROC-AUC, COVID against others | a\\|way | 0.950 | 0.900 to 0.970 | ≥ 0.9 | pass | "
        "view 0.66 |" in text
    )
    assert "| ≥ 0.01, lower end | **FAIL** |" in text
    assert "| not measured: too few: 9, at least 50 are needed |" in text


def test_it_goes_through_a_contract_into_the_card_and_is_no_data_set(tmp_path, result):
    before = OnnxScorer(read_bundle(SHIPPED).model).contract
    found = read_release_gate(written(tmp_path, result.to_dict()))
    contract = replace(before, metrics={**before.metrics, RELEASE_GATE: found})
    again = type(contract).from_json(contract.to_json())
    assert again.metrics[RELEASE_GATE] == found
    assert of_data_sets(again.metrics) == of_data_sets(before.metrics)
    assert "## Release gate\n\n**The gate is not passed.**" in write_card(again)


def test_that_of_another_model_is_refused(tmp_path, result):
    found = read_release_gate(written(tmp_path, result.to_dict()))
    require_same_model(found, "ab" * 32, "some-1.0.0")
    with pytest.raises(ConfigError, match=r"measured on some-1\.0\.0"):
        require_same_model(found, "cd" * 32, "other-1.0.0")


@pytest.mark.parametrize(
    "change",
    [
        {"release_gate": 2},
        {"verdict": "fine"},
        {"checks": [{"name": "auc"}]},
        {"checks": 1},
    ],
)
def test_what_is_no_release_gate_is_refused(tmp_path, result, change):
    with pytest.raises(ConfigError, match="release gate"):
        read_release_gate(written(tmp_path, {**result.to_dict(), **change}))


def test_a_missing_file_and_one_that_is_no_json_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        read_release_gate(tmp_path / "nowhere.json")
    (tmp_path / "text").write_text("{")
    with pytest.raises(ConfigError, match="not JSON"):
        read_release_gate(tmp_path / "text")
