"""Training loop: `Trainer` repeats the epochs of a task, keeps the best network, and resumes.

Every epoch draws its chance from (seed, epoch) and ends with a checkpoint that includes the
optimiser, so that an interrupted run continues to the same numbers.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lungwatch.errors import ConfigError, LungwatchError
from lungwatch.files import replacing
from lungwatch.training.data.pixels import KerasModel, Tensor
from lungwatch.training.fitting.augmentation import Augmentation
from lungwatch.training.fitting.run import Progress, RunFolder
from lungwatch.training.networks.weights import save_keras


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """Configuration of a training.

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


@dataclass(frozen=True, kw_only=True)
class FitState:
    """State of a run, written after each epoch, once its checkpoint is safe."""

    epoch: int = 0
    checkpoint: str = ""
    best_epoch: int = 0
    best_val_loss: float = math.inf
    learning_rate: float = 0.0
    since_halving: int = 0
    finished: bool = False
    history: list[dict[str, float]] = field(default_factory=list)

    @classmethod
    def read(cls, run: RunFolder) -> "FitState | None":
        """Read the state of a run; None before its first epoch is complete."""
        if not (run.root / "state.json").exists():
            return None
        values = run.read("state.json")
        # Runs of segmenters and gates that an earlier version began name neither.
        values.setdefault("epoch", len(values["history"]))
        values.setdefault("checkpoint", f"checkpoint-{values['epoch']:04d}.keras")
        known = {one.name for one in fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in known})

    def is_finished(self, config: FitConfig) -> bool:
        """Tell whether all epochs ran, or the monitored value stopped falling."""
        patience = config.patience
        is_stopped = patience is not None and self.epoch - self.best_epoch >= patience
        return self.epoch >= config.epochs or is_stopped

    def after(self, row: dict[str, float], config: FitConfig, monitor: str | None) -> "FitState":
        """Return the state after an epoch, from its row of the history."""
        epoch = int(row["epoch"])
        value = row.get(monitor) if monitor else None
        # With nothing to compare by, the last epoch is the one to keep.
        better = value is None or config.keep == "last" or value < self.best_val_loss
        since_halving = 0 if better else self.since_halving + 1
        learning_rate = self.learning_rate
        if config.learning_rates:
            learning_rate = config.rate(epoch + 1)
        elif since_halving >= config.plateau:
            since_halving, learning_rate = 0, learning_rate / 2.0
        best = self.best_val_loss if value is None else min(value, self.best_val_loss)
        new = replace(
            self,
            epoch=epoch,
            checkpoint=f"checkpoint-{epoch:04d}.keras",
            best_epoch=epoch if better else self.best_epoch,
            best_val_loss=best,
            learning_rate=learning_rate,
            since_halving=since_halving,
            history=[*self.history, row],
        )
        return replace(new, finished=new.is_finished(config))


class DivergedError(LungwatchError):
    """The loss is no longer a finite number; a lower learning rate may help."""


@dataclass(frozen=True, kw_only=True)
class TrainingTask:
    """Task of a network: the batches of an epoch, the training step, and the validation.

    Attributes
    ----------
    order
        From the epoch, from 1 on, and a random generator to one item for each batch; also
        seeds dropout, whose state a checkpoint does not hold.
    show
        From an item and the same generator to what `step` takes; called in other threads,
        a few batches ahead.
    step
        Learns from a batch; returns the mean loss, and of a binary network how many images
        it had right before the step. A loss of None does not count.
    validate
        Measures the network, whose weights are averaged, into columns of the history.
    monitor
        Column of `validate`, less being better, that chooses the best epoch; without it, the
        network is kept after the last epoch only.
    variables
        What `step` changes besides the variables of the network and its optimiser.
    notes
        Further columns of an epoch.
    columns
        Of `history.csv`, in order; empty for all of them.
    workers
        Threads of `show`; above 1 only where it draws nothing from the generator.
    """

    order: Callable[[int, np.random.Generator], Sequence[Any]]
    show: Callable[[Any, np.random.Generator], tuple[Any, ...]]
    step: Callable[..., tuple[float | None, int | None]]
    validate: Callable[[], dict[str, float]] = dict
    monitor: str | None = None
    variables: Sequence[Tensor] = ()
    notes: Callable[[], dict[str, float]] = dict
    columns: tuple[str, ...] = ()
    workers: int = 1

    def batches(self, items: Sequence[Any], rng: np.random.Generator) -> Iterator[tuple[Any, ...]]:
        """Yield each batch, the next ones made meanwhile; OpenCV and NumPy release the GIL."""
        with ThreadPoolExecutor(self.workers, thread_name_prefix="show") as pool:
            waiting = iter(items)
            ahead = [
                pool.submit(self.show, item, rng) for item in islice(waiting, self.workers + 1)
            ]
            while ahead:
                batch = ahead.pop(0).result()
                ahead += [pool.submit(self.show, item, rng) for item in islice(waiting, 1)]
                yield batch


class WeightAverage:
    """Exponential moving average of a network's weights, batch-norm statistics included.

    It is what is validated and kept: single steps throw the logits of unfamiliar images about,
    their average does not. A decay of 0 averages nothing.

    Source: Polyak & Juditsky 1992; as an exponential average, Tarvainen & Valpola 2017.
    """

    def __init__(self, model: KerasModel, decay: float) -> None:
        self._model = model
        self._decay = decay
        self._mean: list[NDArray[np.float32]] = (
            [weight.copy() for weight in model.get_weights()] if decay else []
        )
        self._steps = 0

    def update(self) -> None:
        """Include the present weights; the first steps count for more."""
        self._steps += 1
        decay = min(self._decay, self._steps / (self._steps + 9.0))
        for index, weight in enumerate(self._model.get_weights() if decay else ()):
            self._mean[index] += (1.0 - decay) * (weight - self._mean[index])

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Give the network the averaged weights within a `with` block."""
        if not self._decay:
            yield
            return
        own = self._model.get_weights()
        self._model.set_weights(self._mean)
        try:
            yield
        finally:
            self._model.set_weights(own)

    def save(self, target: Path) -> None:
        """Write the average to an .npz file."""
        if self._decay:
            _save_arrays(target, [np.array(self._steps), *self._mean])

    def load(self, source: Path) -> None:
        """Read what `save` wrote."""
        if self._decay:
            steps, *self._mean = _load_arrays(source, len(self._mean) + 1)
            self._steps = int(steps)


def save_variables(variables: Sequence[Tensor], target: Path) -> None:
    """Write the values of variables to an .npz file, whole or not at all."""
    if variables:
        _save_arrays(target, [np.asarray(variable) for variable in variables])


def load_variables(variables: Sequence[Tensor], source: Path) -> None:
    """Give variables the values that `save_variables` wrote.

    Raises
    ------
    ConfigError
        If the file is missing or was written for other variables.
    """
    values = _load_arrays(source, len(variables)) if variables else []
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)


def _save_arrays(target: Path, arrays: Sequence[NDArray[Any]]) -> None:
    with replacing(target) as temporary:
        np.savez(temporary, *arrays)


def _load_arrays(source: Path, count: int) -> list[NDArray[Any]]:
    try:
        with np.load(source) as arrays:
            return [arrays[f"arr_{index}"] for index in range(count)]
    except (FileNotFoundError, KeyError) as error:
        raise ConfigError(f"{source.name} is not of this training; train anew") from error


class Trainer:
    """Training loop of every recipe.

    Parameters
    ----------
    build
        Makes the fresh network, compiled with its optimiser.
    task
        Makes the task of that network, or of the one that a checkpoint holds.
    config
        Epochs, stopping, averaging and seed.
    run
        A begun run folder; if it holds a state, training continues from there. None trains in
        memory.
    keep
        Called with the network, its weights averaged, after each epoch that is the best so
        far; by default writes it to the run folder.
    keep_checkpoint
        Leave the last checkpoint after all epochs, for going on with more of them.
    earlier_epochs
        Epochs of the run that belong to a phase before this one: at that epoch a fresh network
        is built.
    custom_objects
        What a checkpoint names besides Keras's own objects.
    """

    def __init__(
        self,
        build: Callable[[], KerasModel],
        task: Callable[[KerasModel], TrainingTask],
        config: FitConfig,
        run: RunFolder | None = None,
        *,
        progress: Progress | None = None,
        keep: Callable[[KerasModel], None] | None = None,
        keep_checkpoint: bool = False,
        earlier_epochs: int = 0,
        custom_objects: Mapping[str, Any] | None = None,
    ) -> None:
        self._build, self._make_task, self._config, self._run = build, task, config, run
        self._progress = progress or Progress()
        self._keep = keep or (lambda model: save_keras(model, self._file("model.keras")))
        self._keep_checkpoint = keep_checkpoint
        self._earlier_epochs = earlier_epochs
        self._custom_objects = custom_objects

    def fit(self) -> FitState:
        """Train until all epochs ran or the monitored value no longer falls.

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
        config = self._config
        state = self._run and FitState.read(self._run)
        state = state or FitState(learning_rate=config.rate(1))
        if state.is_finished(config):
            return state
        is_resumed = state.epoch > self._earlier_epochs
        self._model = self._load(state) if is_resumed else self._build()
        self._average = WeightAverage(self._model, config.average)
        self._task = self._make_task(self._model)
        if is_resumed:
            self._average.load(self._average_file(state))
            load_variables(self._task.variables, self._variables_file(state))
        while True:
            state = self._run_epoch(state)
            if state.finished:
                if not (self._keep_checkpoint and state.epoch >= config.epochs):
                    self._forget(state)
                return state

    def _run_epoch(self, old: FitState) -> FitState:
        task, epoch = self._task, old.epoch + 1
        row = {"epoch": epoch, **self._train(epoch)}
        with self._average.applied():
            row |= task.validate()
        row |= {"learning_rate": old.learning_rate, **task.notes()}
        state = old.after(row, self._config, task.monitor)
        if state.learning_rate != old.learning_rate:
            self._model.optimizer.learning_rate.assign(state.learning_rate)
        if self._run:
            save_keras(self._model, self._file(state.checkpoint))
            self._average.save(self._average_file(state))
            save_variables(task.variables, self._variables_file(state))
        if state.best_epoch == epoch and (task.monitor in row or state.finished):
            with self._average.applied():
                self._keep(self._model)
        if self._run:
            self._run.write("state.json", asdict(state))
            columns = [key for key in task.columns or row if key in row]
            table = [{key: line[key] for key in columns if key in line} for line in state.history]
            self._run.write_table("history.csv", table)
            self._forget(old)
        if self._progress.on_epoch:
            self._progress.on_epoch(row)
        return state

    def _train(self, epoch: int) -> dict[str, float]:
        """Train for an epoch; return the mean loss, and the accuracy where it is counted."""
        task, on_batch = self._task, self._progress.on_batch
        rng = np.random.default_rng([self._config.seed, epoch])
        items = task.order(epoch, rng)
        losses: list[float] = []
        right: int | None = None
        for number, batch in enumerate(task.batches(items, rng), start=1):
            loss, hits = task.step(*batch)
            if loss is not None:
                if not math.isfinite(loss):
                    raise DivergedError(f"the loss is {loss} in epoch {epoch}, batch {number}")
                losses.append(loss)
            if hits is not None:
                right = (right or 0) + hits
            self._average.update()
            if on_batch:
                on_batch(epoch, number, len(items))
        found = {"loss": sum(losses) / len(losses) if losses else math.nan}
        if right is not None:
            found["accuracy"] = right / (len(items) * self._config.batch_size)
        return found

    def _load(self, state: FitState) -> KerasModel:
        import keras

        file = self._file(state.checkpoint)
        if not file.exists():
            raise ConfigError(f"{file.parent} keeps no checkpoint to go on from; train anew")
        return keras.models.load_model(file, custom_objects=self._custom_objects)

    def _file(self, name: str) -> Path:
        assert self._run is not None  # without a folder nothing is written
        return self._run.root / name

    def _average_file(self, state: FitState) -> Path:
        return self._file(state.checkpoint).with_suffix(".npz")

    def _variables_file(self, state: FitState) -> Path:
        return self._file(state.checkpoint).with_suffix(".memory.npz")

    def _forget(self, state: FitState) -> None:
        """Remove a state's checkpoint and the files beside it, if there are any."""
        if self._run and state.checkpoint:
            for file in (
                self._file(state.checkpoint),
                self._average_file(state),
                self._variables_file(state),
            ):
                file.unlink(missing_ok=True)


def save_without_optimizer(
    model: KerasModel, build: Callable[[], KerasModel], target: Path
) -> None:
    """Write a trained network without its optimiser, which holds most of the file."""
    final = build()
    final.set_weights(model.get_weights())
    save_keras(final, target)
