"""Where an interrupted run goes on, and the checkpoint that it goes on from."""

import math
from dataclasses import dataclass, field
from pathlib import Path

from lungwatch.training.run import RunFolder


@dataclass(frozen=True, kw_only=True)
class FitState:
    """Where a run stands; written after each epoch, once its checkpoint is safe."""

    epoch: int = 0
    checkpoint: str = ""
    best_epoch: int = 0
    best_val_loss: float = math.inf
    learning_rate: float = 0.0
    since_halving: int = 0
    finished: bool = False
    history: list[dict[str, float]] = field(default_factory=list)


def average_file(run: RunFolder, state: FitState) -> Path:
    """Name the file beside the checkpoint that holds the weight average."""
    return (run.root / state.checkpoint).with_suffix(".npz")


def forget_checkpoint(run: RunFolder, state: FitState) -> None:
    """Remove a state's checkpoint and its weight average, if there are any."""
    if state.checkpoint:
        (run.root / state.checkpoint).unlink(missing_ok=True)
        average_file(run, state).unlink(missing_ok=True)
