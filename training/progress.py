"""What a command line may want to hear of a training."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Listeners; every one may be None.

    Attributes
    ----------
    on_read
        Called with 1 after each image read.
    on_batch
        Called with (epoch, batch, batches) after each step.
    on_epoch
        Called with the epoch's row of the history.
    on_trial
        Called with the row of the search's table after each trial.
    """

    on_read: Callable[[int], None] | None = None
    on_batch: Callable[[int, int, int], None] | None = None
    on_epoch: Callable[[dict[str, float]], None] | None = None
    on_trial: Callable[[dict[str, Any]], None] | None = None
