"""How a network is trained, and what it is trained on."""

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from lungwatch.errors import ConfigError
from lungwatch.training.augment import Augmentation
from lungwatch.training.data.pixels import FloatArray


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
