"""Domain-adversarial learning: a second head that shall not be able to tell the source.

It learns to tell the source of an image from the pooled features, and its gradient reaches the
network reversed. It is asked within one finding only: across findings the source tells the
finding, and a network that must forget the one would forget the other (conditional adversary,
as in Long, Cao, Wang, Jordan 2018).

Source: Ganin et al. 2016, the gradient reversal and its ramp.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lungwatch.training.data.dataset import Sample
from lungwatch.training.data.pixels import Tensor
from lungwatch.training.guide_numbers import gravity, source_numbers

_UNITS = 64
_LEARNING_RATE = 1e-3
_STEEPNESS = 10.0
_IMPOSSIBLE = -1e9
SOURCE_LOSS = "source_loss"


def sources_of_findings(samples: Sequence[Sample]) -> NDArray[np.bool_]:
    """Tell which findings occur in which sources, bool (3, sources)."""
    source = source_numbers(samples)
    there = np.zeros((3, int(source.max()) + 1), dtype=bool)
    there[gravity(samples), source] = True
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
