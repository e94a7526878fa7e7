"""What training rewards beyond the right class: order within a source, and evidence in lungs.

The class alone can be read off a hospital's marks, since most collections hold one class. Two
further terms cannot:

- *ranking*: of two images of one source, the one with the graver finding shall score higher.
  Whatever is the same throughout a source cancels out, as in matched case-control studies
  (Breslow & Day 1980) and in pairwise ranking (Burges et al. 2005).
- *lungs*: the part of Grad-CAM's evidence, of either sign, that lies outside the lungs is a
  loss (Ross, Hughes, Doshi-Velez 2017). The head's closed form (`lungwatch.export.graph`) makes
  it as cheap as the prediction.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from lungwatch.errors import ConfigError
from lungwatch.training.adversary import Adversary
from lungwatch.training.data.dataset import Sample
from lungwatch.training.data.pixels import FloatArray, KerasModel, Tensor
from lungwatch.training.disguise import FEWEST_LUNG
from lungwatch.training.head import DROPOUT, FEATURES, HIDDEN, LOGIT
from lungwatch.training.robust import RobustLoss

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
    known = tf.cast(tf.reduce_mean(cells, axis=(1, 2)) > FEWEST_LUNG, tf.float32)
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
