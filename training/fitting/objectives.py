"""Training objectives beyond the class: order within a source, evidence in the lungs.

Group robustness, domain adversary.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from lungwatch.errors import ConfigError
from lungwatch.training.data.dataset import ImageClass, Sample
from lungwatch.training.data.pixels import FloatArray, KerasModel, Tensor
from lungwatch.training.fitting.augmentation import MIN_LUNG_SHARE
from lungwatch.training.networks.heads import DROPOUT, FEATURES, HIDDEN, LOGIT

# How grave each finding is, for ranking: other pneumonias lie between.
_SEVERITY: dict[ImageClass, int] = {"NORMAL": 0, "OTHER_PNEUMONIA": 1, "COVID": 2}


def severity_ranks(samples: Sequence[Sample]) -> NDArray[np.int32]:
    """How grave the findings are, int32 (N,): 0 NORMAL, 1 OTHER_PNEUMONIA, 2 COVID."""
    return np.array([_SEVERITY[s.finding] for s in samples], dtype=np.int32)


def source_numbers(samples: Sequence[Sample]) -> NDArray[np.int32]:
    """Number the sources in the order of their names, int32 (N,)."""
    names = sorted({s.source for s in samples})
    return np.array([names.index(s.source) for s in samples], dtype=np.int32)


# A handful of images can be learnt by heart, or never be right: either would say nothing of
# how their group does, so they count with the largest group of their finding.
FEWEST_OF_GROUP = 20

WEIGHT = "weight "


@dataclass(frozen=True, kw_only=True, eq=False)
class RiskGroups:
    """The groups whose risk is watched.

    Attributes
    ----------
    names
        As "ieee8023/COVID".
    table
        The group of each finding's gravity and source's number, int32 (3, sources); -1 where
        there are no images.
    """

    names: tuple[str, ...]
    table: NDArray[np.int32]


def risk_groups(samples: Sequence[Sample]) -> RiskGroups:
    """Group training images by finding and source."""
    grave, source = severity_ranks(samples), source_numbers(samples)
    sizes = Counter(zip(grave.tolist(), source.tolist(), strict=True))
    names = {
        key: f"{s.source}/{s.finding}"
        for key, s in zip(zip(grave.tolist(), source.tolist(), strict=True), samples, strict=True)
    }
    largest = {
        finding: max((key for key in sizes if key[0] == finding), key=lambda key: sizes[key])
        for finding in sorted({key[0] for key in sizes})
    }
    own = sorted({*largest.values(), *(key for key in sizes if sizes[key] >= FEWEST_OF_GROUP)})
    table = np.full((3, int(source.max()) + 1), -1, dtype=np.int32)
    for key in sizes:
        table[key] = own.index(key if key in own else largest[key[0]])
    return RiskGroups(names=tuple(names[key] for key in own), table=table)


class RobustLoss:
    """The loss weighted by group, and the weights, which learn too.

    Parameters
    ----------
    groups
        Whose loss is watched.
    step
        How fast the weights move, above 0; Sagawa et al. use 0.01.
    """

    def __init__(self, groups: RiskGroups, step: float) -> None:
        import tensorflow as tf

        self._groups = groups
        self._step = step
        count = len(groups.names)
        self.weights = tf.Variable(np.full(count, 1.0 / count, np.float32), trainable=False)

    @property
    def variables(self) -> list[Any]:
        """What an interrupted run must find again."""
        return [self.weights]

    def __call__(self, losses: Tensor, targets: Tensor, grave: Tensor, source: Tensor) -> Tensor:
        """Move the weights by a batch's losses, then weigh them.

        Parameters
        ----------
        losses, targets
            Cross-entropies in nats, and the targets they are of, (N,). What no network could
            undercut, the entropy of a soft target, moves no weight.
        grave, source
            Numbers of finding and source, (N,).
        """
        import tensorflow as tf

        group = tf.gather_nd(tf.constant(self._groups.table), tf.stack([grave, source], axis=1))
        members = tf.one_hot(group, len(self._groups.names))
        counts = tf.maximum(tf.reduce_sum(members, axis=0), 1.0)
        soft = tf.clip_by_value(targets, 1e-6, 1.0 - 1e-6)
        entropy = -soft * tf.math.log(soft) - (1.0 - soft) * tf.math.log(1.0 - soft)
        excess = tf.stop_gradient(losses - entropy)
        risks = tf.reduce_sum(excess[:, None] * members, axis=0) / counts
        grown = self.weights * tf.exp(self._step * risks)
        weights = self.weights.assign(grown / tf.reduce_sum(grown))
        means = tf.reduce_sum(losses[:, None] * members, axis=0) / counts
        return tf.reduce_sum(tf.stop_gradient(weights) * means)

    def notes(self) -> dict[str, float]:
        """Return the weights for the history, by group."""
        values = np.asarray(self.weights).tolist()
        return {WEIGHT + name: v for name, v in zip(self._groups.names, values, strict=True)}


_UNITS = 64

_LEARNING_RATE = 1e-3

_STEEPNESS = 10.0

_IMPOSSIBLE = -1e9

SOURCE_LOSS = "source_loss"


def sources_of_findings(samples: Sequence[Sample]) -> NDArray[np.bool_]:
    """Tell which findings occur in which sources, bool (3, sources)."""
    source = source_numbers(samples)
    there = np.zeros((3, int(source.max()) + 1), dtype=bool)
    there[severity_ranks(samples), source] = True
    return there


def reversed_gradient(values: Tensor, strength: Tensor) -> Tensor:
    """Return the same values, whose gradient is turned about and multiplied by `strength`."""
    import tensorflow as tf

    return tf.stop_gradient((1.0 + strength) * values) - strength * values


class Adversary:
    """The head that tells sources, with an optimiser of its own.

    Parameters
    ----------
    features
        How many there are.
    there
        What `sources_of_findings` returns.
    weight
        Of the reversed gradient at the end of the ramp.
    steps
        Length of the training; the ramp is 1 at its end.
    seed
        Of the head's first weights.
    """

    def __init__(
        self, features: int, there: NDArray[np.bool_], *, weight: float, steps: int, seed: int
    ) -> None:
        import keras
        import tensorflow as tf

        self._there = there
        self._weight = weight
        self._steps = steps
        self._hidden, self._last = (
            keras.layers.Dense(
                units,
                activation=activation,
                kernel_initializer=keras.initializers.GlorotUniform(seed=seed + number),
            )
            for number, (units, activation) in enumerate([(_UNITS, "relu"), (there.size, None)])
        )
        self._hidden.build((None, features))
        self._last.build((None, _UNITS))
        self.trainable = [*self._hidden.trainable_variables, *self._last.trainable_variables]
        self._optimizer = keras.optimizers.Adam(_LEARNING_RATE)
        self._optimizer.build(self.trainable)
        self._mean_loss = tf.Variable(0.0, trainable=False)

    @property
    def variables(self) -> list[Any]:
        """What an interrupted run must find again."""
        return [*self.trainable, *self._optimizer.variables, self._mean_loss]

    def __call__(self, pooled: Tensor, grave: Tensor, source: Tensor, step: Tensor) -> Tensor:
        """Return the mean cross-entropy of the source within the finding, in nats.

        Parameters
        ----------
        pooled
            Features, (N, C); they receive the reversed gradient.
        grave, source
            Numbers of finding and source, (N,).
        step
            How many steps there were before.
        """
        import tensorflow as tf

        part = tf.cast(step, tf.float32) / self._steps
        strength = self._weight * (2.0 / (1.0 + tf.exp(-_STEEPNESS * part)) - 1.0)
        answers = self._last(self._hidden(reversed_gradient(pooled, strength)))
        answers = tf.reshape(answers, (-1, *self._there.shape))
        own = tf.gather(answers, grave, batch_dims=1)
        possible = tf.gather(tf.constant(self._there), grave)
        own = tf.where(possible, own, _IMPOSSIBLE)
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels=source, logits=own)
        loss = tf.reduce_mean(losses)
        self._mean_loss.assign_add(0.05 * (tf.stop_gradient(loss) - self._mean_loss))
        return loss

    def learn(self, gradients: Sequence[Tensor]) -> None:
        """Take one step; gradients in the order of `trainable`."""
        self._optimizer.apply_gradients(zip(gradients, self.trainable, strict=True))

    def notes(self) -> dict[str, float]:
        """Return the head's loss of late for the history: it is small where sources show."""
        return {SOURCE_LOSS: float(self._mean_loss)}


_LARGEST_GRADIENT = 5.0


@dataclass(frozen=True, kw_only=True)
class Objective:
    """The weights of the loss.

    Attributes
    ----------
    other_target
        The target of other pneumonias, 0..1; 0 is the plain question "COVID or not", more
        asks for a score that opacities raise.
    ranking
        Weight of the ranking within sources.
    lungs
        Weight of the evidence outside the lungs; needs lung masks.
    """

    other_target: float = 0.0
    ranking: float = 0.0
    lungs: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.other_target < 1.0:
            raise ConfigError("the target of other pneumonias must lie within 0..1")
        if self.ranking < 0 or self.lungs < 0:
            raise ConfigError("the weights of ranking and lungs must not be below 0")

    def targets(self, samples: Sequence[Sample]) -> FloatArray:
        """Training targets of samples, float32 (N,)."""
        values = {"COVID": 1.0, "NORMAL": 0.0, "OTHER_PNEUMONIA": self.other_target}
        return np.array([values[s.finding] for s in samples], dtype=np.float32)


def lungs_on_map(lungs: FloatArray, side: int) -> FloatArray:
    """Bring lung masks, (N, S, S), onto a map's cells, (N, side, side), with some margin.

    Pleura and hila belong to what a reader looks at, and cells are coarse.
    """
    around = max(3, round(lungs.shape[1] * 0.05)) | 1
    grown = (cv2.dilate(mask, np.ones((around, around), np.uint8)) for mask in lungs)
    cells = [cv2.resize(mask, (side, side), interpolation=cv2.INTER_AREA) for mask in grown]
    return np.stack(cells).astype(np.float32)


def ranking_loss(logits: Tensor, grave: Tensor, source: Tensor) -> Tensor:
    """Mean logistic loss over the batch's pairs of one source with unlike findings.

    Parameters
    ----------
    logits, grave, source
        Tensors (N,): binary logits, and what `gravity` and `source_numbers` return.
    """
    import tensorflow as tf

    graver = grave[:, None] > grave[None, :]
    pairs = tf.cast(graver & (source[:, None] == source[None, :]), tf.float32)
    losses = tf.nn.softplus(logits[None, :] - logits[:, None])
    return tf.reduce_sum(losses * pairs) / tf.maximum(tf.reduce_sum(pairs), 1.0)


def lungs_loss(evidence: Tensor, cells: Tensor) -> Tensor:
    """Mean share of the evidence, of either sign, that lies outside the lungs, 0..1.

    Parameters
    ----------
    evidence
        Tensor (N, h, w): Grad-CAM before its ReLU.
    cells
        Tensor (N, h, w), 0..1: see `lungs_on_map`. Images with next to no lung do not count.
    """
    import tensorflow as tf

    amount = tf.abs(evidence)
    outside = tf.reduce_sum(amount * (1.0 - cells), axis=(1, 2))
    share = outside / (tf.reduce_sum(amount, axis=(1, 2)) + 1e-6)
    known = tf.cast(tf.reduce_mean(cells, axis=(1, 2)) > MIN_LUNG_SHARE, tf.float32)
    return tf.reduce_sum(share * known) / tf.maximum(tf.reduce_sum(known), 1.0)


def make_guided_step(
    model: KerasModel,
    objective: Objective,
    robust: RobustLoss | None = None,
    adversary: Adversary | None = None,
) -> Callable[..., tuple[Tensor, Tensor]]:
    """Make the function that lets a compiled network learn from one batch by an objective.

    Parameters
    ----------
    model
        A compiled network, pixels to logit, with lungwatch's head.
    objective
        The weights.
    robust
        Weighs the groups' cross-entropies; None takes their mean over the batch.
    adversary
        Guesses the source from the features; None for nobody.

    Returns
    -------
    function
        Of pixels (N, S, S, 1), targets (N,), gravity (N,), source numbers (N,) and lungs on the
        map's cells (N, h, w), to the loss and the binary logits (N,) before the step.
    """
    import keras
    import tensorflow as tf

    features_of = keras.Model(model.input, model.get_layer(FEATURES).output)
    hidden, dropout, last = (model.get_layer(name) for name in (HIDDEN, DROPOUT, LOGIT))
    # Variables must not be made while a graph is traced.
    model.optimizer.build(model.trainable_variables)

    def step(
        pixels: Tensor, targets: Tensor, grave: Tensor, source: Tensor, cells: Tensor
    ) -> tuple[Tensor, Tensor]:
        with tf.GradientTape() as tape:
            features = features_of(pixels, training=True)
            pooled = tf.reduce_mean(features, axis=(1, 2))
            h = hidden(pooled)
            z = last(dropout(h, training=True))[:, 0]
            losses = tf.nn.sigmoid_cross_entropy_with_logits(targets, z)
            loss = robust(losses, targets, grave, source) if robust else tf.reduce_mean(losses)
            if objective.ranking:
                loss += objective.ranking * ranking_loss(z, grave, source)
            if objective.lungs:
                # The hidden layer's ReLU is its activation: h > 0 where it lets through.
                active = tf.cast(h > 0.0, tf.float32) * last.kernel[:, 0][None, :]
                weights = tf.matmul(active, hidden.kernel, transpose_b=True)
                evidence = tf.reduce_sum(features * weights[:, None, None, :], axis=-1)
                loss += objective.lungs * lungs_loss(evidence, cells)
            wanted = loss
            if adversary:
                wanted += adversary(pooled, grave, source, model.optimizer.iterations)
        opponent = adversary.trainable if adversary else []
        gradients, guesses = tape.gradient(wanted, (model.trainable_variables, opponent))
        if adversary:
            adversary.learn(guesses)
        clipped, _ = tf.clip_by_global_norm(gradients, _LARGEST_GRADIENT)
        model.optimizer.apply_gradients(zip(clipped, model.trainable_variables, strict=True))
        return loss, z

    traced: Callable[..., tuple[Tensor, Tensor]] = tf.function(step, reduce_retracing=True)
    return traced
