"""A content gate is trained, interrupted, resumed, exported and put into a bundle."""

import csv
import json
import shutil
from importlib import resources
from pathlib import Path

import cv2
import numpy as np
import pytest
from click.testing import CliRunner

from lungwatch.bundle import read_bundle
from lungwatch.cli.main import main
from lungwatch.contract import GATE_LUNGS, GATE_SCORES
from lungwatch.daemon.pipeline.model import Classifier
from lungwatch.models import SHIPPED_DEFAULT

keras = pytest.importorskip("keras", reason="needs Keras (extra 'train')")
pytest.importorskip("tensorflow", reason="needs TensorFlow (extra 'train')")
pytest.importorskip("tf2onnx", reason="needs tf2onnx (extra 'train')")

MODELS = Path(str(resources.files("lungwatch.models")))
RESULTS = ("history.csv", "metrics.json")


def chest(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A grey body with two dark lungs, and where they are."""
    y, x = np.mgrid[0:96, 0:96] / 96
    dx, dy, size = rng.uniform(-0.04, 0.04), rng.uniform(-0.04, 0.04), rng.uniform(0.9, 1.1)
    lungs = np.zeros((96, 96), bool)
    for middle in (0.3, 0.7):
        lungs |= np.hypot((x - middle - dx) / 0.14, (y - 0.5 - dy) / 0.3) < size
    image = np.where(lungs, 60.0, 170.0 - 60 * y) + rng.normal(0, 12, lungs.shape)
    return np.clip(image, 0, 255).astype(np.uint8), lungs.astype(np.uint8) * 255


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Lung masks, and a data set of two sources of which one training image is a test image."""
    root = tmp_path_factory.mktemp("gate")
    rng = np.random.default_rng(0)
    for place in ("masks/images", "masks/masks", "data"):
        (root / place).mkdir(parents=True)
    for index in range(12):
        image, lungs = chest(rng)
        assert cv2.imwrite(str(root / f"masks/images/{index:02d}.png"), image)
        assert cv2.imwrite(str(root / f"masks/masks/{index:02d}.png"), lungs)
    rows = []
    for split, count in (("train", 8), ("val", 4), ("test", 3)):
        for source in ("north", "south"):
            for index in range(count):
                name = f"{split}-{source}-{index}.png"
                image, _ = chest(rng)
                assert cv2.imwrite(str(root / "data" / name), image)
                # One patient of the north is trained on and tested.
                patient = "7" if (split, index) in {("train", 0), ("test", 0)} else ""
                rows.append((name, "NORMAL", split, source, patient))
    with (root / "data" / "manifest.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("file", "label", "split", "source", "patient"))
        writer.writerows(rows)
    return root


def small_network(size_px: int, *, imagenet: bool):
    """The same answers from a network that is quick to build."""
    layers = keras.layers
    pixels = keras.Input((size_px, size_px, 1), name="pixels")
    x = layers.Conv2D(8, 3, strides=4, padding="same", activation="relu")(pixels)
    pooled = layers.GlobalAveragePooling2D(name="embedding")(
        layers.Conv2D(12, 3, strides=2, padding="same", activation="relu")(x)
    )
    hidden = layers.Dropout(0.2, name="dropout")(pooled)
    return keras.Model(
        pixels,
        {
            "frontal": layers.Dense(1, name="frontal")(hidden),
            "turn": layers.Dense(4, name="turn")(hidden),
            "inverted": layers.Dense(1, name="inverted")(hidden),
            "lungs": layers.Conv2D(1, 1, name="lungs")(x),
        },
    )


def words(folder: Path, out: Path, *more: str) -> list[str]:
    return [
        *("train", "gate", str(folder / "data"), "--masks", str(folder / "masks")),
        *("--out", str(out), "--size", "64", "--mask-steps", "5", "--steps", "7"),
        *("--batch-size", "8", "--checkpoint-steps", "3", "--random-start", *more),
    ]


def run(*arguments: str) -> str:
    done = CliRunner().invoke(main, list(map(str, arguments)))
    assert done.exit_code == 0, done.output
    return done.output


@pytest.fixture
def network(monkeypatch):
    from lungwatch.training.recipes import lungs

    monkeypatch.setattr(lungs, "build_gate_network", small_network)
    return lungs


def test_an_interrupted_training_goes_on_to_the_same_numbers(folder, network, monkeypatch):
    """Cut off in the second phase, then resumed: the same history, weights and rates."""
    whole, cut = folder / "whole", folder / "cut"
    said = run(*words(folder, whole))
    assert "validation, turned by 90°" in said
    real, calls = network.train_on, []

    def cut_off(*arguments):
        if len(calls) == 10:
            raise KeyboardInterrupt
        calls.append(1)
        return real(*arguments)

    monkeypatch.setattr(network, "train_on", cut_off)
    assert CliRunner().invoke(main, words(folder, cut)).exit_code != 0
    last = json.loads((cut / "state.json").read_text())["history"][-1]
    assert (last["phase"], last["step"]) == (2, 3)
    monkeypatch.setattr(network, "train_on", real)
    assert CliRunner().invoke(main, words(folder, cut)).exit_code == 1, "it is not resumed unasked"
    run(*words(folder, cut, "--resume"))
    for name in RESULTS:
        assert (cut / name).read_text() == (whole / name).read_text()
    first, second = (keras.models.load_model(place / "model.keras") for place in (whole, cut))
    for one, other in zip(first.get_weights(), second.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)
    assert sorted(path.name for path in whole.iterdir()) == [
        "config.json",
        "data.csv",
        "environment.json",
        "history.csv",
        "learnt.json",
        "metrics.json",
        "model.keras",
        "state.json",
    ]
    with (whole / "history.csv").open(newline="") as file:
        steps = [(row["phase"], row["step"]) for row in csv.DictReader(file)]
    assert steps == [("1", "3"), ("1", "5"), ("2", "3"), ("2", "6"), ("2", "7")]


def test_a_source_left_out_and_what_leaks_teach_nothing(folder, network):
    out = folder / "without"
    run(*words(folder, out, "--leave-out", "south"))
    data = json.loads((out / "config.json").read_text())["data"]
    assert data["left_out"] == ["south"]
    # Eight of the north, less the patient that is tested, and perhaps a caricature too alike.
    assert data["dropped"] >= 1
    assert data["train"] == {"north/NORMAL": 8 - data["dropped"]}
    assert data["val"] == {"north/NORMAL": 4}
    assert data["masks"]["train"] + data["masks"]["held_out"] == 12 - data["masks"]["dropped"]
    rates = json.loads((out / "metrics.json").read_text())["rates"]
    assert rates["left out"]["pictures"] == 8 + 4 + 3
    assert set(rates) >= {"validation, inverted", "drawn and cut", "left out, turned by 180°"}
    refused = CliRunner().invoke(main, words(folder, folder / "no", "--leave-out", "west"))
    assert refused.exit_code == 1
    assert "no source 'west'" in refused.output


@pytest.fixture(scope="module")
def real_network():
    """The gate's own architecture with random weights, at a small size."""
    from lungwatch.training.networks.lungs import build_gate_network

    keras.utils.set_random_seed(4)
    return build_gate_network(64, imagenet=False)


def test_the_real_network_learns_and_ignores_what_is_unknown(real_network):
    """Turn, inversion and lungs of what is no chest, and lungs that nobody drew, teach nothing."""
    from lungwatch.training.data.gate_images import GateBatch
    from lungwatch.training.networks.lungs import LUNGS_CELL_PX, compile_gate, train_on

    assert LUNGS_CELL_PX == 4
    assert real_network.output["lungs"].shape[1:] == (16, 16, 1)
    rng = np.random.default_rng(0)

    def batch(turn: int, lungs: float) -> GateBatch:
        return GateBatch(
            pixels=pixels,
            frontal=np.zeros((4, 1), np.float32),
            turn=np.eye(4, dtype=np.float32)[[turn] * 4],
            inverted=np.full((4, 1), float(turn > 0), np.float32),
            is_chest=np.zeros(4, np.float32),
            lungs=np.full((4, 16, 16, 1), lungs, np.float32),
            has_lungs=np.zeros(4, np.float32),
        )

    pixels = rng.random((4, 64, 64, 1), dtype=np.float32)
    start = real_network.get_weights()
    compile_gate(real_network, 1e-3, 0.0, steps=3)
    real_network.run_eagerly = True  # tracing the step would take longer than the three
    first, second = (train_on(real_network, batch(0, 0.0), (1, step)) for step in range(2))
    assert second < first
    real_network.set_weights(start)
    assert train_on(real_network, batch(3, 1.0), (1, 0)) == pytest.approx(first, rel=1e-5)


def test_the_exported_graph_answers_as_network_and_scores_say(real_network):
    """The float graph against Keras to 1e-4, its scores against NumPy's."""
    from lungwatch.export.gate import gate_to_onnx, look_with_onnx, with_scores
    from lungwatch.training.evaluation.gate_rates import Familiarity, GateThresholds
    from lungwatch.training.evaluation.scorers import onnx_session
    from lungwatch.training.networks.lungs import gate_output_network, gate_outputs

    pixels = np.random.default_rng(1).random((9, 64, 64, 1), dtype=np.float32)
    proto = gate_to_onnx(real_network)
    ours = look_with_onnx(onnx_session(proto.SerializeToString(), "float"), pixels)
    theirs = gate_outputs(gate_output_network(real_network), pixels)
    for name in ("chances", "embedding", "lungs"):
        np.testing.assert_allclose(getattr(ours, name), getattr(theirs, name), atol=1e-4)
    familiarity = Familiarity.of(theirs.embedding[:6])
    thresholds = GateThresholds(
        frontal=0.7, upright=0.8, polarity=0.8, distance=5.0, lung_area=(0.1, 0.6)
    )
    session = onnx_session(
        with_scores(proto, familiarity, thresholds).SerializeToString(), "scores"
    )
    assert [output.name for output in session.get_outputs()] == [GATE_SCORES, GATE_LUNGS]
    scores, lungs = session.run(None, {"pixels": pixels})
    np.testing.assert_allclose(scores, thresholds.scores(ours, familiarity), atol=1e-4)
    np.testing.assert_array_equal(lungs, ours.lungs)


def test_a_gate_that_has_learnt_nothing_is_not_exported(folder, network, tmp_path):
    out = folder / "early"
    run(*words(folder, out))
    shipped = MODELS / SHIPPED_DEFAULT
    refused = CliRunner().invoke(
        main,
        [
            *("model", "renew", str(shipped), "--version", "9.0.0", "-o", str(tmp_path)),
            *("--gate", str(out), "--data", str(folder / "data")),
        ],
    )
    assert refused.exit_code == 1
    assert "train it longer" in refused.output
    assert not list(tmp_path.iterdir())


def test_a_bundle_is_renewed_with_the_gate_of_another_and_the_same_network(tmp_path):
    shipped = MODELS / SHIPPED_DEFAULT
    older = tmp_path / "older"
    shutil.copytree(shipped, older)
    run(*("model", "renew", older, "--version", "9.8.7", "-o", tmp_path, "--gate", shipped))
    before, after = Classifier.load(shipped), Classifier.load(tmp_path / "guided-9.8.7")
    assert after.contract.id == "guided-9.8.7"
    assert after.contract.golden == before.contract.golden
    assert after.contract.decision == before.contract.decision
    assert after.contract.gate == before.contract.gate
    assert after.contract.map_reference == before.contract.map_reference
    assert after.contract.provenance["network_of"] == SHIPPED_DEFAULT
    files = read_bundle(tmp_path / "guided-9.8.7")
    files.check_digests()
    assert files.gate == read_bundle(shipped).gate
    card = (files.card or b"").decode()
    assert f"its thresholds are those of {SHIPPED_DEFAULT}" in card
    assert "## Content gate" in card
    refused = CliRunner().invoke(
        main, ["model", "renew", str(older), "--version", "1", "-o", str(tmp_path)]
    )
    assert refused.exit_code == 1
    assert "not of the form 1.0.0" in refused.output
