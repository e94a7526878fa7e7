"""Group-robust learning: the groups a network does worst on count for more and more.

A group is one finding from one source. Where nearly all COVID images come from other hospitals
than the rest, the mean loss is lowest for the network that knows the hospitals; the groups that
this gets wrong, other pneumonias from a hospital of COVID images above all, are small. Their
weights grow as long as their loss is the larger one.

Source: group DRO, Sagawa, Koh, Hashimoto, Liang 2020 (algorithm 1).
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lungwatch.training.data.dataset import Sample
from lungwatch.training.data.pixels import Tensor
from lungwatch.training.guide_numbers import gravity, source_numbers

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
    grave, source = gravity(samples), source_numbers(samples)
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
