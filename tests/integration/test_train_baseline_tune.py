"""Tuning from the data to the tested network, interrupted and not."""

import csv
import json

import cv2
import numpy as np
import pytest
from click.testing import CliRunner

from lungwatch.cli.main import main
from lungwatch.errors import ConfigError, DatasetError
from lungwatch.preprocess import PreprocessSpec
from lungwatch.training.evaluation.scorers import KerasScorer
from lungwatch.training.fitting.preparation import prepare
from lungwatch.training.fitting.run import Progress
from lungwatch.training.fitting.search import SearchConfig
from lungwatch.training.fitting.trainer import FitConfig
from lungwatch.training.networks.backbones import BaselineConfig, Normalisation, build_baseline
from lungwatch.training.recipes.classifiers import TuneConfig, train_baseline

pytest.importorskip("tensorflow", reason="needs TensorFlow (extra 'train')")
pytest.importorskip("optuna", reason="needs Optuna (extra 'train')")

NETWORK = BaselineConfig(size_px=32, filters=(4, 4), dense_units=8)
FITTING = FitConfig(epochs=2, batch_size=12, seed=3)
TUNING = TuneConfig(search=SearchConfig(sampler="random", trials=2, extensions=0), epochs=2)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Smooth noise, so that no two images are alike; brighter for COVID; from two sources."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    lines = ["file,label,split,source"]
    for split, count in (("train", 12), ("val", 8), ("test", 6)):
        for finding in ("COVID", "NORMAL"):
            for index in range(count):
                small = rng.integers(20, 200, (6, 6)).astype(np.uint8)
                image = cv2.resize(small, (72, 72), interpolation=cv2.INTER_CUBIC) // 2
                image[24:48, 24:48] += 80 * np.uint8(finding == "COVID")
                name = f"{split}-{finding}-{index}.png"
                assert cv2.imwrite(str(folder / name), image)
                lines.append(f"{name},{finding},{split},{'ab'[index % 2]}")
    (folder / "manifest.csv").write_text("\n".join(lines) + "\n")
    return folder


def train(data, root, **options):
    return train_baseline(data, root, network=NETWORK, fitting=FITTING, leaks="allow", **options)


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    root = tmp_path_factory.mktemp("runs") / "tuned"
    train(data, root, tuning=TUNING)
    return root


def rows_of(run, name):
    with (run / name).open() as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


def test_the_final_network_is_tested_on_images_it_never_saw(data, run):
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["trained_on"] == "train and two thirds of val"
    assert "that the network did not learn from" in metrics["calibrated_on"]
    predictions = rows_of(run, "predictions.csv")
    assert len(predictions) == 12
    assert all(row["file"].startswith("test-") for row in predictions)
    assert (run / "confusion.png").stat().st_size > 1000
    scorer = KerasScorer(run)
    samples = prepare(data, PreprocessSpec(size_px=32), leaks="allow").test
    logits = [float(row["logit"]) for row in predictions]
    np.testing.assert_allclose(scorer.logits(samples.pixels), logits, atol=1e-5)
    assert scorer.judgement.decision.threshold == metrics["decision"]["threshold"]


def test_the_final_network_runs_as_long_as_the_best_one_took(run):
    metrics = json.loads((run / "metrics.json").read_text())
    history = rows_of(run, "history.csv")
    assert len(history) == metrics["search"]["best"]["epochs"] == metrics["epochs"]
    assert "val_loss" not in history[0]
    assert len(list((run / "trials").glob("*/model.keras"))) == 1


def test_an_interrupted_tuning_comes_to_the_same_table_and_metrics(data, run, tmp_path):
    broken = tmp_path / "broken"
    trials = []

    def interrupt(epoch, batch, batches):
        if len(trials) == 1 and (epoch, batch) == (2, 1):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(
            data,
            broken,
            tuning=TUNING,
            progress=Progress(on_batch=interrupt, on_trial=trials.append),
        )
    assert len(rows_of(broken, "search.csv")) == 1
    resumed = train(data, broken, tuning=TUNING, resume=True)
    assert resumed == json.loads((run / "metrics.json").read_text())
    assert rows_of(broken, "search.csv") == rows_of(run, "search.csv")
    assert (broken / "history.csv").read_text() == (run / "history.csv").read_text()


def test_more_epochs_go_on_where_fewer_ended_and_fewer_are_refused(data, tmp_path):
    def of(root, epochs, **options):
        fitting = FitConfig(epochs=epochs, batch_size=12, seed=3, patience=None)
        return train_baseline(
            data, tmp_path / root, network=NETWORK, fitting=fitting, leaks="allow", **options
        )

    at_once = of("once", 3)
    of("grown", 1)
    assert of("grown", 3, resume=True) == at_once
    histories = [(tmp_path / root / "history.csv").read_text() for root in ("once", "grown")]
    assert histories[0] == histories[1]
    assert histories[0].startswith("epoch,loss,accuracy,val_loss,")
    with pytest.raises(ConfigError, match=r"another configuration \(fit\)"):
        of("grown", 2, resume=True)


def test_a_source_left_out_is_neither_learnt_from_nor_stopped_by(data):
    prepared = prepare(data, PreprocessSpec(size_px=32), leave_out="b", leaks="allow")
    for part in (prepared.train, prepared.val):
        assert {s.source for s in part.samples} == {"a"}
    assert {s.source for s in prepared.test.samples} == {"a", "b"}
    with pytest.raises(DatasetError, match=r"no source 'c' to leave out \(sources: a, b\)"):
        prepare(data, PreprocessSpec(size_px=32), leave_out="c")


def test_tuning_without_a_test_split_and_an_unreadable_file_are_refused(data, tmp_path):
    lines = (data / "manifest.csv").read_text().splitlines()
    untested = data / "untested.csv"
    untested.write_text("\n".join(line for line in lines if ",test," not in line) + "\n")
    with pytest.raises(DatasetError, match="untested: split 'test' is empty"):
        train(untested, tmp_path / "run", tuning=TUNING)
    (data / "broken.png").write_bytes(b"no image")
    broken = data / "broken.csv"
    broken.write_text("\n".join([*lines, "broken.png,COVID,train,a"]) + "\n")
    with pytest.raises(DatasetError, match=r"broken\.png"):
        train(broken, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_one_x_ray_in_two_splits_is_refused_by_name_or_dropped(data):
    copy = data / "copy.png"
    copy.write_bytes((data / "test-COVID-0.png").read_bytes())
    leaking = data / "leaking.csv"
    text = (data / "manifest.csv").read_text() + "copy.png,COVID,train,a\n"
    leaking.write_text(text)
    with pytest.raises(DatasetError, match=r"leak: .*test-COVID-0\.png"):
        prepare(leaking, PreprocessSpec(size_px=32))
    kept = prepare(leaking, PreprocessSpec(size_px=32), leaks="drop")
    assert "copy.png" not in {s.path.name for s in kept.train.samples}
    assert kept.data["dropped"]["train"] >= 1


@pytest.mark.parametrize("kind", ["all", "fixed", "image"])
def test_every_normalisation_survives_saving_and_the_export(kind, tmp_path):
    pytest.importorskip("tf2onnx", reason="needs tf2onnx (extra 'train')")
    import keras

    from lungwatch.export.graph import compare, to_onnx

    pixels = np.random.default_rng(1).random((6, 32, 32, 1), dtype=np.float32)
    found = Normalisation(kind=kind).settle(pixels[:3], [pixels[3:]])
    model = build_baseline(NETWORK, found.mean, found.std, per_image=found.per_image)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras", safe_mode=True)
    compare(loaded, to_onnx(loaded).SerializeToString(), pixels, kind).check()
    entry = np.asarray(keras.Model(model.input, model.get_layer("standardise").output)(pixels))
    axes = (1, 2, 3) if kind == "image" else None
    if kind != "fixed":
        np.testing.assert_allclose(entry.mean(axis=axes), 0.0, atol=1e-4)
        np.testing.assert_allclose(entry.std(axis=axes), 1.0, atol=1e-3)
    else:
        np.testing.assert_allclose(entry, pixels * 4 - 2, atol=1e-5)


def test_the_command_tunes_and_reports_the_test(data, tmp_path):
    arguments = ["train", "baseline", str(data), "--out", str(tmp_path / "run"), "--tune"]
    arguments += ["--size", "32", "--filters", "4,4", "--trials", "1", "--tune-epochs", "1"]
    arguments += ["--sampler", "random", "--extensions", "0", "--no-retrain", "--leaks", "allow"]
    result = CliRunner().invoke(main, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    metrics = json.loads(result.stdout)
    assert metrics["trained_on"] == "train"
    assert metrics["test"]["positives"] == 6
    assert "trial 0 done" in result.stderr
