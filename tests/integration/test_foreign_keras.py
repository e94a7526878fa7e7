"""Keras networks of another make: declared, they give scikit-learn's figures; else refused."""

import json

import cv2
import numpy as np
import pytest
from click.testing import CliRunner

pytest.importorskip("tensorflow", reason="needs TensorFlow (extra 'train')")
metrics = pytest.importorskip("sklearn.metrics", reason="needs scikit-learn (extra 'train')")

import keras  # noqa: E402

from lungwatch.cli.main import main  # noqa: E402

SIDE = 64
# The range of the input as `--input-range` names it, and as somebody else would write it.
RANGES = {
    "0..255": lambda grey: grey,
    "-1..1": lambda grey: grey / 127.5 - 1.0,
    "0.5,0.4,0.3/0.25,0.2,0.5": lambda grey: (
        (grey / 255.0 - np.array([0.5, 0.4, 0.3])) / np.array([0.25, 0.2, 0.5])
    ),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Pictures of the networks' own size, so that nothing is resized; COVID brighter."""
    folder = tmp_path_factory.mktemp("data") / "drawn"
    rng = np.random.default_rng(3)
    for split, count in (("val", 10), ("test", 12)):
        for label, grey in (("COVID", 128), ("NORMAL", 118), ("OTHER_PNEUMONIA", 122)):
            place = folder / split / label
            place.mkdir(parents=True)
            for index in range(count):
                image = rng.normal(grey + rng.normal(0, 12), 40, (SIDE, SIDE))
                image = np.clip(image, 0, 255).astype(np.uint8)
                image[0, :2] = 0, 255
                assert cv2.imwrite(str(place / f"{index}.png"), image)
    return folder


def layers(kind, units, activation):
    last = keras.layers.Dense(units, activation=activation)
    convolution = keras.layers.Conv2D(6, 3, strides=2, activation="relu")
    pooled = keras.layers.GlobalAveragePooling2D()
    if kind == "rescaled, flattened":
        return [keras.layers.Rescaling(1 / 255), convolution, keras.layers.Flatten(), last]
    if kind == "pooled":
        return [convolution, pooled, keras.layers.Dropout(0.3), last]
    hidden = keras.layers.Dense(5, activation="relu")
    return [convolution, pooled, hidden, keras.layers.Dropout(0.3), last]


NETWORKS = {
    "sigmoid": ("rescaled, flattened", 1, "sigmoid", ("sigmoid", "0..255", 3)),
    "softmax": ("pooled", 2, "softmax", ("softmax:1", "-1..1", 1)),
    "logit": ("pooled, hidden", 1, None, ("logit", "0.5,0.4,0.3/0.25,0.2,0.5", 3)),
    "of three": ("pooled", 3, "softmax", ("softmax:2", "0..255", 1)),
}


def make(name, path, seed=1):
    kind, units, activation, (_, _, channels) = NETWORKS[name]
    keras.utils.set_random_seed(seed)
    model = keras.Sequential(
        [keras.Input((SIDE, SIDE, channels)), *layers(kind, units, activation)]
    )
    model.compile("adam", "mse")
    model.save(path)
    return model


def options(output, input_range, channels):
    return ["--output", output, "--input-range", input_range, "--channels", str(channels)]


def own_predictions(model, data, split, name):
    """What somebody without lungwatch gets of the network: files, truth, probability."""
    output, input_range, channels = NETWORKS[name][3]
    truth, images = [], []
    for path in sorted((data / split).glob("*/*.png")):
        grey = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE).astype(np.float32)
        images.append(RANGES[input_range](np.repeat(grey[:, :, None], channels, axis=2)))
        truth.append(path.parent.name == "COVID")
    found = model.predict(np.stack(images).astype(np.float32), verbose=0).astype(np.float64)
    if output == "logit":
        return np.array(truth), 1 / (1 + np.exp(-found[:, 0]))
    return np.array(truth), found[:, int(output.partition(":")[2] or 0)]


def invoke(*arguments):
    return CliRunner().invoke(main, list(map(str, arguments)))


@pytest.mark.parametrize("name", NETWORKS)
def test_evaluate_gives_what_scikit_learn_gives_of_the_networks_own_predictions(
    name, data, tmp_path
):
    file = tmp_path / "net.keras"
    model = make(name, file)
    truth, p = own_predictions(model, data, "test", name)
    result = invoke(
        "evaluate", file, data, *options(*NETWORKS[name][3]), "--bootstrap", 0, "--json"
    )
    assert result.exit_code == 0, result.output
    (found,) = json.loads(result.stdout)
    called = p >= 0.5
    expected = {
        "roc_auc": metrics.roc_auc_score(truth, p),
        "pr_auc": metrics.average_precision_score(truth, p),
        "accuracy": metrics.accuracy_score(truth, called),
        "sensitivity": metrics.recall_score(truth, called),
        "specificity": metrics.recall_score(~truth, ~called),
        "f1": metrics.f1_score(truth, called),
        "brier": metrics.brier_score_loss(truth, p),
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("name", ["softmax", "logit"])
def test_an_exported_foreign_network_ranks_as_it_did(name, data, tmp_path):
    file = tmp_path / "net.keras"
    for seed in range(1, 30):  # a network that scores COVID higher: others are not exported
        model = make(name, file, seed)
        scores = [own_predictions(model, data, split, name) for split in ("val", "test")]
        areas = [metrics.roc_auc_score(*one) for one in scores]
        if min(areas) > 0.6:
            break
    out = ["--name", "net", "--version", "1.0.0", "-o", tmp_path, "--data", data]
    result = invoke("export", file, *out, *options(*NETWORKS[name][3]), "--json")
    assert result.exit_code == 0, result.output
    measured = json.loads(result.stdout)["metrics"]
    assert measured["drawn/test"]["roc_auc"] == pytest.approx(areas[1], abs=1e-6)
    evaluated = invoke("evaluate", tmp_path / "net-1.0.0", data, "--bootstrap", 0, "--json")
    assert json.loads(evaluated.stdout)[0]["roc_auc"] == pytest.approx(areas[1], abs=1e-6)
    assert "declared" in (tmp_path / "net-1.0.0" / "card.md").read_text()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    for name in NETWORKS:
        make(name, folder / f"{name}.keras")
    return folder


@pytest.mark.parametrize("command", ["evaluate", "export"])
def test_an_undeclared_network_is_refused_naming_the_options(command, files, data, tmp_path):
    out = ["--name", "n", "--version", "1.0.0", "-o", tmp_path] if command == "export" else []
    arguments = ["--data", data] if command == "export" else [data]
    result = invoke(command, files / "sigmoid.keras", *arguments, *out)
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert all(option in line for option in ("--output", "--input-range", "--channels"))
    partly = invoke(command, files / "sigmoid.keras", *arguments, *out, "--output", "sigmoid")
    assert "--input-range, --channels missing" in partly.stderr


@pytest.mark.parametrize(
    ("name", "declared", "message"),
    [
        ("softmax", ("softmax:2", "-1..1", 1), "index 0 to 1"),
        ("softmax", ("sigmoid", "-1..1", 1), "has 2 outputs; give softmax:INDEX"),
        ("softmax", ("softmax:1", "-1..1", 3), "--channels 3: softmax takes 1"),
        ("sigmoid", ("softmax:0", "0..255", 3), "so no softmax"),
        ("sigmoid", ("logit", "0..255", 3), "the last layer of sigmoid gives a sigmoid"),
        ("sigmoid", ("sigmoid", "0..1", 3), "so it takes 0..255"),
        ("sigmoid", ("sigmoid", "0..255", 1), "--channels 1: sigmoid takes 3"),
        ("logit", ("sigmoid", "0..1", 3), "the last layer of logit gives a logit"),
        ("logit", ("logit", "0..2", 3), "--input-range '0..2'"),
        ("logit", ("logit", "0.5,0.5/0.2,0.2", 3), "has 2 channels, --channels 3"),
        ("logit", ("tanh", "0..1", 3), "--output 'tanh'"),
    ],
)
def test_a_declaration_that_contradicts_the_network_is_refused(
    name, declared, message, files, data
):
    result = invoke("evaluate", files / f"{name}.keras", data, *options(*declared))
    assert result.exit_code == 1, result.output
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_what_cannot_be_exported_with_its_maps_says_why(files, data, tmp_path):
    out = ["--name", "n", "--version", "1.0.0", "-o", tmp_path, "--data", data]
    flat = invoke("export", files / "sigmoid.keras", *out, *options("sigmoid", "0..255", 3))
    assert "only networks that end in GlobalAveragePooling2D" in flat.stderr
    three = invoke("export", files / "of three.keras", *out, *options("softmax:2", "0..255", 1))
    assert "has 3 classes" in three.stderr
