"""Where an interrupted run goes on, and the checkpoint that it goes on from."""

import math
from dataclasses import dataclass, field, replace
from pathlib import Path

from lungwatch.training.fit_config import FitConfig
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


def read_state(run: RunFolder) -> FitState | None:
    """Read where a run stands; None if it has not come that far."""
    return FitState(**run.read("state.json")) if (run.root / "state.json").exists() else None


def average_file(run: RunFolder, state: FitState) -> Path:
    """Name the file beside the checkpoint that holds the weight average."""
    return (run.root / state.checkpoint).with_suffix(".npz")


def memory_file(run: RunFolder, state: FitState) -> Path:
    """Name the file beside the checkpoint that holds what the lesson learnt besides."""
    return (run.root / state.checkpoint).with_suffix(".memory.npz")


def forget_checkpoint(run: RunFolder, state: FitState) -> None:
    """Remove a state's checkpoint and what lies beside it, if there is one."""
    if state.checkpoint:
        (run.root / state.checkpoint).unlink(missing_ok=True)
        average_file(run, state).unlink(missing_ok=True)
        memory_file(run, state).unlink(missing_ok=True)


def advance(state: FitState, row: dict[str, float], config: FitConfig) -> FitState:
    """Return the state after an epoch, from its row of the history."""
    epoch = int(row["epoch"])
    val_loss = row.get("val_loss_calibrated")
    # With nothing to compare by, the last epoch is the one to keep.
    better = val_loss is None or config.keep == "last" or val_loss < state.best_val_loss
    since_halving = 0 if better else state.since_halving + 1
    learning_rate = state.learning_rate
    if config.learning_rates:
        learning_rate = config.rate(epoch + 1)
    elif since_halving >= config.plateau:
        since_halving, learning_rate = 0, learning_rate / 2.0
    new = replace(
        state,
        epoch=epoch,
        checkpoint=f"checkpoint-{epoch:04d}.keras",
        best_epoch=epoch if better else state.best_epoch,
        best_val_loss=state.best_val_loss
        if val_loss is None
        else min(val_loss, state.best_val_loss),
        learning_rate=learning_rate,
        since_halving=since_halving,
        history=[*state.history, row],
    )
    return replace(new, finished=is_finished(new, config))


def is_finished(state: FitState, config: FitConfig) -> bool:
    """Tell whether all epochs ran, or the validation loss stopped falling."""
    is_stopped = config.patience is not None and state.epoch - state.best_epoch >= config.patience
    return state.epoch >= config.epochs or is_stopped
