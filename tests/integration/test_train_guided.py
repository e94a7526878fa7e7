"""Lungs are found, and a network is guided to them: trained, resumed, explained, exported."""

import csv
import json

import cv2
import numpy as np
import pytest
from click.testing import CliRunner

from lungwatch.cli.main import main
from lungwatch.training.fitting.trainer import Trainer

keras = pytest.importorskip("keras", reason="needs Keras (extra 'train')")
pytest.importorskip("tensorflow", reason="needs TensorFlow (extra 'train')")
pytest.importorskip("tf2onnx", reason="needs tf2onnx (extra 'train')")


def chest(rng: np.random.Generator, *, opaque: bool) -> tuple[np.ndarray, np.ndarray]:
    """A grey body with two dark lungs; with haze in them, and where they are."""
    y, x = np.mgrid[0:96, 0:96] / 96
    dx, dy, size = rng.uniform(-0.04, 0.04), rng.uniform(-0.04, 0.04), rng.uniform(0.9, 1.1)
    lungs = np.zeros((96, 96), bool)
    for middle in (0.3, 0.7):
        lungs |= np.hypot((x - middle - dx) / 0.14, (y - 0.5 - dy) / 0.3) < size
    image = np.where(lungs, 60.0, 170.0) + rng.normal(0, 12, lungs.shape)
    if opaque:
        image += 60 * lungs * np.hypot(x - rng.uniform(0.3, 0.7), y - 0.6)
    return np.clip(image, 0, 255).astype(np.uint8), lungs.astype(np.uint8) * 255


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Masked pairs and a data set of two sources, by a manifest."""
    root = tmp_path_factory.mktemp("guided")
    rng = np.random.default_rng(0)
    for place in ("masks/images", "masks/masks", "data"):
        (root / place).mkdir(parents=True)
    for index in range(24):
        image, lungs = chest(rng, opaque=bool(index % 2))
        assert cv2.imwrite(str(root / f"masks/images/{index:02d}.png"), image)
        assert cv2.imwrite(str(root / f"masks/masks/{index:02d}.png"), lungs)
    rows = []
    for split, count in (("train", 8), ("val", 4), ("test", 4)):
        for source in ("north", "south"):
            for finding in ("COVID", "NORMAL", "OTHER_PNEUMONIA"):
                for index in range(count):
                    name = f"{split}-{source}-{finding}-{index}.png"
                    image, _ = chest(rng, opaque=finding != "NORMAL")
                    assert cv2.imwrite(str(root / "data" / name), image)
                    rows.append((name, finding, split, source))
    with (root / "data" / "manifest.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("file", "label", "split", "source"))
        writer.writerows(rows)
    return root


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    """A small network with maps of 4, 8 and 16 input pixels a cell."""
    keras.utils.set_random_seed(3)
    picture = keras.Input((64, 64, 3))
    x = picture
    for filters in (8, 12, 16, 16):
        x = keras.layers.Conv2D(filters, 3, strides=2, padding="same", activation="relu")(x)
    x = keras.layers.Dense(3)(keras.layers.GlobalAveragePooling2D()(x))
    file = tmp_path_factory.mktemp("weights") / "small.keras"
    keras.Model(picture, x).save(file)
    return file


def run(*words) -> str:
    done = CliRunner().invoke(main, [str(word) for word in words])
    assert done.exit_code == 0, done.output
    return done.output


@pytest.fixture(scope="module")
def lungs(folder):
    out = folder / "lungs"
    run("train", "lungs", folder / "masks", "--out", out, "--epochs", 12, "--batch-size", 4)
    return out


@pytest.fixture(scope="module")
def words(folder, backbone, lungs):
    return (
        *("train", "guided", folder / "data", "--lungs", lungs, "--weights", backbone),
        *("--backbone", "efficientnet-lite0", "--size", 64, "--stride", 8, "--batch-size", 12),
        *("--leaks", "allow", "--learning-rate", 3e-3),
    )


@pytest.fixture(scope="module")
def guided(words, folder):
    out = folder / "guided"
    run(*words, "--epochs", 2, "--out", out)
    return out


def test_the_segmenter_finds_lungs_it_never_saw(lungs):
    """Dice on held-out pairs, and a run folder with nothing left over."""
    metrics = json.loads((lungs / "metrics.json").read_text())
    assert metrics["train"] + metrics["val"] == 24
    assert metrics["dice"] > 0.8
    assert not list(lungs.glob("checkpoint-*"))


def test_an_interrupted_segmenter_goes_on_to_the_same_numbers(folder, lungs, monkeypatch):
    """Cut off after the second epoch, then resumed: the same history and the same Dice."""
    real, calls = Trainer._train, []

    def cut_off(*arguments):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(1)
        return real(*arguments)

    out = folder / "lungs-cut"
    words = ("train", "lungs", folder / "masks", "--out", out, "--epochs", 12, "--batch-size", 4)
    monkeypatch.setattr(Trainer, "_train", cut_off)
    assert CliRunner().invoke(main, [str(w) for w in words]).exit_code != 0
    monkeypatch.setattr(Trainer, "_train", real)
    run(*words, "--resume")
    assert (out / "history.csv").read_text() == (lungs / "history.csv").read_text()
    assert (out / "metrics.json").read_text() == (lungs / "metrics.json").read_text()


def test_the_backbone_is_cut_at_the_finer_map(guided):
    """Eight pixels a cell at 64 pixels are eight cells; all epochs ran and the last is kept."""
    model = keras.models.load_model(guided / "model.keras")
    assert model.get_layer("features").output.shape[1:] == (8, 8, 16)
    metrics = json.loads((guided / "metrics.json").read_text())
    assert metrics["epochs"] == metrics["best_epoch"] == 2
    assert "OTHER_PNEUMONIA vs NORMAL within north" not in metrics["test"]["probes"]
    assert "COVID vs NORMAL" in metrics["test"]["probes"]


def test_the_same_seed_gives_the_same_network(words, folder, guided):
    """Frames, disguises and steps draw their chance from the seed alone."""
    again = folder / "again"
    run(*words, "--epochs", 2, "--out", again)
    for name in ("history.csv", "metrics.json"):
        assert (again / name).read_text() == (guided / name).read_text()


def test_a_source_left_out_teaches_nothing(words, folder):
    """Its images are in neither training nor validation, and are named if there are none."""
    out = folder / "without"
    run(*words, "--epochs", 1, "--leave-out", "south", "--out", out)
    config = json.loads((out / "config.json").read_text())
    assert set(config["data"]["train"]) == {
        f"north/{finding}" for finding in ("COVID", "NORMAL", "OTHER_PNEUMONIA")
    }
    metrics = json.loads((out / "metrics.json").read_text())
    # All 16 of each finding of the source, and 4 test images of the other's.
    probe = metrics["left_out"]["probes"]["COVID vs NORMAL"]
    assert (probe["positives"], probe["negatives"]) == (16, 16 + 4)
    refused = CliRunner().invoke(
        main, [str(w) for w in (*words, "--leave-out", "west", "--out", folder / "none")]
    )
    assert refused.exit_code == 1
    assert "west" in refused.output
    joint, places = folder / "joint", ("--data", folder / "data", "--leaks", "allow")
    run("train", "join", out, out, *places, "--leave-out", "south", "--out", joint)
    found = json.loads((joint / "metrics.json").read_text())["left_out"]["probes"]
    assert found["COVID vs NORMAL"] == pytest.approx(probe)
    words = ("train", "join", out, out, *places, "--out", folder / "none")
    refused = CliRunner().invoke(main, [str(word) for word in words])
    assert refused.exit_code == 1
    assert "--leave-out south" in refused.output


def test_what_is_no_segmenter_is_refused(words, folder, guided):
    """A classifier does not find lungs, and the message says what would."""
    changed = [guided if word == folder / "lungs" else word for word in words]
    refused = CliRunner().invoke(main, [str(w) for w in (*changed, "--out", folder / "wrong")])
    assert refused.exit_code == 1
    assert "train lungs" in refused.output


def test_a_guided_network_exports_with_its_maps(guided, folder):
    """The run folder becomes a bundle with the finer maps and a card that says how it was made."""
    run(
        *("export", guided, "--name", "toy", "--version", "1.0.0", "-o", folder / "models"),
        *("--data", folder / "data"),
    )
    shown = run("model", "show", folder / "models" / "toy-1.0.0", "--json")
    assert json.loads(shown)["cam_side_px"] == 8
    card = (folder / "models" / "toy-1.0.0" / "card.md").read_text()
    assert "Guided to the lungs: backbone efficientnet-lite0, cut at 8 pixels a cell" in card
    assert "the last weights of 2 epochs are kept." in card


def test_robust_training_goes_on_to_the_same_numbers(words, folder, monkeypatch):
    """Group weights and the adversary are kept beside the checkpoint, its optimiser included."""
    extra = ("--group-robust", 0.1, "--domain-adversarial", 0.3, "--exchange-histograms", 0.3)
    words = (*words, *extra, "--epochs", 2)
    whole, cut = folder / "robust", folder / "robust-cut"
    run(*words, "--out", whole)
    real, calls = Trainer._train, []

    def cut_off(*arguments, **options):
        if calls:
            raise KeyboardInterrupt
        calls.append(1)
        return real(*arguments, **options)

    monkeypatch.setattr(Trainer, "_train", cut_off)
    assert CliRunner().invoke(main, [str(w) for w in (*words, "--out", cut)]).exit_code != 0
    assert list(cut.glob("checkpoint-*.memory.npz"))
    monkeypatch.setattr(Trainer, "_train", real)
    run(*words, "--out", cut, "--resume")
    for name in ("history.csv", "metrics.json", "group_weights.csv"):
        assert (cut / name).read_text() == (whole / name).read_text()
    assert not list(cut.glob("*.npz"))
    with (whole / "group_weights.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row.pop("epoch") for row in rows] == ["1", "2"]
    assert all(sum(map(float, row.values())) == pytest.approx(1.0, abs=1e-4) for row in rows)
    assert "source_loss" in (whole / "history.csv").read_text().splitlines()[0]
