"""A backbone's second career: frozen, fine-tuned, kept or not, resumed, exported with its maps."""

import csv
import json
from dataclasses import replace

import cv2
import numpy as np
import pytest
from click.testing import CliRunner

from lungwatch.cli.main import main
from lungwatch.errors import ConfigError
from lungwatch.training.fitting.frozen import FINE_TUNED, FROZEN, HeadConfig
from lungwatch.training.fitting.run import Progress
from lungwatch.training.fitting.search import Choices
from lungwatch.training.fitting.trainer import FitConfig
from lungwatch.training.networks.backbones import Normalisation, TransferConfig
from lungwatch.training.recipes.classifiers import train_transfer

keras = pytest.importorskip("keras", reason="needs Keras (extra 'train')")
pytest.importorskip("tensorflow", reason="needs TensorFlow (extra 'train')")
pytest.importorskip("tf2onnx", reason="needs tf2onnx (extra 'train')")

FREEZING = HeadConfig(epochs=2, batch_size=16, patience=2, seed=7, copies=2)
TUNING = FitConfig(epochs=2, batch_size=16, learning_rate=3e-3, patience=2, seed=7)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Noise, brighter in the middle for COVID."""
    folder = tmp_path_factory.mktemp("blobs")
    y, x = np.mgrid[0:72, 0:80]
    blob = 80 * np.exp(-(((x - 40) / 12.0) ** 2) - ((y - 36) / 12.0) ** 2)
    rng = np.random.default_rng(0)
    for split, count in (("train", 24), ("val", 12), ("test", 12)):
        for finding in ("COVID", "NORMAL", "OTHER_PNEUMONIA"):
            place = folder / split / finding
            place.mkdir(parents=True)
            for index in range(count):
                image = rng.normal(110, 25, blob.shape) + blob * (finding == "COVID")
                grey = np.clip(image, 0, 255).astype(np.uint8)
                assert cv2.imwrite(str(place / f"{index:03d}.png"), grey)
    return folder


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    keras.utils.set_random_seed(3)
    picture = keras.Input((24, 24, 3))
    x = keras.layers.Conv2D(8, 3, strides=2, padding="same", use_bias=False)(picture)
    x = keras.layers.BatchNormalization()(x)
    x = keras.layers.ReLU(max_value=6.0)(x)
    x = keras.layers.Conv2D(16, 3, strides=2, padding="same", activation="relu")(x)
    x = keras.layers.Dense(3)(keras.layers.GlobalAveragePooling2D()(x))
    file = tmp_path_factory.mktemp("weights") / "small.keras"
    keras.Model(picture, x).save(file)
    return TransferConfig(
        backbone="efficientnet-lite0", weights=str(file), size_px=32, dense_units=16
    )


@pytest.fixture(scope="module")
def run(data, network, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "toy"
    train_transfer(
        data,
        folder,
        network=network,
        frozen=FREEZING,
        tuning=TUNING,
        normalisation=Normalisation(),
    )
    return folder


def metrics_of(run):
    return json.loads((run / "metrics.json").read_text())


def test_a_run_folder_holds_both_phases_and_names_the_kept_one(run, network):
    assert {path.name for path in run.iterdir()} == {
        "config.json",
        "environment.json",
        FROZEN,
        FINE_TUNED,
        "history.csv",
        "history.png",
        "metrics.json",
        "model.keras",
        "retrained",
        "data.csv",
        "learnt.json",
        "predictions.csv",
        "confusion.png",
    }
    metrics = metrics_of(run)
    assert metrics["phase"] in (FROZEN, FINE_TUNED)
    assert metrics["trained_on"] == "train and two thirds of val"
    assert "that the network did not learn from" in metrics["calibrated_on"]
    assert metrics["test"]["positives"] + metrics["test"]["negatives"] == 36
    with (run / "history.csv").open() as file:
        rows = [(row["phase"], row["epoch"]) for row in csv.DictReader(file)]
    assert rows == [(FROZEN, "1"), (FROZEN, "2"), (FINE_TUNED, "1"), (FINE_TUNED, "2")]
    config = json.loads((run / "config.json").read_text())
    assert config["network"]["weights"] == "small.keras"


def test_the_kept_network_has_the_lowest_validation_loss_of_both_phases(run):
    losses = {
        phase: json.loads((run / phase / "state.json").read_text())["best_val_loss"]
        for phase in (FROZEN, FINE_TUNED)
    }
    assert losses[metrics_of(run)["phase"]] == min(losses.values())


def test_fine_tuning_that_does_not_help_leaves_the_frozen_network(data, network, tmp_path):
    sound = replace(FREEZING, learning_rate=2e-2, average=0.0, epochs=25, patience=25)
    wild = replace(TUNING, learning_rate=50.0, average=0.0, epochs=1)
    metrics = train_transfer(
        data,
        tmp_path / "wild",
        network=network,
        frozen=sound,
        tuning=wild,
        normalisation=Normalisation(),
        retrain=False,
    )
    assert metrics["phase"] == FROZEN
    assert metrics["trained"]["layers"] == []
    assert (tmp_path / "wild" / "model.keras").read_bytes() == (
        tmp_path / "wild" / FROZEN / "model.keras"
    ).read_bytes()
    assert metrics["best_epoch"] < metrics["epochs"] == 26


def interrupted(data, network, folder, *, on_batch=None, on_epoch=None):
    with pytest.raises(KeyboardInterrupt):
        train_transfer(
            data,
            folder,
            network=network,
            frozen=FREEZING,
            tuning=TUNING,
            normalisation=Normalisation(),
            resume=True,
            progress=Progress(on_batch=on_batch, on_epoch=on_epoch),
        )


def test_interrupted_in_any_phase_a_run_resumes_to_the_same_metrics(data, network, run, tmp_path):
    broken = tmp_path / "broken"

    def at_batch(epoch, batch):
        def interrupt(*found):
            if found[:2] == (epoch, batch):
                raise KeyboardInterrupt

        return interrupt

    def when_retrained(row):
        if "val_loss" not in row:
            raise KeyboardInterrupt

    # While features are computed, in fine-tuning, and after the first epoch of retraining.
    interrupted(data, network, broken, on_batch=at_batch(0, 2))
    assert not (broken / FROZEN / "state.json").exists()
    interrupted(data, network, broken, on_batch=at_batch(4, 2))
    assert (broken / FROZEN / "state.json").exists()
    interrupted(data, network, broken, on_epoch=when_retrained)
    resumed = train_transfer(
        data,
        broken,
        network=network,
        frozen=FREEZING,
        tuning=TUNING,
        normalisation=Normalisation(),
        resume=True,
    )
    assert resumed == metrics_of(run)
    assert (broken / "history.csv").read_text() == (run / "history.csv").read_text()
    assert not (broken / "features").exists()


def test_a_grid_is_searched_with_the_backbone_frozen_and_its_best_is_trained(
    data, network, tmp_path
):
    grid = {
        "batch_size": Choices(rungs=(16,), first=0, last=0),
        "learning_rate": Choices(rungs=(1e-5, 1e-2), first=0, last=1),
        "dropout": Choices(rungs=(0.0, 0.5), first=0, last=1),
    }
    folder = tmp_path / "grid"
    metrics = train_transfer(
        data, folder, network=network, frozen=FREEZING, tuning=None, grid=grid, retrain=True
    )
    with (folder / "search.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4
    best = min(rows, key=lambda row: float(row["value"]))
    assert metrics["head"]["learning_rate"] == float(best["learning_rate"])
    assert metrics["head"]["dropout"] == float(best["dropout"])
    # The same parameters and seed give the trial's network again.
    assert metrics["val_loss"][FROZEN] == pytest.approx(float(best["value"]), abs=1e-9)
    model = keras.models.load_model(folder / "model.keras")
    assert model.get_layer("head_dropout").rate == metrics["head"]["dropout"]


def test_a_run_is_neither_overwritten_nor_resumed_with_another_configuration(data, network, run):
    with pytest.raises(ConfigError, match="holds a run already"):
        train_transfer(data, run, network=network, frozen=FREEZING, tuning=TUNING)
    with pytest.raises(ConfigError, match=r"another configuration \(network\)"):
        train_transfer(
            data,
            run,
            network=replace(network, dropout=0.5),
            frozen=FREEZING,
            tuning=TUNING,
            normalisation=Normalisation(),
            resume=True,
        )
    with pytest.raises(ConfigError, match="nothing to train"):
        train_transfer(data, run, network=network, frozen=None, tuning=None)


def test_the_bundle_answers_and_explains_as_the_trained_network_does(data, run, tmp_path):
    arguments = ["--name", "toy", "--version", "0.1.0", "-o", str(tmp_path), "--data", str(data)]
    result = CliRunner().invoke(main, ["export", str(run), *arguments])
    assert result.exit_code == 0, result.output
    card = (tmp_path / "toy-0.1.0" / "card.md").read_text()
    assert "backbone efficientnet-lite0, starting weights `small.keras`" in card
    assert f"Kept: the {metrics_of(run)['phase']} network" in card
    assert f"fixed on the {metrics_of(run)['calibrated_on']}." in card
    assert "learnt from train and two thirds of val" in card
    assert "8 x 8 cells" in card


def test_the_command_trains_on_a_file_and_says_what_came_out(data, network, tmp_path):
    arguments = ["--backbone", "efficientnet-lite0", "--weights", network.weights, "--size", "32"]
    arguments += ["--freeze-epochs", "1", "--copies", "1", "--epochs", "0", "--json"]
    out = tmp_path / "run"
    result = CliRunner().invoke(
        main, ["train", "transfer", str(data), "--out", str(out), *arguments]
    )
    assert result.exit_code == 0, result.output
    metrics = json.loads(result.stdout)
    assert (metrics["phase"], metrics["epochs"]) == (FROZEN, 1)


def test_the_command_says_what_is_wrong_in_one_line(data, tmp_path):
    def refused(*arguments):
        command = ["train", "transfer", str(data), "--out", str(tmp_path / "run"), *arguments]
        result = CliRunner().invoke(main, command)
        assert result.exit_code != 0
        assert "Traceback" not in result.output
        return result.stderr

    assert "all' nor a number" in refused("--unfreeze", "some")
    assert "no backbone 'resnet5'" in refused("--backbone", "resnet5")
    nowhere = refused("--backbone", "efficientnet-lite0", "--weights", "nowhere.keras")
    assert "no such model" in nowhere
    assert not (tmp_path / "run").exists()
