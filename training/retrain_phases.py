"""The final network on a backbone from elsewhere: the phases that led to it, once more."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lungwatch.training.data.pixels import KerasModel
from lungwatch.training.evaluation.scorers import load_keras
from lungwatch.training.fit_config import FitConfig
from lungwatch.training.fit_state import FitState
from lungwatch.training.frozen_phase import FrozenPhase
from lungwatch.training.phases import FINE_TUNED, FROZEN, Phase
from lungwatch.training.retrain import retrain
from lungwatch.training.run import RunFolder
from lungwatch.training.runtime import prepare_tensorflow
from lungwatch.training.transfer import unfreeze
from lungwatch.training.transfer_grid import HeadChoice

_RETRAINED = "retrained"


def retrain_phases(
    kept: Phase,
    done: dict[Phase, FitState],
    phase: FrozenPhase,
    *,
    choice: HeadChoice,
    tuning: FitConfig | None,
    unfrozen_blocks: int | None,
    config: dict[str, Any],
) -> Path:
    """Repeat what led to the kept network on training and validation images.

    Parameters
    ----------
    kept, done
        The phase whose network is kept, and what became of each.
    phase
        The frozen one; its run folder gets a folder `retrained`.
    choice
        The head that the frozen phase came to.
    tuning, unfrozen_blocks
        How the backbone was fine-tuned, and how many of its last blocks; None: all of them.
    config
        The run's.

    Returns
    -------
    Path
        Of the final network.
    """
    folder = RunFolder(root=phase.run.root / _RETRAINED)
    folder.begin(config, resume=True)
    head = RunFolder(root=folder.root / FROZEN) if FROZEN in done else None
    if head and not head.model.exists():
        head.root.mkdir(exist_ok=True)
        phase.save(*phase.retrain(done[FROZEN], choice), head)
    if kept == FROZEN and head:
        return head.model
    assert tuning is not None  # the kept phase is fine-tuning
    prepare_tensorflow(tuning.seed)
    retrain(
        unfrozen(
            (lambda: load_keras(head.model)) if head else (lambda: phase.build(choice.dropout)),
            unfrozen_blocks,
        ),
        phase.prepared.retrain_data(),
        tuning,
        done[FINE_TUNED],
        folder,
        progress=phase.progress,
    )
    return folder.model


def unfrozen(start: Callable[[], KerasModel], last: int | None) -> Callable[[], KerasModel]:
    """Make a function that builds a network and lets its last blocks, or all (None), learn."""

    def build() -> KerasModel:
        model = start()
        unfreeze(model, last)
        return model

    return build
