"""A backbone pretrained on X-rays of any classes serves transfer learning."""

import json
from dataclasses import replace

import cv2
import numpy as np
import pytest

from lungwatch.errors import ConfigError, DatasetError
from lungwatch.training.data.dataset import load_labelled
from lungwatch.training.fitting.run import Progress

keras = pytest.importorskip("keras", reason="needs Keras (extra 'train')")
pytest.importorskip("tensorflow", reason="needs TensorFlow (extra 'train')")

from lungwatch.training.fitting.trainer import FitConfig  # noqa: E402
from lungwatch.training.networks.backbones import (  # noqa: E402
    BACKBONE,
    Normalisation,
    load_backbone,
)
from lungwatch.training.recipes.pretrain import (  # noqa: E402
    PretrainConfig,
    parse_tasks,
    train_pretrain,
)

FITTING = FitConfig(epochs=2, batch_size=8, patience=2, seed=5)
TASKS = {"finding": 1.0, "covid": 0.5, "source": 0.25}


def fill(folder, classes, seed):
    rng = np.random.default_rng(seed)
    for place, level in classes.items():
        (folder / place).mkdir(parents=True)
        for index in range(8):
            image = np.clip(rng.normal(level, 25, (72, 72)), 0, 255).astype(np.uint8)
            assert cv2.imwrite(str(folder / place / f"{index}.png"), image)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two data sets, split, with classes in common and classes of their own."""
    root = tmp_path_factory.mktemp("data")
    one = {
        f"{split}/{c}": 80 + 60 * (c == "COVID")
        for split in ("train", "val")
        for c in ("COVID", "NORMAL")
    }
    two = {
        f"{split}/{c}": 100 + 40 * (c == "effusion")
        for split in ("train", "val")
        for c in ("NORMAL", "effusion")
    }
    return fill(root / "one", one, 1), fill(root / "two", two, 2)


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    keras.utils.set_random_seed(3)
    picture = keras.Input((24, 24, 3))
    x = keras.layers.Conv2D(8, 3, strides=2, padding="same", use_bias=False)(picture)
    x = keras.layers.BatchNormalization()(x)
    x = keras.layers.ReLU()(x)
    file = tmp_path_factory.mktemp("weights") / "small.keras"
    keras.Model(picture, x).save(file)
    return PretrainConfig(backbone="efficientnet-lite0", weights=str(file), size_px=32)


def pretrain(data, folder, network, **changes):
    values = {"task_weights": TASKS, "fitting": FITTING, "normalisation": Normalisation()}
    return train_pretrain(data, folder, network=network, **(values | changes))


@pytest.fixture(scope="module")
def run(data, network, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "first"
    pretrain(data, folder, network)
    return folder


def test_every_task_has_its_answers_and_figures(run):
    found = json.loads((run / "metrics.json").read_text())["validation"]
    assert found["finding"]["answers"] == ["COVID", "NORMAL", "effusion"]
    assert found["covid"]["answers"] == ["COVID", "not COVID"]
    assert found["source"]["answers"] == ["one", "two"]
    assert all(task["images"] == 32 for task in found.values())


def test_the_run_is_a_backbone_with_moved_weights_and_statistics(run, network):
    before = load_backbone(network.backbone, network.weights, 32).model.get_weights()
    after = load_backbone(network.backbone, str(run), 32).model
    assert after.name == BACKBONE
    for now, then in zip(after.get_weights(), before, strict=True):
        assert np.abs(now - then).max() > 0


def test_interrupted_it_resumes_to_the_same_metrics(data, network, run, tmp_path):
    def interrupt(epoch, batch, batches):
        if (epoch, batch) == (2, 2):
            raise KeyboardInterrupt

    broken = tmp_path / "broken"
    with pytest.raises(KeyboardInterrupt):
        pretrain(data, broken, network, progress=Progress(on_batch=interrupt))
    resumed = pretrain(data, broken, network, resume=True)
    assert resumed == json.loads((run / "metrics.json").read_text())
    with pytest.raises(ConfigError, match=r"another configuration \(fit\)"):
        pretrain(data, broken, network, fitting=replace(FITTING, seed=6), resume=True)


def test_what_is_not_split_is_split_by_itself_and_always_alike(tmp_path):
    rows = "".join(f"{n}.png,x{n % 2},p{n // 2}\n" for n in range(80))
    (tmp_path / "manifest.csv").write_text("file,label,patient\n" + rows)
    for number in range(80):
        (tmp_path / f"{number}.png").touch()
    samples = load_labelled(tmp_path)
    assert samples == load_labelled(tmp_path)
    patients = {
        split: {s.patient for s in samples if s.split == split} for split in ("train", "val")
    }
    assert patients["val"]
    assert not patients["train"] & patients["val"]


def test_what_cannot_be_learnt_is_refused_with_a_reason(data, network, tmp_path):
    with pytest.raises(ConfigError, match="of finding, covid, source"):
        parse_tasks(["age"])
    with pytest.raises(ConfigError, match="NAME=WEIGHT"):
        parse_tasks(["covid=-1"])
    assert parse_tasks(["covid=0.5", "source"]) == {"covid": 0.5, "source": 1.0}
    with pytest.raises(DatasetError, match="every image has the answer one"):
        pretrain(data[:1], tmp_path / "run", network)
    with pytest.raises(DatasetError, match="nowhere"):
        load_labelled(tmp_path / "nowhere")
    only = fill(tmp_path / "only", {"train/A": 90, "train/B": 120}, 3)
    with pytest.raises(DatasetError, match="'val'"):
        load_labelled(only)
    assert not (tmp_path / "run").exists()
