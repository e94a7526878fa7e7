"""A bundle's own reference, from pictures to the alarm: made, shipped, used by the daemon."""

import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from click.testing import CliRunner

from lungwatch.bundle import read_bundle
from lungwatch.cli.main import main
from lungwatch.comparison import COMPONENTS
from lungwatch.daemon.pipeline.model import Classifier, find_bundle
from lungwatch.imaging.reader import read_radiograph

pytest.importorskip("onnx", reason="the extra 'train' is not installed")

pytestmark = pytest.mark.slow

IN_REFERENCE = 80
IN_WINDOW = 40


def chest(rg1, seed):
    """The same chest as if of another patient: moved, scaled, another exposure, noise."""
    rng = np.random.default_rng(seed)
    side = 256
    base = cv2.resize(rg1, (side, side), interpolation=cv2.INTER_AREA)
    turn = cv2.getRotationMatrix2D((side / 2, side / 2), rng.normal(0, 3), rng.uniform(0.92, 1.08))
    turn[:, 2] += rng.normal(0, 6, 2)
    moved = cv2.warpAffine(base, turn, (side, side), borderMode=cv2.BORDER_REPLICATE)
    return np.clip(moved ** rng.uniform(0.8, 1.25) + rng.normal(0, 0.01, moved.shape), 0, 1)


def write(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), (pixels * 255).round().astype(np.uint8))


@pytest.fixture(scope="module")
def pixels(rg1):
    return np.asarray(read_radiograph(rg1).pixels, np.float32)


@pytest.fixture(scope="module")
def bundle(pixels, tmp_path_factory):
    folder = tmp_path_factory.mktemp("drift")
    for seed in range(IN_REFERENCE):
        name = "COVID" if seed % 2 else "NORMAL"
        write(folder / "data" / "val" / name / f"{seed}.png", chest(pixels, seed))
    said = CliRunner().invoke(
        main,
        [
            *("model", "renew", str(find_bundle("baseline-1.1.0")), "--version", "1.2.0"),
            *("-o", str(folder / "out"), "--reference", str(folder / "data")),
        ],
        catch_exceptions=False,
    )
    assert said.exit_code == 0, said.output
    return folder / "out" / "baseline-1.2.0"


def drift_of(home):
    said = CliRunner().invoke(
        main,
        ["results", "stats", "--drift", "--reference", "bundle", "--home", str(home), "--json"],
        catch_exceptions=False,
    )
    found = json.loads(said.stdout)
    return found, {test["what"] for test in found["tests"] if test["alarm"]}


def run_once(home):
    command = [Path(sys.executable).with_name("lungwatch"), "run", "--once", "--home", str(home)]
    said = subprocess.run(command, check=False, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr


def test_the_reference_is_a_file_of_the_bundle_and_tells_no_picture(bundle):
    files = read_bundle(bundle)
    files.check_digests()
    drift = Classifier.of(files).drift
    assert drift is not None
    assert drift.source == "data/val"
    assert drift.axes.shape[0] == COMPONENTS
    assert {"logit", "gate_score", "lung_area", "lung_share", "component_1"} <= set(drift.values)
    assert sum(drift.tags["gate"].values()) == IN_REFERENCE
    # Folders of PNG tell no view.
    assert "view" not in drift.tags
    spread = drift.values["component_1"].values
    assert (float(spread.mean()), float(spread.std(ddof=1))) == pytest.approx((0, 1), abs=0.02)
    assert len(files.drift or b"") < 200_000


def test_like_pictures_do_not_alarm_and_another_grey_scale_does_within_40_files(
    bundle, pixels, tmp_path
):
    home = tmp_path / "home"
    home.mkdir()
    (home / "lungwatch.toml").write_text(f'model = "{bundle}"\ngate = "flag"\nmin_free_mb = 1\n')
    for seed in range(IN_WINDOW):
        write(home / "incoming" / f"like-{seed}.png", chest(pixels, 1000 + seed))
    run_once(home)
    found, alarming = drift_of(home)
    assert alarming == set()
    assert {"logit", "component_1", "embedding_distance"} <= {t["what"] for t in found["tests"]}
    assert found["scopes"][0]["results"] == IN_WINDOW
    for seed in range(IN_WINDOW):
        narrow = np.clip((chest(pixels, 2000 + seed) - 0.3) / 0.4, 0, 1)
        write(home / "incoming" / f"narrow-{seed}.png", narrow)
    run_once(home)
    _, alarming = drift_of(home)
    assert any(what.startswith(("component", "embedding")) for what in alarming)


def test_too_few_pictures_are_refused_by_name(tmp_path, pixels):
    for seed in range(4):
        name = "COVID" if seed % 2 else "NORMAL"
        write(tmp_path / "few" / "val" / name / f"{seed}.png", chest(pixels, seed))
    said = CliRunner().invoke(
        main,
        [
            *("model", "renew", str(find_bundle("baseline-1.1.0")), "--version", "1.2.0"),
            *("-o", str(tmp_path / "out"), "--reference", str(tmp_path / "few")),
        ],
    )
    assert said.exit_code == 1
    assert "too few pictures" in str(said.exception) + said.output
    assert not Path(tmp_path / "out").exists()
