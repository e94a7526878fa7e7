"""A running average of a network's weights, which is what is validated and kept.

Single steps throw the logits of unfamiliar images about; their average does not.

Source: Polyak & Juditsky 1992; Izmailov et al. 2018; as an exponential average, Tarvainen &
Valpola 2017.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lungwatch.training.data.pixels import KerasModel


class WeightAverage:
    """Exponential moving average over steps, batch-norm statistics included."""

    def __init__(self, model: KerasModel, decay: float) -> None:
        self._model = model
        self._decay = decay
        self._mean: list[NDArray[np.float32]] = [w.copy() for w in model.get_weights()]
        self._steps = 0

    def update(self) -> None:
        """Take the network's present weights in; early on the average follows faster."""
        self._steps += 1
        decay = min(self._decay, self._steps / (self._steps + 9.0))
        for index, weight in enumerate(self._model.get_weights()):
            self._mean[index] += (1.0 - decay) * (weight - self._mean[index])

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Let the network have the averaged weights for a while."""
        own = self._model.get_weights()
        self._model.set_weights(self._mean)
        try:
            yield
        finally:
            self._model.set_weights(own)

    def save(self, target: Path) -> None:
        """Write the average to an .npz file, for resuming."""
        temporary = target.with_name(f".tmp-{target.name}")
        np.savez(temporary, np.array(self._steps), *self._mean)
        temporary.replace(target)

    def load(self, source: Path) -> None:
        """Read what `save` wrote."""
        with np.load(source) as arrays:
            self._steps = int(arrays["arr_0"])
            self._mean = [arrays[f"arr_{index + 1}"] for index in range(len(self._mean))]
