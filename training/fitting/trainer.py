"""Training loop: early stopping, weight averaging, checkpoints and resuming."""

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from lungwatch.errors import ConfigError, DatasetError, LungwatchError
from lungwatch.files import replacing
from lungwatch.training.data.dataset import ImageClass, LabelledImage, Sample
from lungwatch.training.data.pixels import FloatArray, KerasModel, Tensor
from lungwatch.training.evaluation.calibration import fit_calibration
from lungwatch.training.evaluation.metrics import log_loss, roc_auc
from lungwatch.training.fitting.augmentation import Augmentation, augment
from lungwatch.training.fitting.run import Progress, RunFolder
from lungwatch.training.networks.weights import save_keras


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


def read_fit_state(run: RunFolder) -> FitState | None:
    """Read where a run stands; None if it has not come that far."""
    return FitState(**run.read("state.json")) if (run.root / "state.json").exists() else None


def average_file(run: RunFolder, state: FitState) -> Path:
    """Name the file beside the checkpoint that holds the weight average."""
    return (run.root / state.checkpoint).with_suffix(".npz")


def memory_file(run: RunFolder, state: FitState) -> Path:
    """Name the file beside the checkpoint that holds what the lesson learnt besides."""
    return (run.root / state.checkpoint).with_suffix(".memory.npz")


def forget_checkpoint(run: RunFolder, state: FitState) -> None:
    """Remove a state's checkpoint and what lies beside it, if there is one."""
    if state.checkpoint:
        (run.root / state.checkpoint).unlink(missing_ok=True)
        average_file(run, state).unlink(missing_ok=True)
        memory_file(run, state).unlink(missing_ok=True)


def advance(state: FitState, row: dict[str, float], config: FitConfig) -> FitState:
    """Return the state after an epoch, from its row of the history."""
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
    return replace(new, finished=is_finished(new, config))


def is_finished(state: FitState, config: FitConfig) -> bool:
    """Tell whether all epochs ran, or the validation loss stopped falling."""
    is_stopped = config.patience is not None and state.epoch - state.best_epoch >= config.patience
    return state.epoch >= config.epochs or is_stopped


def sampling_weights(
    samples: Sequence[Sample],
    power: float = 0.5,
    shares: Mapping[ImageClass, float] | None = None,
) -> NDArray[np.float64]:
    """Probability of drawing each sample.

    COVID and the rest get one half each, or each finding its share of `shares`, brought to a
    sum of 1 over the findings that occur. Within each, a group of n images from one source
    with one finding gets a share in proportion to n ** power: 1 takes images as they come,
    0 makes the groups equal. In between, small groups count for more, above all the other
    pneumonias from the collections that the COVID images come from: only they tell the
    network that the source is not the answer.

    Returns
    -------
    numpy.ndarray
        float64, shape (N,), summing to 1.
    """
    groups = [(s.positive, s.source, s.finding) for s in samples]
    sizes = Counter(groups)
    weights = np.array([sizes[group] ** (power - 1.0) for group in groups])
    if shares is None:
        parts = np.array([s.positive for s in samples], dtype=object)
        wanted: Mapping[Any, float] = {True: 0.5, False: 0.5}
    else:
        parts = np.array([s.finding for s in samples], dtype=object)
        wanted = shares
    for part in sorted(set(parts)):
        mask = parts == part
        weights[mask] *= wanted[part] / weights[mask].sum()
    return np.asarray(weights / weights.sum(), dtype=np.float64)


def epoch_order(
    weights: NDArray[np.float64], rng: np.random.Generator, length: int
) -> NDArray[np.intp]:
    """Draw `length` indices with replacement.

    Low-variance (systematic) drawing: each sample comes up the floor or the ceiling of its
    expected number of times, so that an epoch misses as few images as possible.

    Source: Carpenter, Clifford, Fearnhead 1999.
    """
    permutation = rng.permutation(len(weights))
    edges = np.cumsum(weights[permutation])
    points = (np.arange(length) + rng.uniform()) / length
    drawn = np.searchsorted(edges, points * edges[-1], side="right")
    order = permutation[np.minimum(drawn, len(weights) - 1)]
    return np.asarray(rng.permutation(order), dtype=np.intp)


Step = Callable[[FloatArray, FloatArray], tuple[Tensor, Tensor]]


def make_step(model: KerasModel) -> Step:
    """Make the function that lets a compiled network learn from one batch.

    Returns
    -------
    function
        Of pixels (N, S, S, 1) and targets (N,), 0..1, soft ones included, to the mean
        cross-entropy in nats and the binary logits (N,) before the step.
    """
    import tensorflow as tf

    # Variables must not be made while a graph is traced.
    model.optimizer.build(model.trainable_variables)

    def step(pixels: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        with tf.GradientTape() as tape:
            logits = model(pixels, training=True)[:, 0]
            losses = tf.nn.sigmoid_cross_entropy_with_logits(labels=targets, logits=logits)
            loss = tf.reduce_mean(losses)
        gradients = tape.gradient(loss, model.trainable_variables)
        model.optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
        return loss, logits

    traced: Step = tf.function(step, reduce_retracing=True)
    return traced


ShownBatch = tuple[Any, ...]


@dataclass(frozen=True, kw_only=True)
class BatchAugmentation:
    """Functions that belong together.

    Attributes
    ----------
    show
        From the indices of a batch's images and a source of chance to what the step takes,
        pixels (N, S, S, 1) and targets (N,) first.
    step
        From that to the mean loss and the binary logits (N,) before the step.
    variables
        What the step changes besides the network's and its optimiser's variables.
    notes
        Returns what is worth a column in the history, by name.
    """

    show: Callable[[NDArray[np.intp], np.random.Generator], ShownBatch]
    step: Callable[..., tuple[Tensor, Tensor]]
    variables: Sequence[Tensor] = ()
    notes: Callable[[], dict[str, float]] = dict

    def batches(
        self, order: Iterable[NDArray[np.intp]], rng: np.random.Generator
    ) -> Iterator[ShownBatch]:
        """Show batch after batch, each made ready while the one before is learnt from.

        One thread makes them all, in order, so chance is drawn as if there were none.
        """
        with ThreadPoolExecutor(1, thread_name_prefix="show") as pool:
            waiting = None
            for indices in order:
                coming = pool.submit(self.show, indices, rng)
                if waiting is not None:
                    yield waiting.result()
                waiting = coming
            if waiting is not None:
                yield waiting.result()


class WeightAverage:
    """Exponential moving average over steps, batch-norm statistics included."""

    def __init__(self, model: KerasModel, decay: float) -> None:
        self._model = model
        self._decay = decay
        self._mean: list[NDArray[np.float32]] = [w.copy() for w in model.get_weights()]
        self._steps = 0

    def update(self) -> None:
        """Take the network's present weights in; early on the average follows faster."""
        self._steps += 1
        decay = min(self._decay, self._steps / (self._steps + 9.0))
        for index, weight in enumerate(self._model.get_weights()):
            self._mean[index] += (1.0 - decay) * (weight - self._mean[index])

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Let the network have the averaged weights for a while."""
        own = self._model.get_weights()
        self._model.set_weights(self._mean)
        try:
            yield
        finally:
            self._model.set_weights(own)

    def save(self, target: Path) -> None:
        """Write the average to an .npz file, for resuming."""
        with replacing(target) as temporary:
            np.savez(temporary, np.array(self._steps), *self._mean)

    def load(self, source: Path) -> None:
        """Read what `save` wrote."""
        with np.load(source) as arrays:
            self._steps = int(arrays["arr_0"])
            self._mean = [arrays[f"arr_{index + 1}"] for index in range(len(self._mean))]


def save_memory(variables: Sequence[Tensor], target: Path) -> None:
    """Write the variables' values to an .npz file, whole or not at all."""
    with replacing(target) as temporary:
        np.savez(temporary, *(np.asarray(variable) for variable in variables))


def load_memory(variables: Sequence[Tensor], source: Path) -> None:
    """Give the variables the values that `save_memory` wrote.

    Raises
    ------
    ConfigError
        If the file is missing or was written for other variables.
    """
    try:
        with np.load(source) as arrays:
            values = [arrays[f"arr_{index}"] for index in range(len(variables))]
    except (FileNotFoundError, KeyError) as error:
        raise ConfigError(
            f"{source.name} does not hold what the lesson had learnt; train anew"
        ) from error
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)


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
    lesson: Callable[[KerasModel], BatchAugmentation] | None = None,
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

    state = read_fit_state(run) or FitState(learning_rate=config.rate(1))
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
    lesson: BatchAugmentation,
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


def _plain_lesson(model: KerasModel, data: FitData, config: FitConfig) -> BatchAugmentation:
    def show(indices: NDArray[np.intp], rng: np.random.Generator) -> ShownBatch:
        pixels = augment(data.train_pixels[indices], config.augmentation, rng)
        return pixels, data.train_targets[indices]

    return BatchAugmentation(show=show, step=make_step(model))


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


IntArray = NDArray[np.int64]

TASKS = ("finding", "covid", "source")

_COVID = "COVID"


@dataclass(frozen=True, kw_only=True)
class Task:
    """A question with a few exclusive answers.

    Attributes
    ----------
    name
        "finding": which label; "covid": COVID against the rest; "source": which collection.
    weight
        Of its cross-entropy in the loss.
    answers
        The classes, in the order of the head's outputs.
    """

    name: str
    weight: float
    answers: tuple[str, ...]

    def targets(self, samples: Sequence[LabelledImage]) -> IntArray:
        """Return each sample's answer as its number, int64, shape (N,).

        Raises
        ------
        DatasetError
            If an answer does not occur in what the task was made from.
        """
        numbers = {answer: number for number, answer in enumerate(self.answers)}
        found = [_answer(self.name, sample) for sample in samples]
        if unknown := sorted(set(found) - set(numbers)):
            raise DatasetError(
                f"task {self.name}: {', '.join(unknown)} occurs in val and not in train"
            )
        return np.array([numbers[answer] for answer in found], dtype=np.int64)


def parse_tasks(texts: Sequence[str]) -> dict[str, float]:
    """Read "finding", "covid=0.5" and the like into weights by name.

    Raises
    ------
    ConfigError
        If there is no such task, its weight is no positive number, or there is none.
    """
    weights: dict[str, float] = {}
    for text in texts:
        name, _, number = text.partition("=")
        try:
            weight = float(number or 1.0)
        except ValueError:
            weight = 0.0
        if name not in TASKS or not 0 < weight < float("inf"):
            raise ConfigError(f"task {text!r}: write NAME or NAME=WEIGHT, of {', '.join(TASKS)}")
        weights[name] = weight
    if not weights:
        raise ConfigError(f"no task: give one of {', '.join(TASKS)}")
    return weights


def make_tasks(weights: dict[str, float], train: Sequence[LabelledImage]) -> list[Task]:
    """Make the tasks that these images can answer.

    Raises
    ------
    DatasetError
        If a task has one answer only.
    """
    tasks = []
    for name, weight in weights.items():
        answers = tuple(sorted({_answer(name, sample) for sample in train}))
        if len(answers) < 2:
            raise DatasetError(f"task {name}: every image has the answer {answers[0]}")
        tasks.append(Task(name=name, weight=weight, answers=answers))
    return tasks


def drawing_weights(samples: Sequence[LabelledImage], power: float = 0.5) -> NDArray[np.float64]:
    """Probability of drawing each sample, float64 (N,), summing to 1.

    A group of n images of one source and label gets a share in proportion to n ** power; see
    `trainer`.
    """
    groups = [(s.source, s.label) for s in samples]
    sizes = Counter(groups)
    weights = np.array([sizes[group] ** (power - 1.0) for group in groups])
    return np.asarray(weights / weights.sum())


def _answer(task: str, sample: LabelledImage) -> str:
    if task == "covid":
        return _COVID if sample.label == _COVID else f"not {_COVID}"
    return sample.label if task == "finding" else sample.source


_BATCH = 64


@dataclass(frozen=True, kw_only=True)
class TasksConfig:
    """How to train; every value as in `trainer.FitConfig`."""

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
        As for `trainer.fit`.
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
        loss = _train_tasks_epoch(model, average, data, config, epoch=epoch, on_batch=on_batch)
        with average.applied():
            row = {"epoch": epoch, "loss": loss, **_validate_tasks(model, tasks, data)}
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


def _train_tasks_epoch(
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
    _seed_tasks_dropout(model, config.seed, epoch, keras.layers.Dropout)
    total = 0.0
    for batch, indices in enumerate(np.split(order, batches), start=1):
        pixels = augment(data.train_pixels[indices], config.augmentation, rng)
        answers = {name: values[indices] for name, values in data.train_answers.items()}
        total += float(model.train_on_batch(pixels, answers, return_dict=True)["loss"])
        average.update()
        if on_batch:
            on_batch(epoch, batch, batches)
    return total / batches


def _seed_tasks_dropout(model: KerasModel, seed: int, epoch: int, kind: Any) -> None:  # noqa: ANN401
    # Keras does not save the state of its seed generators; see `trainer`.
    for index, layer in enumerate(model.layers):
        if isinstance(layer, kind):
            layer.seed_generator.state.assign([seed + 1000 * index, epoch])


def _validate_tasks(model: KerasModel, tasks: list[Task], data: TasksData) -> dict[str, float]:
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


Batch = TypeVar("Batch")


_STEP_COLUMNS = ("phase", "step", "loss", "learning_rate")

_WARM_UP = 50

_WORKERS = 2


@dataclass(frozen=True, kw_only=True, eq=False)
class StepSchedule:
    """How the steps of a run are taken.

    Attributes
    ----------
    run
        The run folder.
    learning_rate
        Of the steepest step.
    checkpoint_steps
        After how many steps each the run is made safe.
    progress
        Listeners; an epoch is a stretch of steps between two checkpoints.
    """

    run: RunFolder
    learning_rate: float
    checkpoint_steps: int
    progress: Progress = field(default_factory=Progress)


def read_state(run: RunFolder) -> dict[str, Any]:
    """Return how far a run has come: `phase`, from 1, `step`, `checkpoint` and `history`."""
    if (run.root / "state.json").exists():
        return run.read("state.json")
    return {"phase": 1, "step": 0, "checkpoint": "", "history": []}


def write_state(run: RunFolder, state: dict[str, Any]) -> None:
    """Write how far a run has come, and its history as a table."""
    run.write("state.json", state)
    if state["history"]:
        run.write_table("history.csv", state["history"], columns=_STEP_COLUMNS)


def remove_checkpoints(run: RunFolder) -> None:
    """Remove the checkpoints of a finished run."""
    for left in run.root.glob("checkpoint-*.keras"):
        left.unlink(missing_ok=True)


def run_steps(
    course: StepSchedule,
    state: dict[str, Any],
    steps: int,
    *,
    build: Callable[[], KerasModel],
    draw: Callable[[int], Batch],
    learn: Callable[[KerasModel, Batch, int], float],
) -> KerasModel:
    """Take the steps of the state's phase that are left, and average the weights in.

    Parameters
    ----------
    course
        How.
    state
        Of `read_state`; brought forward and written with every checkpoint.
    steps
        Steps of the phase.
    build
        Makes the compiled network, where no checkpoint holds it.
    draw
        Draws the batch of a step, by its number; called in other threads.
    learn
        Takes a step with a network, the batch and its number; returns the loss.

    Returns
    -------
    keras.Model
        The network with its averaged weights.
    """
    import keras

    run, progress, every = course.run, course.progress, course.checkpoint_steps
    phase = state["phase"]
    if state["checkpoint"]:
        model = keras.models.load_model(run.root / state["checkpoint"])
    else:
        model = build()
    losses: list[float] = []
    stretch = len(state["history"]) + 1
    for step, batch in drawn_ahead(draw, range(state["step"], steps)):
        rate = course.learning_rate * step_rate(step, steps)
        model.optimizer.learning_rate.assign(rate)
        losses.append(learn(model, batch, step))
        if progress.on_batch:
            progress.on_batch(stretch, step % every + 1, every)
        if (step + 1) % every and step + 1 < steps:
            continue
        row = {
            "phase": phase,
            "step": step + 1,
            "loss": sum(losses) / len(losses),
            "learning_rate": rate,
        }
        before = state["checkpoint"]
        state["history"].append(row)
        state.update(step=step + 1, checkpoint=f"checkpoint-{phase}-{step + 1:06d}.keras")
        save_keras(model, run.root / state["checkpoint"])
        write_state(run, state)
        if before:
            (run.root / before).unlink(missing_ok=True)
        if progress.on_epoch:
            progress.on_epoch({**row, "epoch": stretch})
        losses, stretch = [], stretch + 1
    model.optimizer.finalize_variable_values(model.trainable_variables)
    return model


def drawn_ahead(
    draw: Callable[[int], Batch], steps: range, *, workers: int = _WORKERS
) -> Iterator[tuple[int, Batch]]:
    """Draw each step's batch, a few steps ahead; OpenCV and NumPy let other threads run."""
    with ThreadPoolExecutor(workers, thread_name_prefix="draw") as pool:
        waiting = iter(steps)
        ahead = [(step, pool.submit(draw, step)) for step in islice(waiting, workers + 1)]
        while ahead:
            step, drawn = ahead.pop(0)
            batch = drawn.result()
            ahead += [(later, pool.submit(draw, later)) for later in islice(waiting, 1)]
            yield step, batch


def step_rate(step: int, steps: int) -> float:
    """Return the share of the learning rate: a short rise, then half a cosine."""
    falling = 0.5 * (1.0 + math.cos(math.pi * step / steps)) + 0.01
    return min(1.0, (step + 1) / _WARM_UP) * falling


def seed_dropout(model: KerasModel, seed: tuple[int, int]) -> None:
    """Seed what a network leaves out in its next step: a checkpoint does not hold that state."""
    import keras

    for layer in model.layers:
        if isinstance(layer, keras.layers.Dropout):
            layer.seed_generator.state.assign(seed)
