"""A network of lung fields is trained and resumed; its findings are fitted and exported."""

import csv
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from click.testing import CliRunner

from lungwatch.cli.main import main
from lungwatch.preprocess import PreprocessSpec, preprocess
from lungwatch.training.data.dataset import Sample
from lungwatch.training.networks.heads import FEATURES, HIDDEN, LOGIT

keras = pytest.importorskip("keras", reason="needs Keras (extra 'train')")
pytest.importorskip("tensorflow", reason="needs TensorFlow (extra 'train')")
pytest.importorskip("tf2onnx", reason="needs tf2onnx (extra 'train')")

from lungwatch.training.fitting.augmentation import plain_view  # noqa: E402 - of the extra
from lungwatch.training.networks.heads import BOX  # noqa: E402
from lungwatch.training.networks.lungs import HIDDEN as CLASSES_HIDDEN  # noqa: E402
from lungwatch.training.networks.lungs import (  # noqa: E402
    POOLED,
    THREE,
    TRUNK,
    build_field_finder,
    cut_field,
    view_field,
)
from lungwatch.training.recipes.assembly import (  # noqa: E402
    OPACITY,
    PENALTIES,
    LinearHead,
    assemble,
    choose_penalty,
    fit_head,
    opacity_against_rest,
)

SIDE, VIEW_PX, CHANNELS = 64, 32, 12


def radiograph(rng, *, opaque):
    """Two dark lungs on a bright body, uint8 (72, 80); one has a bright spot if `opaque`."""
    y, x = np.mgrid[0:72, 0:80]
    image = np.full((72, 80), 190.0)
    for centre in (24, 56):
        image -= 140 * (((x - centre) / 13) ** 2 + ((y - 34) / 26) ** 2 < 1)
    if opaque:
        cx, cy = rng.choice([22, 58]) + rng.integers(-3, 4), 44 + rng.integers(-6, 7)
        image += 60 * np.exp(-(((x - cx) / 6.0) ** 2) - ((y - cy) / 6.0) ** 2)
    return np.clip(image + rng.normal(0, 6, image.shape), 0, 255).astype(np.uint8)


def manifest(root, rows):
    """Write a data set: (label, split, source, picture) a row."""
    root.mkdir()
    with (root / "manifest.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("file", "label", "split", "source"))
        for number, (label, split, source, picture) in enumerate(rows):
            assert cv2.imwrite(str(root / f"{number}.png"), picture)
            writer.writerow((f"{number}.png", label, split, source))


def small_fields(size_px: int, *, imagenet: bool):
    """The same answers from a network that is quick to build."""
    layers = keras.layers
    shown = keras.Input((size_px, size_px, 1), name="view")
    x = layers.Conv2D(8, 3, strides=2, padding="same", activation="relu")(shown)
    x = layers.Conv2D(CHANNELS, 3, strides=2, padding="same", activation="relu")(x)
    pooled = layers.GlobalAveragePooling2D(name=POOLED)(keras.Model(shown, x, name=TRUNK)(shown))
    hidden = layers.Dropout(0.3)(pooled)
    hidden = layers.Dense(6, activation="relu", name=CLASSES_HIDDEN)(hidden)
    return keras.Model(shown, layers.Dense(3, name=THREE)(hidden))


def dark_gate():
    """A network that takes for lung what is dark, at half the size of the X-rays."""
    pixels = keras.Input((SIDE // 2, SIDE // 2, 1), name="pixels")
    x = keras.layers.AveragePooling2D(2)(pixels)
    pooled = keras.layers.GlobalAveragePooling2D(name="embedding")(x)
    answers = {"frontal": 1, "turn": 4, "inverted": 1}
    heads = {name: keras.layers.Dense(units, name=name)(pooled) for name, units in answers.items()}
    heads["lungs"] = keras.layers.Conv2D(1, 1, name="lungs")(x)
    model = keras.Model(pixels, heads)
    model.get_layer("lungs").set_weights([np.full((1, 1, 1, 1), -30.0), np.array([15.0])])
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Ready fields, whole X-rays of three sources, and run folders of a gate and of fields."""
    root = tmp_path_factory.mktemp("findings")
    rng = np.random.default_rng(0)
    ready = []
    for split, count in (("train", 3), ("val", 2)):
        for label in ("NORMAL", "OTHER", "OPACITY"):
            for _ in range(count):
                picture = radiograph(rng, opaque=label == "OPACITY")
                ready.append((label, split, "r", np.where(picture > 150, 0, picture)))
    manifest(root / "ready", ready)
    whole = []
    for split, count in (("train", 10), ("val", 6), ("test", 6)):
        for label, sources in (
            ("COVID", ("a", "b")),
            ("NORMAL", ("a", "c")),
            ("OTHER_PNEUMONIA", ("c",)),
        ):
            whole += [
                (label, split, source, radiograph(rng, opaque=label == "COVID"))
                for source in sources
                for _ in range(count)
            ]
    manifest(root / "whole", whole)
    keras.utils.set_random_seed(5)
    for name, network in (("gate", dark_gate()), ("fields", small_fields(VIEW_PX, imagenet=False))):
        (root / name).mkdir()
        network.save(root / name / "model.keras")
        config = {"family": name, "preprocess": PreprocessSpec(size_px=SIDE // 2).to_dict()}
        (root / name / "config.json").write_text(json.dumps(config))
    return root


def run(*arguments: object) -> str:
    done = CliRunner().invoke(main, list(map(str, arguments)))
    assert done.exit_code == 0, done.output
    return done.output


def test_an_interrupted_training_on_fields_goes_on_to_the_same_numbers(folder, monkeypatch):
    from lungwatch.training.recipes import fields

    monkeypatch.setattr(fields, "build_field_network", small_fields)
    real, calls = fields.learn_fields, []
    options = ("--size", 32, "--steps", 5, "--batch-size", 12, "--checkpoint-steps", 2)
    pairs = ("--pairs", folder / "whole", "--gate", folder / "gate", "--fewest", 5)

    def words(out):
        return ("train", "fields", folder / "ready", "--out", out, *options, *pairs)

    whole, cut = folder / "run-whole", folder / "run-cut"
    assert "OPACITY vs NORMAL" in run(*words(whole))

    def cut_off(*arguments):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(1)
        return real(*arguments)

    monkeypatch.setattr(fields, "learn_fields", cut_off)
    assert CliRunner().invoke(main, [str(word) for word in words(cut)]).exit_code != 0
    monkeypatch.setattr(fields, "learn_fields", real)
    run(*words(cut), "--resume")
    for name in ("history.csv", "metrics.json"):
        assert (cut / name).read_text() == (whole / name).read_text()
    first, second = (keras.models.load_model(place / "model.keras") for place in (whole, cut))
    for one, other in zip(first.get_weights(), second.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)
    about = json.loads((whole / "config.json").read_text())["data"]["pairs"]
    assert about["sources"] == ["c"], "a has no other pneumonia and b no normal"
    refused = CliRunner().invoke(main, ["train", "fields", "x", "--out", "y", "--pairs", "z"])
    assert refused.exit_code == 1
    assert "need a gate" in refused.output


@pytest.fixture(scope="module")
def findings(folder):
    out = folder / "covid"
    arguments = ("--fields", folder / "fields", "--gate", folder / "gate", "--size", SIDE)
    run("train", "findings", folder / "whole", "--out", out, *arguments, "--leaks", "allow")
    return out


def test_findings_are_fitted_calibrated_and_measured(findings):
    metrics = json.loads((findings / "metrics.json").read_text())
    assert metrics["penalty"] in PENALTIES
    left_out = metrics["by_sources_left_out"][f"{metrics['penalty']:g}"]
    assert set(left_out) == {"a", "b"}
    assert set(left_out["a"]) == {"COVID vs NORMAL", "COVID vs OTHER_PNEUMONIA"}
    assert metrics["test"]["roc_auc"] > 0.9
    assert metrics["calibrated_on"] == "validation split"


def test_the_bundle_answers_as_the_network_does(findings, folder, tmp_path):
    """Parity of logits and of maps that are laid back is part of the export."""
    arguments = ("--name", "toy", "--version", "1.0.0", "-o", tmp_path, "--data", folder / "whole")
    assert "parity on" in run("export", findings, *arguments)
    assert (tmp_path / "toy-1.0.0" / "model.onnx").is_file()


@pytest.fixture(scope="module")
def pieces(folder):
    return tuple(
        keras.models.load_model(folder / name / "model.keras") for name in ("fields", "gate")
    )


def xrays(count):
    rng = np.random.default_rng(8)
    whole = [radiograph(rng, opaque=index % 2 == 1) for index in range(count)]
    small = [image.astype(np.float32) / np.float32(255) for image in whole]
    return small, np.stack([preprocess(one, PreprocessSpec(size_px=SIDE)) for one in small])


def test_the_graph_sees_the_field_that_is_cut_out(pieces):
    """The same box and nearly the same view as NumPy's, from the same chances of being lung."""
    gate = pieces[1]
    pixels = keras.Input((SIDE, SIDE, 1))
    shown = view_field(pixels, build_field_finder(gate, SIDE), VIEW_PX)
    model = keras.Model(pixels, shown)
    boxes = keras.Model(pixels, model.get_layer(BOX).output)
    _, seen = xrays(4)
    half = seen.reshape(4, SIDE // 2, 2, SIDE // 2, 2, 1).mean(axis=(2, 4))
    lungs = 1 / (1 + np.exp(-np.asarray(gate(half)["lungs"])[..., 0]))
    fields = [cut_field(one[..., 0], chance) for one, chance in zip(seen, lungs, strict=True)]
    views = np.stack([plain_view(field, VIEW_PX) for field in fields])
    assert np.abs(np.asarray(model(seen))[..., 0] - views).mean() < 0.03
    for box, field in zip(np.asarray(boxes(seen)), fields, strict=True):
        assert (box[2] - box[0]) * SIDE == pytest.approx(field.pixels.shape[1], abs=0.01)
        assert (box[3] - box[1]) * SIDE == pytest.approx(field.pixels.shape[0], abs=0.01)


def test_without_lungs_the_graph_sees_the_whole_picture(pieces):
    boxes = build_field_finder(pieces[1], SIDE)(np.ones((1, SIDE, SIDE, 1), np.float32))[1]
    assert np.asarray(boxes).tolist() == [[0, 0, 1, 1]]


def test_the_head_is_linear_and_the_opacity_is_that_of_the_fields(pieces, tmp_path):
    fields, gate = pieces
    weights = np.random.default_rng(2).normal(0, 3, CHANNELS).astype(np.float32)
    head = LinearHead(weights=weights, bias=-0.4)
    assemble([fields], gate, head, size_px=SIDE).save(tmp_path / "model.keras")
    model = keras.models.load_model(tmp_path / "model.keras")  # safe mode: no code in it
    names = (FEATURES, HIDDEN, LOGIT, OPACITY, "lung_view")
    outputs = keras.Model(model.input, [model.get_layer(name).output for name in names])
    _, seen = xrays(4)
    features, hidden, logit, opacity, shown = (np.asarray(one) for one in outputs(seen))
    expected = head.logits(features.mean(axis=(1, 2)))
    assert np.allclose(logit[:, 0], expected, atol=1e-5)
    assert np.allclose(np.asarray(model(seen))[:, 0], expected, atol=1e-5)
    assert np.all((hidden > 0).sum(axis=1) == 1)
    assert np.allclose(opacity[:, 0], opacity_against_rest(np.asarray(fields(shown))), atol=1e-5)


def test_networks_side_by_side_have_one_view_and_the_mean_of_their_opacities(pieces):
    gate = pieces[1]
    both = [small_fields(VIEW_PX, imagenet=False) for _ in range(2)]
    head = LinearHead(weights=np.linspace(-1, 1, 2 * CHANNELS, dtype=np.float32), bias=0.1)
    model = assemble(both, gate, head, size_px=SIDE)
    layers = [model.get_layer(name).output for name in ("features", OPACITY, "lung_view")]
    _, seen = xrays(3)
    features, opacity, shown = (np.asarray(one) for one in keras.Model(model.input, layers)(seen))
    expected = np.mean([opacity_against_rest(np.asarray(one(shown))) for one in both], axis=0)
    assert np.allclose(opacity[:, 0], expected, atol=1e-5)
    assert np.allclose(
        np.asarray(model(seen))[:, 0], head.logits(features.mean(axis=(1, 2))), atol=1e-5
    )


def samples(*groups):
    return [
        Sample(path=Path("x"), finding=finding, source=source)
        for source, finding, count in groups
        for _ in range(count)
    ]


def test_a_stronger_penalty_gives_smaller_weights_and_the_same_direction():
    rng = np.random.default_rng(0)
    who = samples(("a", "COVID", 30), ("a", "NORMAL", 30), ("b", "NORMAL", 60))
    features = rng.normal(0, 1, (120, 3)).astype(np.float32)
    features[:30, 0] += 2
    weak, strong = (fit_head(features, who, penalty) for penalty in (0.01, 10.0))
    assert 0 < strong.weights[0] < weak.weights[0]
    assert np.argmax(np.abs(strong.weights)) == 0


def test_the_penalty_is_chosen_by_what_holds_for_a_source_left_out():
    """One feature tells COVID everywhere a little; others tell each source's COVID apart."""
    rng = np.random.default_rng(1)
    who = samples(
        ("a", "COVID", 40), ("b", "COVID", 40), ("c", "NORMAL", 80), ("c", "OTHER_PNEUMONIA", 40)
    )
    features = rng.normal(0, 1, (200, 8)).astype(np.float32)
    features[:80, 0] += 1.0
    is_learnt = rng.random(200) < 0.7
    choice = choose_penalty(features, who, is_learnt)
    means = {
        penalty: np.mean([area for row in rows.values() for area in row.values()])
        for penalty, rows in choice.left_out.items()
    }
    assert means[f"{choice.penalty:g}"] == pytest.approx(max(means.values()), abs=1e-3)
    assert choose_penalty(features[:40], who[:40], is_learnt[:40]).left_out == {}
