"""The phase in which the backbone is frozen: features once, a grid over heads, the best head."""

import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from lungwatch.training.data.pixels import FloatArray, KerasModel
from lungwatch.training.fit_head import FittedHead, HeadConfig, HeadData, put_head
from lungwatch.training.fit_state import FitState
from lungwatch.training.frozen_features import FeatureCopies, pooled_features
from lungwatch.training.keras_file import save_keras
from lungwatch.training.phases import FROZEN
from lungwatch.training.prepare import Prepared
from lungwatch.training.progress import Progress
from lungwatch.training.run import RunFolder
from lungwatch.training.sampling import sampling_weights
from lungwatch.training.search_space import Space
from lungwatch.training.transfer_grid import HeadChoice, search_head

_CHOICE = "choice.json"
_FEATURES = "features"


@dataclass(frozen=True, kw_only=True, eq=False)
class FrozenPhase:
    """Everything that happens on features.

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
    progress
        Listeners.
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
        if (folder.root / "state.json").exists():
            return FitState(**folder.read("state.json")), _read_choice(folder, choice)
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
        state = _state(fitted)
        folder.write_table("history.csv", fitted.history)
        folder.write("state.json", asdict(state))
        return state, choice

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


def _state(fitted: FittedHead) -> FitState:
    return FitState(
        epoch=len(fitted.history),
        best_epoch=fitted.best_epoch,
        best_val_loss=fitted.best_val_loss,
        finished=True,
        history=fitted.history,
    )


def _read_choice(folder: RunFolder, choice: HeadChoice) -> HeadChoice:
    values = folder.read(_CHOICE)
    names = ("batch_size", "learning_rate", "seed")
    return HeadChoice(
        config=replace(choice.config, **{name: values[name] for name in names}),
        dropout=values["dropout"],
    )
