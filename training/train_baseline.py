"""Train the baseline on a data set: the whole of `lungwatch train baseline`."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lungwatch.preprocess import PreprocessSpec
from lungwatch.training.baseline import BaselineConfig, build_baseline
from lungwatch.training.calibrate import choose_decision, fit_calibration
from lungwatch.training.dataset import dataset_name, describe, licences, load_dataset, select
from lungwatch.training.fit import FitConfig, FitData, FitState, fit, predict_logits
from lungwatch.training.metrics import figures, sigmoid
from lungwatch.training.pixels import FloatArray, read_pixels, targets
from lungwatch.training.plot import plot_history
from lungwatch.training.run import RunFolder
from lungwatch.training.runtime import prepare_tensorflow
from lungwatch.training.sampling import sampling_weights

FAMILY = "baseline CNN"


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What a command line may want to hear; every part may be None.

    Attributes
    ----------
    on_read
        Called with 1 after each image read.
    on_batch
        Called with (epoch, batch, batches) after each step.
    on_epoch
        Called with the epoch's row of the history.
    """

    on_read: Callable[[int], None] | None = None
    on_batch: Callable[[int, int, int], None] | None = None
    on_epoch: Callable[[dict[str, float]], None] | None = None


def train_baseline(
    location: Path,
    root: Path,
    *,
    network: BaselineConfig,
    fitting: FitConfig,
    resume: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train, calibrate on the validation split, and measure.

    Parameters
    ----------
    location
        The data set, with the splits train and val; see `load_dataset`.
    root
        The run folder to fill.
    network, fitting
        The network's shape and how to train it.
    resume
        Continue the run that is in `root`.
    progress
        Listeners.

    Returns
    -------
    dict
        What is written to `metrics.json`: `best_epoch`, `epochs`, `calibration`, `decision`
        and the figures on `validation`.

    Raises
    ------
    DatasetError
        If a split is missing or empty, holds one class only, or a file is unreadable.
    ConfigError
        If `root` holds another run.
    MissingExtraError
        If TensorFlow is not installed.
    """
    progress = progress or Progress()
    samples = load_dataset(location)
    name = dataset_name(location)
    train = select(samples, "train", name)
    val = select(samples, "val", name)
    spec = PreprocessSpec(size_px=network.size_px)
    prepare_tensorflow(fitting.seed)
    run = RunFolder(root=root)
    config = {
        "family": FAMILY,
        "network": asdict(network),
        "fit": asdict(fitting),
        "preprocess": spec.to_dict(),
        "data": {
            "name": name,
            "train": describe(train),
            "val": describe(val),
            "licences": licences(train),
        },
    }
    run.begin(config, resume=resume)

    train_pixels = read_pixels(train, spec, progress=progress.on_read)
    val_pixels = read_pixels(val, spec, progress=progress.on_read)
    data = FitData(
        train_pixels=train_pixels,
        train_targets=targets(train),
        train_weights=sampling_weights(train),
        val_pixels=val_pixels,
        val_targets=targets(val),
    )
    mean, std = statistics(train_pixels)
    state = fit(
        lambda: build_baseline(network, mean, std),
        data,
        fitting,
        run,
        on_batch=progress.on_batch,
        on_epoch=progress.on_epoch,
    )
    return conclude(run, state, val_pixels, targets(val))


def statistics(pixels: FloatArray) -> tuple[float, float]:
    """Mean and standard deviation over all pixels of all images, 0..1."""
    mean = float(pixels.mean(dtype=np.float64))
    return mean, max(float(pixels.std(dtype=np.float64)), 1e-6)


def conclude(
    run: RunFolder, state: FitState, val_pixels: FloatArray, val_targets: FloatArray
) -> dict[str, Any]:
    """Calibrate the best network on validation data, and write metrics and plot."""
    import keras

    model = keras.models.load_model(run.model)
    logits = predict_logits(model, val_pixels)
    calibration = fit_calibration(val_targets, logits)
    probabilities = sigmoid(calibration.slope * logits + calibration.intercept)
    decision = choose_decision(val_targets, probabilities)
    metrics = {
        "best_epoch": state.best_epoch,
        "epochs": state.epoch,
        "parameters": int(model.count_params()),
        "calibration": asdict(calibration),
        "decision": asdict(decision),
        "validation": figures(val_targets, probabilities, decision.threshold).to_dict(),
    }
    run.write("metrics.json", metrics)
    plot_history(state.history, run.root / "history.png")
    return metrics
