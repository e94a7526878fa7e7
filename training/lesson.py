"""What an epoch is made of: how a batch is shown, and the step that learns from it."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lungwatch.training.data.pixels import Tensor

Batch = tuple[Any, ...]


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """Functions that belong together.

    Attributes
    ----------
    show
        From the indices of a batch's images and a source of chance to what the step takes,
        pixels (N, S, S, 1) and targets (N,) first.
    step
        From that to the mean loss and the binary logits (N,) before the step.
    variables
        What the step changes besides the network's and its optimiser's variables.
    notes
        Returns what is worth a column in the history, by name.
    """

    show: Callable[[NDArray[np.intp], np.random.Generator], Batch]
    step: Callable[..., tuple[Tensor, Tensor]]
    variables: Sequence[Tensor] = ()
    notes: Callable[[], dict[str, float]] = dict

    def batches(
        self, order: Iterable[NDArray[np.intp]], rng: np.random.Generator
    ) -> Iterator[Batch]:
        """Show batch after batch, each made ready while the one before is learnt from.

        One thread makes them all, in order, so chance is drawn as if there were none.
        """
        with ThreadPoolExecutor(1, thread_name_prefix="show") as pool:
            waiting = None
            for indices in order:
                coming = pool.submit(self.show, indices, rng)
                if waiting is not None:
                    yield waiting.result()
                waiting = coming
            if waiting is not None:
                yield waiting.result()
