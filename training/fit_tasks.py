"""The training loop for several tasks at once; it stops early and resumes as `fit` does."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lungwatch.errors import ConfigError
from lungwatch.training.augment import Augmentation, augment
from lungwatch.training.averaging import WeightAverage
from lungwatch.training.data.pixels import FloatArray, KerasModel
from lungwatch.training.fit_state import FitState, average_file, forget_checkpoint
from lungwatch.training.keras_file import save_keras
from lungwatch.training.run import RunFolder
from lungwatch.training.sampling import epoch_order
from lungwatch.training.tasks import IntArray, Task

_BATCH = 64


@dataclass(frozen=True, kw_only=True)
class TasksConfig:
    """How to train; every value as in `lungwatch.training.fit.FitConfig`."""

    epochs: int = 30
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


@dataclass(frozen=True, kw_only=True, eq=False)
class TasksData:
    """Pixels (N, S, S, 1) in 0..1, answers of each task (N,), drawing weights (N,)."""

    train_pixels: FloatArray
    train_answers: dict[str, IntArray]
    train_weights: NDArray[np.float64]
    val_pixels: FloatArray
    val_answers: dict[str, IntArray]


def fit_tasks(
    build: Callable[[], KerasModel],
    tasks: list[Task],
    data: TasksData,
    config: TasksConfig,
    run: RunFolder,
    *,
    on_batch: Callable[[int, int, int], None] | None = None,
    on_epoch: Callable[[dict[str, float]], None] | None = None,
) -> FitState:
    """Train until the weighted validation loss no longer falls; leave the best network in the run.

    Parameters
    ----------
    build
        Makes the fresh network, from pixels to a dict of logits by the tasks' names.
    tasks, data, config
        What to learn, from what, and how.
    run
        A begun run folder; if it holds a state, training continues from there.
    on_batch, on_epoch
        As for `lungwatch.training.fit.fit`.
    """
    import keras

    state = FitState(learning_rate=config.learning_rate)
    if (run.root / "state.json").exists():
        state = FitState(**run.read("state.json"))
    if state.finished:
        return state
    if state.checkpoint:
        model = keras.models.load_model(run.root / state.checkpoint)
        average = WeightAverage(model, config.average)
        average.load(average_file(run, state))
    else:
        model = _compiled(build(), tasks, config)
        average = WeightAverage(model, config.average)
    while True:
        epoch = state.epoch + 1
        loss = _train_epoch(model, average, data, config, epoch=epoch, on_batch=on_batch)
        with average.applied():
            row = {"epoch": epoch, "loss": loss, **_validate(model, tasks, data)}
        row["learning_rate"] = state.learning_rate
        old, state = state, _advance(state, row, config)
        model.optimizer.learning_rate.assign(state.learning_rate)
        save_keras(model, run.root / state.checkpoint)
        average.save(average_file(run, state))
        if state.best_epoch == epoch:
            with average.applied():
                save_keras(model, run.model)
        run.write("state.json", asdict(state))
        run.write_table("history.csv", state.history, columns=tuple(row))
        forget_checkpoint(run, old)
        if on_epoch:
            on_epoch(row)
        if state.finished:
            forget_checkpoint(run, state)
            return state


def predict_answers(model: KerasModel, pixels: FloatArray) -> dict[str, FloatArray]:
    """Return each task's logits, float32 (N, answers), for (N, S, S, 1) in 0..1."""
    parts = [
        model(pixels[start : start + _BATCH], training=False)
        for start in range(0, len(pixels), _BATCH)
    ]
    return {name: np.concatenate([np.asarray(part[name]) for part in parts]) for name in parts[0]}


def _compiled(model: KerasModel, tasks: list[Task], config: TasksConfig) -> KerasModel:
    import keras

    model.compile(
        optimizer=keras.optimizers.AdamW(config.learning_rate, weight_decay=config.weight_decay),
        loss={t.name: keras.losses.SparseCategoricalCrossentropy(from_logits=True) for t in tasks},
        loss_weights={t.name: t.weight for t in tasks},
    )
    return model


def _train_epoch(
    model: KerasModel,
    average: WeightAverage,
    data: TasksData,
    config: TasksConfig,
    *,
    epoch: int,
    on_batch: Callable[[int, int, int], None] | None,
) -> float:
    import keras

    rng = np.random.default_rng([config.seed, epoch])
    batches = math.ceil(len(data.train_pixels) / config.batch_size)
    order = epoch_order(data.train_weights, rng, batches * config.batch_size)
    _seed_dropout(model, config.seed, epoch, keras.layers.Dropout)
    total = 0.0
    for batch, indices in enumerate(np.split(order, batches), start=1):
        pixels = augment(data.train_pixels[indices], config.augmentation, rng)
        answers = {name: values[indices] for name, values in data.train_answers.items()}
        total += float(model.train_on_batch(pixels, answers, return_dict=True)["loss"])
        average.update()
        if on_batch:
            on_batch(epoch, batch, batches)
    return total / batches


def _seed_dropout(model: KerasModel, seed: int, epoch: int, kind: Any) -> None:  # noqa: ANN401
    # Keras does not save the state of its seed generators; see `lungwatch.training.fit`.
    for index, layer in enumerate(model.layers):
        if isinstance(layer, kind):
            layer.seed_generator.state.assign([seed + 1000 * index, epoch])


def _validate(model: KerasModel, tasks: list[Task], data: TasksData) -> dict[str, float]:
    logits = predict_answers(model, data.val_pixels)
    row: dict[str, float] = {"val_loss": 0.0}
    for task in tasks:
        answers = data.val_answers[task.name]
        loss = cross_entropy(answers, logits[task.name])
        row["val_loss"] += task.weight * loss
        row[f"val_loss_{task.name}"] = loss
        row[f"val_accuracy_{task.name}"] = float(
            np.mean(logits[task.name].argmax(axis=1) == answers)
        )
    return row


def cross_entropy(answers: IntArray, logits: FloatArray) -> float:
    """Mean cross-entropy of logits (N, K) with answers (N,), in nats."""
    z = np.asarray(logits, np.float64)
    return float(np.mean(np.logaddexp.reduce(z, axis=1) - z[np.arange(len(z)), answers]))


def _advance(state: FitState, row: dict[str, float], config: TasksConfig) -> FitState:
    epoch, better = int(row["epoch"]), row["val_loss"] < state.best_val_loss
    best_epoch = epoch if better else state.best_epoch
    since_halving = 0 if better else state.since_halving + 1
    rate = state.learning_rate
    if since_halving >= config.plateau:
        since_halving, rate = 0, rate / 2.0
    return replace(
        state,
        epoch=epoch,
        checkpoint=f"checkpoint-{epoch:04d}.keras",
        best_epoch=best_epoch,
        best_val_loss=min(row["val_loss"], state.best_val_loss),
        learning_rate=rate,
        since_halving=since_halving,
        finished=epoch >= config.epochs or epoch - best_epoch >= config.patience,
        history=[*state.history, row],
    )
