"""Train the head alone, on features that a frozen backbone gave."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from lungwatch.errors import ConfigError
from lungwatch.training.augment import Augmentation
from lungwatch.training.averaging import WeightAverage
from lungwatch.training.data.pixels import FloatArray, KerasModel
from lungwatch.training.evaluation.calibration import fit_calibration
from lungwatch.training.evaluation.metrics import log_loss, roc_auc
from lungwatch.training.fit import DivergedError
from lungwatch.training.head import FEATURES, HIDDEN, LOGIT, attach_head
from lungwatch.training.sampling import epoch_order
from lungwatch.training.step import Step, make_step


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """How to train the head.

    Attributes
    ----------
    epochs
        At most.
    batch_size, learning_rate
        Of the AdamW optimiser's steps.
    patience
        Epochs without a lower calibrated validation loss after which training stops; None
        trains all epochs.
    average, weight_decay
        As in `lungwatch.training.fit.FitConfig`.
    seed
        Of initial weights, dropout, drawing and augmentation.
    copies, augmentation
        How many changed copies of each training image there are, and the limits of the changes.
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
        patience = 1 if self.patience is None else self.patience
        if min(self.epochs, self.batch_size, patience) < 1:
            raise ConfigError("epochs, batch size and patience must be at least 1")
        if self.copies < 0 or not self.learning_rate > 0:
            raise ConfigError("copies must not be below 0, the learning rate above it")


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
    best_epoch, best_val_loss
        The epoch with the lowest calibrated validation loss, and that; nan without validation.
    history
        A row an epoch, with the columns of `lungwatch.training.fit`.
    """

    weights: list[FloatArray]
    best_epoch: int
    best_val_loss: float
    history: list[dict[str, float]]


def fit_head(
    data: HeadData,
    config: HeadConfig,
    *,
    dense_units: int,
    dropout: float,
    on_epoch: Callable[[dict[str, float]], None] | None = None,
) -> FittedHead:
    """Train a fresh head until the validation loss no longer falls.

    The same data, configuration and machine give the same weights.

    Parameters
    ----------
    data, config
        What to learn from, and how.
    dense_units, dropout
        The head's shape; see `lungwatch.training.head`.
    on_epoch
        Called with the epoch's row of the history.

    Raises
    ------
    DivergedError
        If the loss is no longer finite.
    """
    import keras

    keras.utils.set_random_seed(config.seed)
    model = _build(data.features.shape[-1], config, dense_units=dense_units, dropout=dropout)
    step = make_step(model)
    average = WeightAverage(model, config.average)
    rows: list[dict[str, float]] = []
    best, best_epoch, best_loss = model.get_weights(), 0, math.inf
    for epoch in range(1, config.epochs + 1):
        loss, accuracy = _train_epoch(step, average, data, config, epoch)
        row = {"epoch": epoch, "loss": loss, "accuracy": accuracy}
        with average.applied():
            if data.val_features is not None and data.val_targets is not None:
                row |= _validate(model, data.val_features, data.val_targets)
            if row.get("val_loss_calibrated", -math.inf) < best_loss:
                best, best_epoch = model.get_weights(), epoch
                best_loss = row.get("val_loss_calibrated", math.inf)
        row["learning_rate"] = config.learning_rate
        rows.append(row)
        if on_epoch:
            on_epoch(row)
        if config.patience is not None and epoch - best_epoch >= config.patience:
            break
    return FittedHead(
        weights=best,
        best_epoch=best_epoch,
        best_val_loss=best_loss if math.isfinite(best_loss) else math.nan,
        history=rows,
    )


def put_head(model: KerasModel, weights: list[FloatArray]) -> None:
    """Give a whole network a head's weights, as `FittedHead` has them."""
    model.get_layer(HIDDEN).set_weights(weights[:2])
    model.get_layer(LOGIT).set_weights(weights[2:])


def _build(channels: int, config: HeadConfig, *, dense_units: int, dropout: float) -> KerasModel:
    import keras

    # One cell of a map: pooling leaves it as it is, so the head is the whole network's own.
    cell = keras.Input((1, 1, channels), name=FEATURES)
    logit = attach_head(cell, dense_units=dense_units, dropout=dropout)
    model = keras.Model(cell, logit)
    model.compile(
        optimizer=keras.optimizers.AdamW(config.learning_rate, weight_decay=config.weight_decay),
        loss=keras.losses.BinaryCrossentropy(from_logits=True),
    )
    return model


def _train_epoch(
    step: Step, average: WeightAverage, data: HeadData, config: HeadConfig, epoch: int
) -> tuple[float, float]:
    rng = np.random.default_rng([config.seed, epoch])
    copy = data.features[epoch % len(data.features)][:, np.newaxis, np.newaxis]
    batches = math.ceil(len(data.targets) / config.batch_size)
    order = epoch_order(data.weights, rng, batches * config.batch_size)
    total, right = 0.0, 0
    for indices in np.split(order, batches):
        targets = data.targets[indices]
        loss, logits = step(copy[indices], targets)
        total += float(loss)
        right += int(np.sum((np.asarray(logits) > 0.0) == (targets > 0.5)))
        average.update()
    if not math.isfinite(total):
        raise DivergedError(f"the loss is {total} in epoch {epoch}")
    return total / batches, right / len(order)


def _validate(model: KerasModel, features: FloatArray, targets: FloatArray) -> dict[str, float]:
    logits = np.asarray(model(features[:, np.newaxis, np.newaxis], training=False))[:, 0]
    calibration = fit_calibration(targets, logits)
    return {
        "val_loss": log_loss(targets, logits),
        "val_loss_calibrated": log_loss(
            targets, calibration.slope * logits + calibration.intercept
        ),
        "val_accuracy": float(np.mean((logits > 0.0) == (targets > 0.5))),
        "val_auc": roc_auc(targets, logits),
    }
