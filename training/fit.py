"""The training loop: early stopping, and resuming as if nothing had happened.

Training stops by the validation loss after Platt scaling: epochs are drawn with the classes in
balance and the network ships calibrated, so the raw loss would mostly judge an offset that is
taken out anyway. Both are in the history. A final network, retrained on the validation data
too, has nothing to stop by: it runs for a fixed number of epochs and keeps its last weights.

Every epoch draws its chance from (seed, epoch) and ends with a checkpoint that includes the
optimiser, so that an interrupted run continues to the same numbers.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict

import numpy as np
from numpy.typing import NDArray

from lungwatch.errors import ConfigError, LungwatchError
from lungwatch.training.augment import augment
from lungwatch.training.averaging import WeightAverage
from lungwatch.training.data.pixels import FloatArray, KerasModel
from lungwatch.training.evaluation.calibration import fit_calibration
from lungwatch.training.evaluation.metrics import log_loss, roc_auc
from lungwatch.training.fit_config import FitConfig, FitData
from lungwatch.training.fit_state import (
    FitState,
    advance,
    average_file,
    forget_checkpoint,
    is_finished,
    memory_file,
    read_state,
)
from lungwatch.training.keras_file import save_keras
from lungwatch.training.lesson import Batch, Lesson
from lungwatch.training.memory import load_memory, save_memory
from lungwatch.training.run import RunFolder
from lungwatch.training.sampling import epoch_order
from lungwatch.training.step import make_step

_COLUMNS = (
    "epoch",
    "loss",
    "accuracy",
    "val_loss",
    "val_loss_calibrated",
    "val_accuracy",
    "val_auc",
    "learning_rate",
    "source_loss",
)


class DivergedError(LungwatchError):
    """The loss is no longer a finite number; a lower learning rate may help."""


def fit(
    build: Callable[[], KerasModel],
    data: FitData,
    config: FitConfig,
    run: RunFolder,
    *,
    keep_checkpoint: bool = False,
    lesson: Callable[[KerasModel], Lesson] | None = None,
    on_batch: Callable[[int, int, int], None] | None = None,
    on_epoch: Callable[[dict[str, float]], None] | None = None,
) -> FitState:
    """Train until the validation loss no longer falls; leave the best network in the run.

    Without validation data, the last one.

    Parameters
    ----------
    build
        Makes the fresh network, pixels to logit.
    data
        What to learn from and what to stop by.
    config
        How.
    run
        A begun run folder; if it holds a state, training continues from there.
    keep_checkpoint
        Leave the last checkpoint after all epochs, for going on with more of them.
    lesson
        Makes what shows batches to the network and lets it learn from them; by default they
        are augmented, and cross-entropy is the loss.
    on_batch
        Called with (epoch, batch, batches) after each step.
    on_epoch
        Called with the epoch's row of the history.

    Returns
    -------
    FitState
        The final state, with the history.

    Raises
    ------
    DivergedError
        If the loss is no longer finite.
    ConfigError
        If the run is to go on with more epochs but has no checkpoint.
    """
    import keras

    state = read_state(run) or FitState(learning_rate=config.rate(1))
    if is_finished(state, config):
        return state
    if state.checkpoint:
        if not (run.root / state.checkpoint).exists():
            raise ConfigError(f"{run.root} keeps no checkpoint to go on from; train anew")
        model = keras.models.load_model(run.root / state.checkpoint)
        average = WeightAverage(model, config.average)
        average.load(average_file(run, state))
    else:
        model = build()
        model.compile(
            optimizer=keras.optimizers.AdamW(state.learning_rate, weight_decay=config.weight_decay),
            loss=keras.losses.BinaryCrossentropy(from_logits=True),
        )
        average = WeightAverage(model, config.average)
    taught = lesson(model) if lesson else _plain_lesson(model, data, config)
    if state.checkpoint and taught.variables:
        load_memory(taught.variables, memory_file(run, state))
    while True:
        epoch = state.epoch + 1
        loss, accuracy = _train_epoch(
            model, taught, average, data, config, epoch=epoch, on_batch=on_batch
        )
        row = {"epoch": epoch, "loss": loss, "accuracy": accuracy}
        if data.val_pixels is not None and data.val_targets is not None:
            with average.applied():
                logits = predict_logits(model, data.val_pixels)
            row |= _validate(data.val_targets, logits)
        row |= {"learning_rate": state.learning_rate, **taught.notes()}
        old = state
        state = advance(state, row, config)
        model.optimizer.learning_rate.assign(state.learning_rate)
        save_keras(model, run.root / state.checkpoint)
        average.save(average_file(run, state))
        if taught.variables:
            save_memory(taught.variables, memory_file(run, state))
        if state.best_epoch == epoch and (data.val_pixels is not None or state.finished):
            with average.applied():
                save_keras(model, run.model)
        run.write("state.json", asdict(state))
        table = [{key: row[key] for key in _COLUMNS if key in row} for row in state.history]
        run.write_table("history.csv", table)
        forget_checkpoint(run, old)
        if on_epoch:
            on_epoch(row)
        if state.finished:
            if not (keep_checkpoint and epoch >= config.epochs):
                forget_checkpoint(run, state)
            return state


def predict_logits(model: KerasModel, pixels: FloatArray, batch_size: int = 64) -> FloatArray:
    """Return a Keras network's binary logits, float32 (N,), for (N, S, S, 1) in 0..1."""
    parts = [
        np.asarray(model(pixels[start : start + batch_size], training=False))
        for start in range(0, len(pixels), batch_size)
    ]
    return np.concatenate(parts)[:, 0].astype(np.float32)


def _train_epoch(
    model: KerasModel,
    lesson: Lesson,
    average: WeightAverage,
    data: FitData,
    config: FitConfig,
    *,
    epoch: int,
    on_batch: Callable[[int, int, int], None] | None,
) -> tuple[float, float]:
    """Return the mean loss and the accuracy, before each step, over the images drawn."""
    rng = np.random.default_rng([config.seed, epoch])
    batches = math.ceil(len(data.train_pixels) / config.batch_size)
    order = epoch_order(data.train_weights, rng, batches * config.batch_size)
    _seed_dropout(model, config.seed, epoch)
    total, right = 0.0, 0
    shown = lesson.batches(np.split(order, batches), rng)
    for batch, (pixels, targets, *rest) in enumerate(shown, start=1):
        loss, logits = lesson.step(pixels, targets, *rest)
        if not math.isfinite(float(loss)):
            raise DivergedError(f"the loss is {float(loss)} in epoch {epoch}, batch {batch}")
        total += float(loss)
        right += int(np.sum((np.asarray(logits) > 0.0) == (targets > 0.5)))
        average.update()
        if on_batch:
            on_batch(epoch, batch, batches)
    return total / batches, right / len(order)


def _plain_lesson(model: KerasModel, data: FitData, config: FitConfig) -> Lesson:
    def show(indices: NDArray[np.intp], rng: np.random.Generator) -> Batch:
        pixels = augment(data.train_pixels[indices], config.augmentation, rng)
        return pixels, data.train_targets[indices]

    return Lesson(show=show, step=make_step(model))


def _validate(targets: FloatArray, logits: FloatArray) -> dict[str, float]:
    if not np.isfinite(logits).all():
        raise DivergedError("the network's answers to validation images are not finite")
    calibration = fit_calibration(targets, logits)
    calibrated = calibration.slope * logits + calibration.intercept
    return {
        "val_loss": log_loss(targets, logits),
        "val_loss_calibrated": log_loss(targets, calibrated),
        "val_accuracy": float(np.mean((logits > 0.0) == (targets > 0.5))),
        "val_auc": roc_auc(targets, logits),
    }


def _seed_dropout(model: KerasModel, seed: int, epoch: int) -> None:
    # Keras does not save the state of its seed generators: without this a resumed run would
    # drop other units than one that was never interrupted.
    for index, layer in enumerate(_flat(model)):
        if hasattr(layer, "seed_generator"):
            layer.seed_generator.state.assign([seed + 1000 * index, epoch])


def _flat(model: KerasModel) -> Iterator[KerasModel]:
    for layer in model.layers:
        if hasattr(layer, "layers"):
            yield from _flat(layer)
        else:
            yield layer
