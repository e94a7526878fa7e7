"""`lungwatch evaluate --gate` and `--lesion-masks`, and the way of a release gate into a card."""

import json
import shutil
from importlib import resources
from pathlib import Path

import cv2
import numpy as np
import pytest
from click.testing import CliRunner

from lungwatch import RESEARCH_USE_ONLY
from lungwatch.cli.main import main
from lungwatch.models import SHIPPED_DEFAULT
from lungwatch.training.evaluation.maps import compare_randomised
from lungwatch.training.evaluation.metrics import Bootstrap
from lungwatch.training.evaluation.release_data import CRITERIA, Criteria
from lungwatch.training.evaluation.release_gate import ReleaseResult
from lungwatch.training.evaluation.scorers import KerasScorer
from lungwatch.training.networks.heads import attach_head

pytest.importorskip("onnx", reason="needs onnx (extra 'train')")
pytest.importorskip("matplotlib", reason="needs matplotlib (extra 'train')")
shortcuts = pytest.importorskip("tests.support.shortcuts")

pytestmark = pytest.mark.slow
SHIPPED = Path(str(resources.files("lungwatch.models"))) / SHIPPED_DEFAULT


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "drawn"
    return shortcuts.write_set(folder, shortcuts.independent, count=12)


@pytest.fixture(scope="module")
def lesions(tmp_path_factory, data):
    """Six drawn COVID X-rays; the upper half of the left lung counts as opacity."""
    folder = tmp_path_factory.mktemp("lesions") / "drawn-opacities"
    upper = shortcuts.LUNGS.copy()
    upper[48:] = upper[:, 48:] = False
    for kind in ("images", "opacity", "lung"):
        (folder / kind).mkdir(parents=True)
    for index in range(0, 12, 2):
        shutil.copy(data / f"{index:04d}.png", folder / "images" / f"{index}.png")
        cv2.imwrite(str(folder / "opacity" / f"{index}.png"), upper * np.uint8(255))
        cv2.imwrite(str(folder / "lung" / f"{index}.png"), shortcuts.LUNGS * np.uint8(255))
    return folder


def invoke(*arguments):
    return CliRunner().invoke(main, list(map(str, arguments)))


@pytest.fixture(scope="module")
def measured(data, lesions, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "gate"
    result = invoke(
        *("evaluate", SHIPPED_DEFAULT, data, "--gate", "--lesion-masks", lesions),
        *("--bootstrap", 50, "-o", out),
    )
    return result, out


def test_a_model_that_does_not_pass_leaves_with_1_and_every_criterion_in_the_table(measured):
    result, out = measured
    assert result.exit_code == 1, result.output
    assert result.stderr == ""
    found = json.loads((out / "release_gate.json").read_text())
    assert found["verdict"] == "fail"
    assert found["model"] == SHIPPED_DEFAULT
    assert {check["name"] for check in found["checks"]} == {one.name for one in CRITERIA}
    assert found["counts"]["fail"] == sum(c["verdict"] == "fail" for c in found["checks"])
    assert all(c["reason"] for c in found["checks"] if c["verdict"] == "not_measured")
    for check in found["checks"]:
        assert check["title"] in result.stdout
    # The bundle's own figures of sources left out are among them.
    assert "left_out_auc" in {c["name"] for c in found["checks"] if c["value"] is not None}
    assert f"{SHIPPED_DEFAULT}: release gate FAIL" in result.stdout
    assert RESEARCH_USE_ONLY in result.stdout
    assert found["lesions"]["images"] == 6
    assert found["lesions"]["random_point_of_lungs"] == pytest.approx(0.25, abs=0.02)
    for name in ("release_gate.png", "lesions.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")


def test_a_model_of_which_something_was_not_measured_has_not_passed(data, tmp_path):
    """With bounds that everything reaches, none fails."""
    bounds = tmp_path / "bounds.json"
    easy = {one.name: -1.0 if one.at_least else 1.0 for one in CRITERIA}
    bounds.write_text(json.dumps(easy))
    result = invoke(
        *("evaluate", SHIPPED_DEFAULT, data, "--gate", "--gate-bounds", bounds),
        *("--bootstrap", 20, "--json"),
    )
    found = json.loads(result.stdout)
    assert found["counts"]["fail"] == 0
    assert found["verdict"] == "not_measured"
    assert result.exit_code == 1


def test_a_model_that_passes_leaves_with_0(data, monkeypatch):
    criteria = Criteria()
    checks = tuple(
        criteria.judge(one.name, "here", one.bound, (one.bound, one.bound)) for one in CRITERIA
    )

    def measured(scorer, *_, model_sha256, **__):
        name = scorer.judgement.name
        return ReleaseResult(model=name, model_sha256=model_sha256, data=("d",), checks=checks)

    monkeypatch.setattr("lungwatch.training.evaluation.release_gate.run_release_gate", measured)
    result = invoke("evaluate", SHIPPED_DEFAULT, data, "--gate")
    assert (result.exit_code, result.stderr) == (0, "")
    assert f"release gate pass ({len(CRITERIA)} pass, 0 fail, 0 not measured)" in result.stdout


def test_the_card_of_a_renewed_bundle_shows_it_and_that_of_another_model_is_refused(
    measured, tmp_path
):
    _, out = measured
    arguments = ("model", "renew", SHIPPED, "--version", "9.9.9", "-o", tmp_path)
    file = out / "release_gate.json"
    renewed = invoke(*arguments, "--release-gate", file)
    assert renewed.exit_code == 0, renewed.output
    (bundle,) = tmp_path.iterdir()
    card = (bundle / "card.md").read_text()
    assert "## Release gate\n\n**The gate is not passed.**" in card
    assert "**FAIL**" in card
    values = json.loads(file.read_text())
    other = tmp_path / "other.json"
    other.write_text(json.dumps({**values, "model_sha256": "0" * 64}))
    refused = invoke(*arguments, "--replace", "--release-gate", other)
    assert refused.exit_code == 1
    assert "whose files are not those of" in refused.output


def test_maps_are_measured_against_opacities_and_another_model(lesions, tmp_path):
    result = invoke(
        *("evaluate", SHIPPED_DEFAULT, "--lesion-masks", lesions, "--bootstrap", 20),
        *("--compare", SHIPPED_DEFAULT, "--json", "-o", tmp_path / "out"),
    )
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["images"], found["data"]) == (6, "drawn-opacities")
    assert set(found["shuffled"]) == {"head", "half", "all"}
    # Against itself a map is itself.
    assert found["compared"]["correlation"] == pytest.approx(1.0)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "lesions.json", "lesions.png", "lesion-maps.png"} <= names


def test_the_table_of_maps_names_each_figure(lesions):
    result = invoke("evaluate", SHIPPED_DEFAULT, "--lesion-masks", lesions, "--bootstrap", 0)
    assert result.exit_code == 0, result.output
    for text in ("peak of the map on an opacity", "a random point of the lungs", "SSIM"):
        assert text in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--gate",), "give DATA to evaluate on"),
        (("data", "--gate", "--resume"), "--resume does not go with --gate"),
        (("data", "--lesion-masks", "."), "DATA goes with --lesion-masks only under --gate"),
        (("data", "--left-out", "."), "--left-out needs --gate"),
    ],
)
def test_what_makes_no_sense_together_is_a_usage_error(arguments, message):
    result = invoke("evaluate", SHIPPED_DEFAULT, *arguments)
    assert result.exit_code == 2
    assert message in result.stderr


def test_a_run_that_was_not_trained_without_a_source_is_refused(data, tmp_path):
    result = invoke("evaluate", SHIPPED_DEFAULT, data, "--gate", "--left-out", tmp_path)
    assert (result.exit_code, "no finished run" in result.stderr) == (1, True)


def test_weights_of_a_keras_network_are_shuffled_too(tmp_path):
    keras = pytest.importorskip("keras")
    keras.utils.set_random_seed(1)
    inputs = keras.Input((32, 32, 1))
    features = keras.layers.Conv2D(8, 5, strides=4, activation="relu", name="features")(inputs)
    model = keras.Model(inputs, attach_head(features, dense_units=8, dropout=0.0))
    model.save(tmp_path / "model.keras")
    scorer = KerasScorer(tmp_path / "model.keras")
    pixels = np.random.default_rng(1).random((6, 32, 32, 1)).astype(np.float32)
    before = scorer.model.get_weights()
    found = compare_randomised(scorer, pixels, scorer.maps(pixels)[:, 1], Bootstrap(resamples=10))
    assert set(found) == {"head", "half", "all"}
    assert all(
        np.array_equal(a, b) for a, b in zip(before, scorer.model.get_weights(), strict=True)
    )
    assert found["all"]["images"] == 0 or found["all"]["correlation"] < 0.99
