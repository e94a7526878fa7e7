"""Training of a head on the features of a frozen backbone, with a grid search over heads."""

import math
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lungwatch.errors import ConfigError
from lungwatch.files import replacing
from lungwatch.training.data.pixels import FloatArray, KerasModel
from lungwatch.training.fitting.augmentation import NO_AUGMENTATION, Augmentation, augment
from lungwatch.training.fitting.preparation import Prepared
from lungwatch.training.fitting.run import Progress, RunFolder
from lungwatch.training.fitting.search import Choices, Outcome, SearchConfig, Space, Trial, search
from lungwatch.training.fitting.tasks import (
    FitData,
    binary_task,
    compile_binary,
    epoch_batches,
    sampling_weights,
)
from lungwatch.training.fitting.trainer import FitConfig, FitState, Trainer, TrainingTask
from lungwatch.training.networks.heads import FEATURES, HIDDEN, LOGIT, POOLED, attach_head
from lungwatch.training.networks.weights import save_keras

Phase = Literal["frozen", "fine-tuned"]
FROZEN: Phase = "frozen"
FINE_TUNED: Phase = "fine-tuned"


def best_phase(done: dict[Phase, FitState]) -> tuple[Phase, FitState]:
    """Choose the phase to keep, and join the histories of all.

    Returns
    -------
    phase, state
        The phase with the lowest calibrated validation loss, the earlier one on a tie; and
        the history of all, epochs counted through.
    """
    kept = min(done, key=lambda phase: done[phase].best_val_loss)
    rows: list[dict[str, float]] = []
    best = 0
    for phase, state in done.items():
        if phase == kept:
            best = len(rows) + state.best_epoch
        rows += [{**row, "epoch": len(rows) + row["epoch"]} for row in state.history]
    return kept, replace(done[kept], epoch=len(rows), best_epoch=best, history=rows)


_BATCH = 64


@dataclass(frozen=True, kw_only=True)
class FeatureCopies:
    """Augmented copies of a set of images.

    Attributes
    ----------
    count
        How many; with 0, the images as they are.
    augmentation
        The limits of the changes.
    seed
        Of the changes, together with the copy's number.
    """

    count: int
    augmentation: Augmentation
    seed: int


def pooled_features(
    model: KerasModel,
    pixels: FloatArray,
    copies: FeatureCopies,
    cache: Path,
    *,
    on_copy: Callable[[int, int], None] | None = None,
) -> FloatArray:
    """Compute a frozen network's pooled features, or take them from the cache.

    Parameters
    ----------
    model
        What `build_transfer` built.
    pixels
        float32, shape (N, S, S, 1), 0..1.
    copies
        What is made of them first.
    cache
        Folder of the copies already computed, one .npy file each; it belongs to this network,
        these images and these copies alone. It is made.
    on_copy
        Called with (copy, copies) after each.

    Returns
    -------
    numpy.ndarray
        float32, shape (K, N, C), K = max(1, copies.count).
    """
    import keras

    cache.mkdir(parents=True, exist_ok=True)
    pooled = keras.Model(model.input, model.get_layer(POOLED).output)
    count = max(1, copies.count)
    limits = copies.augmentation if copies.count else NO_AUGMENTATION
    made = []
    for number in range(1, count + 1):
        file = cache / f"copy-{number:02d}.npy"
        if not file.exists():
            rng = np.random.default_rng([copies.seed, number])
            _save(_features(pooled, pixels, limits, rng), file)
        made.append(np.load(file))
        if on_copy:
            on_copy(number, count)
    return np.stack(made)


def _features(
    pooled: KerasModel, pixels: FloatArray, limits: Augmentation, rng: np.random.Generator
) -> FloatArray:
    parts = []
    for batch in np.array_split(pixels, max(1, math.ceil(len(pixels) / _BATCH))):
        seen = batch if limits == NO_AUGMENTATION else augment(batch, limits, rng)
        parts.append(np.asarray(pooled.predict_on_batch(seen), np.float32))
    return np.concatenate(parts)


def _save(array: FloatArray, target: Path) -> None:
    with replacing(target) as temporary:
        np.save(temporary, array)


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """Training of the head; as `FitConfig`, but the learning rate is never halved.

    Attributes
    ----------
    copies
        How many augmented copies of each training image there are.
    """

    epochs: int = 40
    batch_size: int = 32
    learning_rate: float = 1e-3
    patience: int | None = 5
    average: float = 0.99
    weight_decay: float = 1e-3
    seed: int = 1
    copies: int = 6
    augmentation: Augmentation = field(default_factory=Augmentation)

    def __post_init__(self) -> None:
        if self.copies < 0:
            raise ConfigError("copies must not be below 0")
        self.fit_config()

    def fit_config(self) -> FitConfig:
        """Return the configuration of the training loop."""
        values = {name: value for name, value in vars(self).items() if name != "copies"}
        return FitConfig(plateau=self.epochs + 1, **values)


@dataclass(frozen=True, kw_only=True, eq=False)
class HeadData:
    """Features (K, N, C), targets (N,), drawing weights (N,); validation (M, C), (M,) or None."""

    features: FloatArray
    targets: FloatArray
    weights: NDArray[np.float64]
    val_features: FloatArray | None = None
    val_targets: FloatArray | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class FittedHead:
    """A trained head.

    Attributes
    ----------
    weights
        Of the hidden and the last layer, of the best epoch (without validation, the last one).
    state
        The final state of the training, with its history.
    """

    weights: list[FloatArray]
    state: FitState


def fit_head(
    data: HeadData,
    config: HeadConfig,
    *,
    dense_units: int,
    dropout: float,
    on_epoch: Callable[[dict[str, float]], None] | None = None,
) -> FittedHead:
    """Train a fresh head in memory until the validation loss no longer falls.

    The same data, configuration and machine give the same weights.

    Parameters
    ----------
    data, config
        What to learn from, and how.
    dense_units, dropout
        The head's shape; see `lungwatch.training.networks.heads`.
    on_epoch
        Called with the epoch's row of the history.

    Raises
    ------
    DivergedError
        If the loss is no longer finite.
    """
    import keras

    keras.utils.set_random_seed(config.seed)
    fitting = config.fit_config()
    kept: list[FloatArray] = []

    def build() -> KerasModel:
        # One cell of a map: pooling leaves it as it is, so the head is the whole network's own.
        cell = keras.Input((1, 1, data.features.shape[-1]), name=FEATURES)
        logit = attach_head(cell, dense_units=dense_units, dropout=dropout)
        return compile_binary(keras.Model(cell, logit), fitting)

    def task(model: KerasModel) -> TrainingTask:
        def order(epoch: int, rng: np.random.Generator) -> list[tuple[int, NDArray[np.intp]]]:
            copy = epoch % len(data.features)
            return [(copy, i) for i in epoch_batches(data.weights, rng, config.batch_size)]

        def show(
            item: tuple[int, NDArray[np.intp]], _: np.random.Generator
        ) -> tuple[FloatArray, FloatArray]:
            copy, indices = item
            return _cells(data.features[copy][indices]), data.targets[indices]

        images = FitData(
            train_pixels=data.features,
            train_targets=data.targets,
            train_weights=data.weights,
            val_pixels=None if data.val_features is None else _cells(data.val_features),
            val_targets=data.val_targets,
        )
        return replace(binary_task(model, images, fitting, show=show), order=order)

    def keep(model: KerasModel) -> None:
        kept[:] = model.get_weights()

    listeners = Progress(on_epoch=on_epoch)
    state = Trainer(build, task, fitting, progress=listeners, keep=keep).fit()
    return FittedHead(weights=kept, state=replace(state, checkpoint=""))


def _cells(features: FloatArray) -> FloatArray:
    return features[:, np.newaxis, np.newaxis]


def put_head(model: KerasModel, weights: list[FloatArray]) -> None:
    """Give a whole network a head's weights, as `FittedHead` has them."""
    model.get_layer(HIDDEN).set_weights(weights[:2])
    model.get_layer(LOGIT).set_weights(weights[2:])


HEAD_GRID: Space = {
    "batch_size": Choices(rungs=(8, 16, 32, 64, 128), first=1, last=3),
    "learning_rate": Choices(rungs=(3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2), first=2, last=4),
    "dropout": Choices(rungs=(0.0, 0.1, 0.3, 0.5, 0.7, 0.8), first=1, last=3),
}


@dataclass(frozen=True, kw_only=True)
class HeadChoice:
    """Parameters of a head: its training and its dropout."""

    config: HeadConfig
    dropout: float

    def with_trial(self, trial: Trial) -> "HeadChoice":
        """Return the choice with a trial's parameters and seed."""
        values = trial.parameters
        return HeadChoice(
            config=replace(
                self.config,
                batch_size=int(values["batch_size"]),
                learning_rate=float(values["learning_rate"]),
                seed=trial.seed,
            ),
            dropout=float(values["dropout"]),
        )

    def fit(
        self,
        data: HeadData,
        dense_units: int,
        on_epoch: Callable[[dict[str, float]], None] | None = None,
    ) -> FittedHead:
        """Train a fresh head so."""
        return fit_head(
            data, self.config, dense_units=dense_units, dropout=self.dropout, on_epoch=on_epoch
        )

    def to_dict(self) -> dict[str, Any]:
        """Return what the search chooses, as plain values."""
        return {
            "batch_size": self.config.batch_size,
            "learning_rate": self.config.learning_rate,
            "dropout": self.dropout,
        }


def search_head(
    choice: HeadChoice,
    data: HeadData,
    dense_units: int,
    run: RunFolder,
    *,
    space: Space = HEAD_GRID,
    extensions: int = 2,
    on_trial: Callable[[dict[str, Any]], None] | None = None,
) -> HeadChoice:
    """Try a grid of batch size, learning rate and dropout; return the best.

    The value is the calibrated validation loss of the best epoch. A best value at the edge of
    the grid extends it; see `search`, which also says what is in `run`.
    """

    def objective(trial: Trial) -> Outcome:
        found = choice.with_trial(trial).fit(data, dense_units).state
        return Outcome(value=found.best_val_loss, epochs=found.best_epoch)

    config = SearchConfig(sampler="grid", extensions=extensions, seed=choice.config.seed)
    return choice.with_trial(search(space, objective, config, run, on_trial=on_trial).best)


_CHOICE = "choice.json"
_FEATURES = "features"


@dataclass(frozen=True, kw_only=True, eq=False)
class FrozenPhase:
    """Phase with the backbone frozen: features, search over heads, training, retraining.

    Attributes
    ----------
    prepared
        The data.
    build
        Makes the whole network, its backbone frozen, with that much dropout.
    dense_units
        Width of the hidden layer.
    seed
        Of the changes to images.
    run
        The begun run folder; the phase's own lies in it, and the features until they are
        forgotten.
    """

    prepared: Prepared
    build: Callable[[float], KerasModel]
    dense_units: int
    seed: int
    run: RunFolder
    progress: Progress

    @property
    def folder(self) -> RunFolder:
        """The phase's own folder: state, history, choice and network."""
        return RunFolder(root=self.run.root / FROZEN)

    def train(
        self, choice: HeadChoice, space: Space | None, config: dict[str, Any]
    ) -> tuple[FitState, HeadChoice]:
        """Search if there is a space, train the head, leave the whole network in the folder.

        Returns
        -------
        state, choice
            How the training went, and with which parameters.
        """
        folder = self.folder
        folder.begin(config, resume=True)
        if state := FitState.read(folder):
            return state, _read_choice(folder, choice)
        data = self._data(choice.config)
        if space is not None:
            choice = search_head(
                choice,
                data,
                self.dense_units,
                self.run,
                space=space,
                on_trial=self.progress.on_trial,
            )
        fitted = choice.fit(data, self.dense_units, self.progress.on_epoch)
        self.save(fitted, choice, folder)
        folder.write(_CHOICE, {**asdict(choice.config), "dropout": choice.dropout})
        folder.write_table("history.csv", fitted.state.history)
        folder.write("state.json", asdict(fitted.state))
        return fitted.state, choice

    def retrain(self, state: FitState, choice: HeadChoice) -> tuple[FittedHead, HeadChoice]:
        """Train a fresh head on training and validation images for the chosen epochs."""
        fixed = replace(
            choice, config=replace(choice.config, epochs=state.best_epoch, patience=None)
        )
        train = self._copies("train", fixed.config)
        relearnt = self.prepared.relearnt
        val = self._copies("val", fixed.config)[:, relearnt]
        more = self.prepared.val.take(relearnt)
        samples = [*self.prepared.train.samples, *more.samples]
        data = HeadData(
            features=np.concatenate([train, val], axis=1),
            targets=np.concatenate([self.prepared.train.targets, more.targets]),
            weights=sampling_weights(samples),
        )
        return fixed.fit(data, self.dense_units), fixed

    def save(self, fitted: FittedHead, choice: HeadChoice, folder: RunFolder) -> None:
        """Write the whole network with a head."""
        model = self.build(choice.dropout)
        put_head(model, fitted.weights)
        save_keras(model, folder.model)

    def forget_features(self) -> None:
        """Remove the features, once nothing will be trained on them any more."""
        shutil.rmtree(self.run.root / _FEATURES, ignore_errors=True)

    def _data(self, config: HeadConfig) -> HeadData:
        return HeadData(
            features=self._copies("train", config),
            targets=self.prepared.train.targets,
            weights=sampling_weights(self.prepared.train.samples),
            val_features=self._features("val", replace(config, copies=0), "val-as-is")[0],
            val_targets=self.prepared.val.targets,
        )

    def _copies(self, part: str, config: HeadConfig) -> FloatArray:
        return self._features(part, config, f"{part}-copies")

    def _features(self, part: str, config: HeadConfig, name: str) -> FloatArray:
        on_batch = self.progress.on_batch
        return pooled_features(
            self.build(0.0),
            self.prepared.train.pixels if part == "train" else self.prepared.val.pixels,
            FeatureCopies(
                count=config.copies,
                augmentation=config.augmentation,
                seed=self.seed + (part == "val"),
            ),
            self.run.root / _FEATURES / name,
            on_copy=on_batch and (lambda copy, copies: on_batch(0, copy, copies)),
        )


def _read_choice(folder: RunFolder, choice: HeadChoice) -> HeadChoice:
    values = folder.read(_CHOICE)
    names = ("batch_size", "learning_rate", "seed")
    return HeadChoice(
        config=replace(choice.config, **{name: values[name] for name in names}),
        dropout=values["dropout"],
    )
