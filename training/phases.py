"""The phases of training on a backbone from elsewhere, and which of them is kept."""

from dataclasses import replace
from typing import Literal

from lungwatch.training.fit_state import FitState

Phase = Literal["frozen", "fine-tuned"]
FROZEN: Phase = "frozen"
FINE_TUNED: Phase = "fine-tuned"


def better_phase(done: dict[Phase, FitState]) -> tuple[Phase, FitState]:
    """Say which phase is kept, and count both as one run.

    Returns
    -------
    phase, state
        The phase with the lowest calibrated validation loss, the earlier one on a tie; and
        the history of all, epochs counted through.
    """
    kept = min(done, key=lambda phase: done[phase].best_val_loss)
    rows: list[dict[str, float]] = []
    best = 0
    for phase, state in done.items():
        if phase == kept:
            best = len(rows) + state.best_epoch
        rows += [{**row, "epoch": len(rows) + row["epoch"]} for row in state.history]
    return kept, replace(done[kept], epoch=len(rows), best_epoch=best, history=rows)
