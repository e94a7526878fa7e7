"""The training loop: early stopping, and resuming as if nothing had happened.

Training stops by the validation loss after Platt scaling: epochs are drawn with the classes in
balance and the network ships calibrated, so the raw loss would mostly judge an offset that is
taken out anyway. Both are in the history.

Every epoch draws its chance from (seed, epoch) and ends with a checkpoint that includes the
optimiser, so that an interrupted run continues to the same numbers.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lungwatch.errors import ConfigError
from lungwatch.training.augment import Augmentation, augment
from lungwatch.training.averaging import WeightAverage
from lungwatch.training.calibrate import fit_calibration
from lungwatch.training.foreign import KerasModel
from lungwatch.training.metrics import log_loss, roc_auc
from lungwatch.training.pixels import FloatArray
from lungwatch.training.run import RunFolder
from lungwatch.training.sampling import epoch_order


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
        Epochs without a lower calibrated validation loss after which training stops.
    plateau
        Epochs without a lower calibrated validation loss after which the learning rate is halved.
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
    patience: int = 8
    plateau: int = 3
    average: float = 0.99
    weight_decay: float = 1e-3
    seed: int = 1
    augmentation: Augmentation = field(default_factory=Augmentation)

    def __post_init__(self) -> None:
        if min(self.epochs, self.batch_size, self.patience, self.plateau) < 1:
            raise ConfigError("epochs, batch size, patience and plateau must be at least 1")
        if not self.learning_rate > 0:
            raise ConfigError("the learning rate must be above 0")
        if not (0 <= self.average < 1 and self.weight_decay >= 0):
            raise ConfigError("average must lie within 0..1 and weight decay not below 0")


@dataclass(frozen=True, kw_only=True, eq=False)
class FitData:
    """Pixels (N, S, S, 1) in 0..1, targets (N,) of 0 and 1, drawing weights (N,) summing to 1."""

    train_pixels: FloatArray
    train_targets: FloatArray
    train_weights: NDArray[np.float64]
    val_pixels: FloatArray
    val_targets: FloatArray


@dataclass(frozen=True, kw_only=True)
class FitState:
    """Where a run stands; written after each epoch, once its checkpoint is safe."""

    epoch: int = 0
    checkpoint: str = ""
    best_epoch: int = 0
    best_val_loss: float = math.inf
    learning_rate: float = 0.0
    since_halving: int = 0
    finished: bool = False
    history: list[dict[str, float]] = field(default_factory=list)


def fit(
    build: Callable[[], KerasModel],
    data: FitData,
    config: FitConfig,
    run: RunFolder,
    *,
    on_batch: Callable[[int, int, int], None] | None = None,
    on_epoch: Callable[[dict[str, float]], None] | None = None,
) -> FitState:
    """Train until the validation loss no longer falls; leave the best network in the run.

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
    on_batch
        Called with (epoch, batch, batches) after each step.
    on_epoch
        Called with the epoch's row of the history.

    Returns
    -------
    FitState
        The final state, with the history.
    """
    import keras

    state_file = run.root / "state.json"
    if state_file.exists():
        state = FitState(**run.read("state.json"))
    else:
        state = FitState(learning_rate=config.learning_rate)
    if state.finished:
        return state
    if state.checkpoint:
        model = keras.models.load_model(run.root / state.checkpoint)
        average = WeightAverage(model, config.average)
        average.load(_average_of(run, state))
    else:
        model = build()
        model.compile(
            optimizer=keras.optimizers.AdamW(
                config.learning_rate, weight_decay=config.weight_decay
            ),
            loss=keras.losses.BinaryCrossentropy(from_logits=True),
        )
        average = WeightAverage(model, config.average)
    while True:
        epoch = state.epoch + 1
        train_loss = _train_epoch(model, average, data, config, epoch=epoch, on_batch=on_batch)
        with average.applied():
            logits = predict_logits(model, data.val_pixels)
        calibrated = fit_calibration(data.val_targets, logits)
        row = {
            "epoch": epoch,
            "loss": train_loss,
            "val_loss": log_loss(data.val_targets, logits),
            "val_loss_calibrated": log_loss(
                data.val_targets, calibrated.slope * logits + calibrated.intercept
            ),
            "val_auc": roc_auc(data.val_targets, logits),
            "learning_rate": state.learning_rate,
        }
        old = state
        state = _advance(state, row, config)
        model.optimizer.learning_rate.assign(state.learning_rate)
        _save(model, run.root / state.checkpoint)
        average.save(_average_of(run, state))
        if state.best_epoch == epoch:
            with average.applied():
                _save(model, run.model)
        run.write("state.json", asdict(state))
        run.write_table("history.csv", state.history)
        _forget(run, old)
        if on_epoch:
            on_epoch(row)
        if state.finished:
            _forget(run, state)
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
    average: WeightAverage,
    data: FitData,
    config: FitConfig,
    *,
    epoch: int,
    on_batch: Callable[[int, int, int], None] | None,
) -> float:
    rng = np.random.default_rng([config.seed, epoch])
    batches = math.ceil(len(data.train_pixels) / config.batch_size)
    order = epoch_order(data.train_weights, rng, batches * config.batch_size)
    _seed_dropout(model, config.seed, epoch)
    total = 0.0
    for batch, indices in enumerate(np.split(order, batches), start=1):
        pixels = augment(data.train_pixels[indices], config.augmentation, rng)
        total += float(model.train_on_batch(pixels, data.train_targets[indices, np.newaxis]))
        average.update()
        if on_batch:
            on_batch(epoch, batch, batches)
    return total / batches


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
    epoch, val_loss = int(row["epoch"]), row["val_loss_calibrated"]
    better = val_loss < state.best_val_loss
    best_epoch = epoch if better else state.best_epoch
    since_halving = 0 if better else state.since_halving + 1
    learning_rate = state.learning_rate
    if since_halving >= config.plateau:
        since_halving, learning_rate = 0, learning_rate / 2.0
    return replace(
        state,
        epoch=epoch,
        checkpoint=f"checkpoint-{epoch:04d}.keras",
        best_epoch=best_epoch,
        best_val_loss=min(val_loss, state.best_val_loss),
        learning_rate=learning_rate,
        since_halving=since_halving,
        finished=epoch >= config.epochs or epoch - best_epoch >= config.patience,
        history=[*state.history, row],
    )


def _average_of(run: RunFolder, state: FitState) -> Path:
    return (run.root / state.checkpoint).with_suffix(".npz")


def _forget(run: RunFolder, state: FitState) -> None:
    if state.checkpoint:
        (run.root / state.checkpoint).unlink(missing_ok=True)
        _average_of(run, state).unlink(missing_ok=True)


def _save(model: KerasModel, target: Path) -> None:
    # Keras chooses the format by the suffix, so the temporary file keeps it.
    temporary = target.with_name(f".tmp-{target.name}")
    model.save(temporary)
    temporary.replace(target)
