"""Networks that are joined answer with their mean, and still explain themselves exactly."""

import json

import cv2
import numpy as np
import pytest
from click.testing import CliRunner

from lungwatch.cli.main import main
from lungwatch.contract import Calibration
from lungwatch.errors import ModelError
from lungwatch.training.networks.heads import FEATURES, Member, attach_head, join_networks

keras = pytest.importorskip("keras", reason="needs Keras (extra 'train')")
pytest.importorskip("tensorflow", reason="needs TensorFlow (extra 'train')")
pytest.importorskip("tf2onnx", reason="needs tf2onnx (extra 'train')")


def network(side_px: int, strides: int, seed: int):
    """A small network whose map has side_px / 2 ** strides cells a side."""
    keras.utils.set_random_seed(seed)
    pixels = keras.Input((side_px, side_px, 1))
    x = pixels
    for _ in range(strides):
        x = keras.layers.Conv2D(6 + seed, 3, strides=2, padding="same", activation="relu")(x)
    x = keras.layers.Activation("linear", name=FEATURES)(x)
    return keras.Model(pixels, attach_head(x, dense_units=5 + seed, dropout=0.2))


def test_the_joint_logit_is_the_mean_of_the_calibrated_ones():
    """To rounding, for maps of different fineness."""
    members = [
        Member(name="a", model=network(32, 2, 1), calibration=Calibration(slope=2, intercept=0.3)),
        Member(name="b", model=network(32, 3, 2), calibration=Calibration(slope=0.5, intercept=-1)),
    ]
    joint = join_networks(members)
    pixels = np.random.default_rng(3).uniform(0, 1, (7, 32, 32, 1)).astype(np.float32)
    wanted = np.mean(
        [
            m.calibration.slope * np.asarray(m.model(pixels)) + m.calibration.intercept
            for m in members
        ],
        axis=0,
    )
    assert np.allclose(np.asarray(joint(pixels)), wanted, atol=1e-5)
    assert joint.get_layer(FEATURES).output.shape[1] == 8


def test_networks_that_do_not_fit_are_refused():
    """Inputs of two sizes, and maps that are no multiples of each other."""
    one = Member(name="a", model=network(32, 2, 1), calibration=Calibration())
    for other in (network(64, 2, 2), network(48, 2, 2)):
        with pytest.raises(ModelError, match="cannot be joined"):
            join_networks([one, Member(name="b", model=other, calibration=Calibration())])


def test_runs_are_joined_measured_and_exported(tmp_path):
    """From two run folders to a bundle; parity with automatic differentiation included."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 8), ("test", 8)):
        for finding, level in (("COVID", 150), ("NORMAL", 90)):
            place = tmp_path / "data" / split / finding
            place.mkdir(parents=True)
            for index in range(count):
                grey = rng.normal(level, 40, (72, 72)).clip(0, 255).astype(np.uint8)
                grey[:, : 5 * index] //= 2
                grey[12:60, 12:30] = grey[12:60, 42:60] = 20
                assert cv2.imwrite(str(place / f"{index}.png"), grey)

    def run(*words) -> str:
        done = CliRunner().invoke(main, [str(word) for word in words])
        assert done.exit_code == 0, done.output
        return done.output

    for name, filters in (("one", "4,8"), ("two", "4,8,8")):
        run(
            *("train", "baseline", tmp_path / "data", "--out", tmp_path / name, "--size", 32),
            *("--filters", filters, "--dense-units", 8, "--epochs", 1, "--leaks", "allow"),
        )
    runs = (tmp_path / "one", tmp_path / "two")
    data = ("--data", tmp_path / "data")
    run("train", "join", *runs, *data, "--out", tmp_path / "both", "--leaks", "allow")
    metrics = json.loads((tmp_path / "both" / "metrics.json").read_text())
    assert 0 <= metrics["test"]["roc_auc"] <= 1
    assert len(json.loads((tmp_path / "both" / "config.json").read_text())["members"]) == 2
    words = ("--name", "both", "--version", "1.0.0", "-o", tmp_path / "models")
    run("export", tmp_path / "both", *words, *data)
    shown = json.loads(run("model", "show", tmp_path / "models" / "both-1.0.0", "--json"))
    assert shown["cam_side_px"] == 16
    # The same, seeing the lungs alone: what is dark here.
    segmenter = keras.Sequential([keras.Input((128, 128, 1)), keras.layers.Conv2D(1, 1)])
    segmenter.set_weights([np.full((1, 1, 1, 1), -20, np.float32), np.array([10], np.float32)])
    (tmp_path / "lungs").mkdir()
    segmenter.save(tmp_path / "lungs" / "model.keras")
    seen = ("--lungs", tmp_path / "lungs", "--out", tmp_path / "seen", "--leaks", "allow")
    run("train", "join", *runs, *data, *seen)
    metrics = json.loads((tmp_path / "seen" / "metrics.json").read_text())
    assert 0 < metrics["lung_box"]["iou"] <= 1
    words = ("--name", "seen", "--version", "1.0.0", "-o", tmp_path / "models")
    run("export", tmp_path / "seen", *words, *data)
    shown = json.loads(run("model", "show", tmp_path / "models" / "seen-1.0.0", "--json"))
    assert (shown["preprocess"]["size_px"], shown["cam_side_px"]) == (64, 32)
    # Trained with all sources, they can say nothing about one left out.
    unlike = CliRunner().invoke(
        main,
        [
            *("train", "join", *map(str, runs), *map(str, data), "--leave-out", "west"),
            *("--out", str(tmp_path / "west")),
        ],
    )
    assert unlike.exit_code == 1
    assert "trained with all sources" in unlike.output
    alone = CliRunner().invoke(
        main, ["train", "join", str(runs[0]), *map(str, data), "--out", str(tmp_path / "alone")]
    )
    assert alone.exit_code == 1
    assert "at least two" in alone.output
