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
from dataclasses import asdict, dataclass, field, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from lungwatch.errors import ConfigError, LungwatchError
from lungwatch.training.augment import Augmentation, augment
from lungwatch.training.averaging import WeightAverage
from lungwatch.training.calibrate import fit_calibration
from lungwatch.training.fit_state import FitState, average_file, forget_checkpoint
from lungwatch.training.foreign import KerasModel
from lungwatch.training.keras_file import save_keras
from lungwatch.training.lesson import Batch, Lesson
from lungwatch.training.metrics import log_loss, roc_auc
from lungwatch.training.pixels import FloatArray
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
)


class DivergedError(LungwatchError):
    """The loss is no longer a finite number; a lower learning rate may help."""


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """How to train.

    Attributes
    ----------
    epochs
        Most epochs to run.
    batch_size, learning_rate
        Of the Adam optimiser's steps.
    patience
        Epochs without a lower calibrated validation loss after which training stops; None
        runs all epochs.
    plateau
        Epochs without a lower calibrated validation loss after which the learning rate is halved.
    learning_rates
        The learning rate of each epoch instead, the last one for all further epochs: what a
        run without validation data repeats of one that had them.
    keep
        Which epoch's weights: those with the lowest calibrated validation loss, or the last.
    average
        Decay a step of the weight average that is validated and kept; 0 keeps the last
        step's weights.
    weight_decay
        Decoupled weight decay (AdamW).
    seed
        Of initial weights, dropout, drawing and augmentation.
    augmentation
        Limits of the random changes to training images.
    """

    epochs: int = 40
    batch_size: int = 32
    learning_rate: float = 1e-3
    patience: int | None = 8
    plateau: int = 3
    learning_rates: tuple[float, ...] | None = None
    keep: Literal["best", "last"] = "best"
    average: float = 0.99
    weight_decay: float = 1e-3
    seed: int = 1
    augmentation: Augmentation = field(default_factory=Augmentation)

    def __post_init__(self) -> None:
        patience = 1 if self.patience is None else self.patience
        if min(self.epochs, self.batch_size, patience, self.plateau) < 1:
            raise ConfigError("epochs, batch size, patience and plateau must be at least 1")
        if not all(rate > 0 for rate in (self.learning_rate, *(self.learning_rates or ()))):
            raise ConfigError("the learning rate must be above 0")
        if not (0 <= self.average < 1 and self.weight_decay >= 0):
            raise ConfigError("average must lie within 0..1 and weight decay not below 0")

    def rate(self, epoch: int) -> float:
        """Return the learning rate an epoch, from 1 on, starts with, but for halvings."""
        if not self.learning_rates:
            return self.learning_rate
        return self.learning_rates[min(epoch, len(self.learning_rates)) - 1]


@dataclass(frozen=True, kw_only=True, eq=False)
class FitData:
    """Pixels (N, S, S, 1) in 0..1, targets (N,) in 0..1, drawing weights (N,) summing to 1.

    Validation targets are 0 and 1, with both occurring; without validation data the network is
    trained for all epochs.
    """

    train_pixels: FloatArray
    train_targets: FloatArray
    train_weights: NDArray[np.float64]
    val_pixels: FloatArray | None = None
    val_targets: FloatArray | None = None


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

    state_file = run.root / "state.json"
    if state_file.exists():
        state = FitState(**run.read("state.json"))
    else:
        state = FitState(learning_rate=config.rate(1))
    if _is_finished(state, config):
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
        row["learning_rate"] = state.learning_rate
        old = state
        state = _advance(state, row, config)
        model.optimizer.learning_rate.assign(state.learning_rate)
        save_keras(model, run.root / state.checkpoint)
        average.save(average_file(run, state))
        if state.best_epoch == epoch and (data.val_pixels is not None or state.finished):
            with average.applied():
                save_keras(model, run.model)
        run.write("state.json", asdict(state))
        run.write_table("history.csv", state.history, columns=_COLUMNS)
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


def _advance(state: FitState, row: dict[str, float], config: FitConfig) -> FitState:
    epoch = int(row["epoch"])
    val_loss = row.get("val_loss_calibrated")
    # With nothing to compare by, the last epoch is the one to keep.
    better = val_loss is None or config.keep == "last" or val_loss < state.best_val_loss
    since_halving = 0 if better else state.since_halving + 1
    learning_rate = state.learning_rate
    if config.learning_rates:
        learning_rate = config.rate(epoch + 1)
    elif since_halving >= config.plateau:
        since_halving, learning_rate = 0, learning_rate / 2.0
    new = replace(
        state,
        epoch=epoch,
        checkpoint=f"checkpoint-{epoch:04d}.keras",
        best_epoch=epoch if better else state.best_epoch,
        best_val_loss=state.best_val_loss
        if val_loss is None
        else min(val_loss, state.best_val_loss),
        learning_rate=learning_rate,
        since_halving=since_halving,
        history=[*state.history, row],
    )
    return replace(new, finished=_is_finished(new, config))


def _is_finished(state: FitState, config: FitConfig) -> bool:
    is_stopped = config.patience is not None and state.epoch - state.best_epoch >= config.patience
    return state.epoch >= config.epochs or is_stopped
