"""Training tasks: telling two classes, or a fixed number of steps; drawing of images, dropout."""

import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lungwatch.errors import ConfigError
from lungwatch.training.data.dataset import ImageClass, Sample
from lungwatch.training.data.pixels import FloatArray, KerasModel, Tensor
from lungwatch.training.evaluation.calibration import fit_calibration
from lungwatch.training.evaluation.metrics import log_loss, roc_auc
from lungwatch.training.evaluation.scorers import predict_logits
from lungwatch.training.fitting.augmentation import augment
from lungwatch.training.fitting.run import Progress, RunFolder
from lungwatch.training.fitting.trainer import (
    DivergedError,
    FitConfig,
    FitState,
    Trainer,
    TrainingTask,
)

# A network may note more columns, which are in the state and have files of their own.
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
    task: Callable[[KerasModel], TrainingTask] | None = None,
    progress: Progress | None = None,
) -> FitState:
    """Train a binary network, pixels to logit; see `Trainer` and `binary_task`."""
    return Trainer(
        lambda: compile_binary(build(), config),
        task or (lambda model: binary_task(model, data, config)),
        config,
        run,
        progress=progress,
        keep_checkpoint=keep_checkpoint,
    ).fit()


def compile_binary(model: KerasModel, config: FitConfig) -> KerasModel:
    """Compile a network from pixels to one logit with AdamW; return it."""
    import keras

    model.compile(
        optimizer=keras.optimizers.AdamW(config.rate(1), weight_decay=config.weight_decay),
        loss=keras.losses.BinaryCrossentropy(from_logits=True),
    )
    return model


def binary_task(
    model: KerasModel,
    data: FitData,
    config: FitConfig,
    *,
    show: Callable[..., tuple[Any, ...]] | None = None,
    step: Callable[..., tuple[Tensor, Tensor]] | None = None,
    **more: Any,  # noqa: ANN401  # further attributes of the task
) -> TrainingTask:
    """Make the task of telling two classes: classes in balance, stopped by calibrated log loss.

    The validation loss is taken after Platt scaling: epochs are drawn with the classes in
    balance and the network ships calibrated, so the raw loss would mostly judge an offset that
    is taken out anyway. Both are in the history.

    Parameters
    ----------
    model, data, config
        The compiled network, and what it learns from.
    show
        From indices of a batch's images and a generator to what `step` takes, pixels and
        targets first; by default they are augmented.
    step
        From that to the mean loss and the logits (N,) before the step; by default
        cross-entropy is the loss.
    """
    learn = step or make_step(model)

    def order(epoch: int, rng: np.random.Generator) -> list[NDArray[np.intp]]:
        drawn = epoch_batches(data.train_weights, rng, config.batch_size)
        seed_dropout(model, config.seed, epoch)
        return drawn

    def augmented(indices: NDArray[np.intp], rng: np.random.Generator) -> tuple[Any, ...]:
        pixels = augment(data.train_pixels[indices], config.augmentation, rng)
        return pixels, data.train_targets[indices]

    def counted(pixels: FloatArray, targets: FloatArray, *rest: Any) -> tuple[float, int]:  # noqa: ANN401
        loss, logits = learn(pixels, targets, *rest)
        return float(loss), int(np.sum((np.asarray(logits) > 0.0) == (targets > 0.5)))

    def validate() -> dict[str, float]:
        if data.val_pixels is None or data.val_targets is None:
            return {}
        return validation_row(data.val_targets, predict_logits(model, data.val_pixels))

    return TrainingTask(
        order=order,
        show=show or augmented,
        step=counted,
        validate=validate,
        monitor="val_loss_calibrated",
        columns=_COLUMNS,
        **more,
    )


def make_step(model: KerasModel) -> Callable[..., tuple[Tensor, Tensor]]:
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

    traced: Callable[..., tuple[Tensor, Tensor]] = tf.function(step, reduce_retracing=True)
    return traced


def validation_row(targets: FloatArray, logits: FloatArray) -> dict[str, float]:
    """Return the validation columns of the history of a binary network."""
    if not np.isfinite(logits).all():
        raise DivergedError("the network's outputs for validation images are not finite")
    calibration = fit_calibration(targets, logits)
    calibrated = calibration.slope * logits + calibration.intercept
    return {
        "val_loss": log_loss(targets, logits),
        "val_loss_calibrated": log_loss(targets, calibrated),
        "val_accuracy": float(np.mean((logits > 0.0) == (targets > 0.5))),
        "val_auc": roc_auc(targets, logits),
    }


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
    weights = group_weights([(s.positive, s.source, s.finding) for s in samples], power)
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


def group_weights(groups: Sequence[Hashable], power: float) -> NDArray[np.float64]:
    """Give each sample of a group of n the weight n ** (power - 1), float64 (N,)."""
    sizes = Counter(groups)
    return np.array([sizes[group] ** (power - 1.0) for group in groups])


def epoch_batches(
    weights: NDArray[np.float64], rng: np.random.Generator, batch_size: int
) -> list[NDArray[np.intp]]:
    """Draw the indices of an epoch's batches, each of `batch_size`, with replacement.

    Low-variance (systematic) drawing: each sample comes up the floor or the ceiling of its
    expected number of times, so that an epoch misses as few images as possible.

    Source: Carpenter, Clifford, Fearnhead 1999.
    """
    batches = math.ceil(len(weights) / batch_size)
    length = batches * batch_size
    permutation = rng.permutation(len(weights))
    edges = np.cumsum(weights[permutation])
    points = (np.arange(length) + rng.uniform()) / length
    drawn = np.searchsorted(edges, points * edges[-1], side="right")
    order = permutation[np.minimum(drawn, len(weights) - 1)]
    return np.split(np.asarray(rng.permutation(order), dtype=np.intp), batches)


def seed_dropout(model: KerasModel, seed: int, epoch: int) -> None:
    """Seed the dropout of an epoch.

    Keras does not save the state of its seed generators: without this a resumed run would drop
    other units than one that was never interrupted.
    """
    for index, layer in enumerate(_flat(model)):
        if hasattr(layer, "seed_generator"):
            layer.seed_generator.state.assign([seed + 1000 * index, epoch])


def _flat(model: KerasModel) -> Iterator[KerasModel]:
    for layer in model.layers:
        if hasattr(layer, "layers"):
            yield from _flat(layer)
        else:
            yield layer


@dataclass(frozen=True, kw_only=True)
class StepConfig:
    """Configuration of a training with a fixed number of steps.

    Attributes
    ----------
    size_px
        Side of the input, a multiple of 16.
    imagenet
        Whether the trunk starts from ImageNet weights instead of random ones.
    steps
        How many.
    batch_size
        Pictures of a step.
    learning_rate, weight_decay
        Of AdamW; the rate is the largest of a cosine.
    seed
        Of initial weights and pictures.
    checkpoint_steps
        Steps between two checkpoints.
    """

    size_px: int
    imagenet: bool = True
    steps: int
    batch_size: int = 128
    learning_rate: float
    weight_decay: float
    seed: int = 1
    checkpoint_steps: int

    def __post_init__(self) -> None:
        if min(self.steps, self.batch_size, self.checkpoint_steps) < 1:
            raise ConfigError("steps, batch size and checkpoint steps must be at least 1")
        if not self.learning_rate > 0 or not self.weight_decay >= 0:
            raise ConfigError("the learning rate must be above 0, the weight decay at least 0")
        if self.size_px % 16 or self.size_px < 32:
            raise ConfigError("the input's side must be a multiple of 16, at least 32")


def fit_steps(
    build: Callable[[], KerasModel],
    config: StepConfig,
    run: RunFolder,
    *,
    draw: Callable[[int], Any],
    learn: Callable[[KerasModel, Any, int], float],
    keep: Callable[[KerasModel], None],
    steps: int | None = None,
    phase: int = 1,
    earlier_epochs: int = 0,
    progress: Progress | None = None,
) -> FitState:
    """Train for a fixed number of steps on newly drawn pictures.

    Pictures, dropout and learning rate of a step depend on the seed and its number alone. An
    epoch is the steps between two checkpoints.

    Parameters
    ----------
    build
        Makes the network, compiled with an optimiser that averages the weights.
    config, run, progress
        How, the begun run folder, and the listeners.
    draw
        Draws the batch of a step, from 0 on; called in other threads.
    learn
        Takes a step with the network, a batch and its number; returns the loss.
    keep
        Called with the network and its averaged weights at the end.
    steps, phase, earlier_epochs
        Steps of this phase, its number for the history, and the epochs of those before.
    """
    steps = steps or config.steps
    per_epoch = config.checkpoint_steps
    last: dict[str, float] = {}

    def order(epoch: int, _: np.random.Generator) -> range:
        start = (epoch - 1 - earlier_epochs) * per_epoch
        return range(start, min(steps, start + per_epoch))

    def task(model: KerasModel) -> TrainingTask:
        def step(number: int, batch: Any) -> tuple[float, None]:  # noqa: ANN401  # what draw returns
            rate = config.learning_rate * cosine_rate(number, steps)
            model.optimizer.learning_rate.assign(rate)
            last.update(phase=phase, step=number + 1, learning_rate=rate)
            return learn(model, batch, number), None

        return TrainingTask(
            order=order,
            show=lambda number, _: (number, draw(number)),
            step=step,
            notes=lambda: dict(last),
            columns=("phase", "step", "loss", "learning_rate"),
            workers=2,
        )

    def keep_averaged(model: KerasModel) -> None:
        model.optimizer.finalize_variable_values(model.trainable_variables)
        keep(model)

    fitting = FitConfig(
        epochs=earlier_epochs + math.ceil(steps / per_epoch),
        batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        patience=None,
        average=0.0,
        seed=config.seed,
    )
    return Trainer(
        build,
        task,
        fitting,
        run,
        progress=progress,
        keep=keep_averaged,
        earlier_epochs=earlier_epochs,
    ).fit()


def cosine_rate(step: int, steps: int, warm_up: int = 50) -> float:
    """Return the share of the learning rate: a short rise, then half a cosine."""
    falling = 0.5 * (1.0 + math.cos(math.pi * step / steps)) + 0.01
    return min(1.0, (step + 1) / warm_up) * falling
