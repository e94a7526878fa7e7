"""The grid search over the head, on the features of a frozen backbone."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from lungwatch.training.fit_head import FittedHead, HeadConfig, HeadData, fit_head
from lungwatch.training.run import RunFolder
from lungwatch.training.search import Outcome, SearchConfig, Trial, search
from lungwatch.training.search_space import Ladder, Space

GRID: Space = {
    "batch_size": Ladder(rungs=(8, 16, 32, 64, 128), first=1, last=3),
    "learning_rate": Ladder(rungs=(3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2), first=2, last=4),
    "dropout": Ladder(rungs=(0.0, 0.1, 0.3, 0.5, 0.7, 0.8), first=1, last=3),
}


@dataclass(frozen=True, kw_only=True)
class HeadChoice:
    """A head's parameters: how it is trained, and the dropout that belongs to its shape."""

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
    space: Space = GRID,
    extensions: int = 2,
    on_trial: Callable[[dict[str, Any]], None] | None = None,
) -> HeadChoice:
    """Try a grid of batch size, learning rate and dropout; return the best.

    The value is the calibrated validation loss of the best epoch. A best value at the edge of
    the grid extends it; see `lungwatch.training.search`, which also says what is in `run`.
    """

    def objective(trial: Trial) -> Outcome:
        found = choice.with_trial(trial).fit(data, dense_units)
        return Outcome(value=found.best_val_loss, epochs=found.best_epoch)

    config = SearchConfig(sampler="grid", extensions=extensions, seed=choice.config.seed)
    return choice.with_trial(search(space, objective, config, run, on_trial=on_trial).best)
