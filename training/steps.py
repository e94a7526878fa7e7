"""Training by steps whose pictures are drawn anew: pace, checkpoints, resuming.

Pictures, dropout and pace of a step depend on the seed and its number alone, so that an
interrupted run goes on as if it had not been.
"""

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, TypeVar

from lungwatch.training.data.pixels import KerasModel
from lungwatch.training.keras_file import save_keras
from lungwatch.training.progress import Progress
from lungwatch.training.run import RunFolder

Batch = TypeVar("Batch")

_COLUMNS = ("phase", "step", "loss", "learning_rate")
_WARM_UP = 50
_WORKERS = 2


@dataclass(frozen=True, kw_only=True, eq=False)
class Course:
    """How the steps of a run are taken.

    Attributes
    ----------
    run
        The run folder.
    learning_rate
        Of the steepest step.
    checkpoint_steps
        After how many steps each the run is made safe.
    progress
        Listeners; an epoch is a stretch of steps between two checkpoints.
    """

    run: RunFolder
    learning_rate: float
    checkpoint_steps: int
    progress: Progress = field(default_factory=Progress)


def read_state(run: RunFolder) -> dict[str, Any]:
    """Return how far a run has come: `phase`, from 1, `step`, `checkpoint` and `history`."""
    if (run.root / "state.json").exists():
        return run.read("state.json")
    return {"phase": 1, "step": 0, "checkpoint": "", "history": []}


def write_state(run: RunFolder, state: dict[str, Any]) -> None:
    """Write how far a run has come, and its history as a table."""
    run.write("state.json", state)
    if state["history"]:
        run.write_table("history.csv", state["history"], columns=_COLUMNS)


def remove_checkpoints(run: RunFolder) -> None:
    """Remove the checkpoints of a finished run."""
    for left in run.root.glob("checkpoint-*.keras"):
        left.unlink(missing_ok=True)


def take_steps(
    course: Course,
    state: dict[str, Any],
    steps: int,
    *,
    build: Callable[[], KerasModel],
    draw: Callable[[int], Batch],
    learn: Callable[[KerasModel, Batch, int], float],
) -> KerasModel:
    """Take the steps of the state's phase that are left, and average the weights in.

    Parameters
    ----------
    course
        How.
    state
        Of `read_state`; brought forward and written with every checkpoint.
    steps
        Steps of the phase.
    build
        Makes the compiled network, where no checkpoint holds it.
    draw
        Draws the batch of a step, by its number; called in other threads.
    learn
        Takes a step with a network, the batch and its number; returns the loss.

    Returns
    -------
    keras.Model
        The network with its averaged weights.
    """
    import keras

    run, progress, every = course.run, course.progress, course.checkpoint_steps
    phase = state["phase"]
    if state["checkpoint"]:
        model = keras.models.load_model(run.root / state["checkpoint"])
    else:
        model = build()
    losses: list[float] = []
    stretch = len(state["history"]) + 1
    for step, batch in drawn_ahead(draw, range(state["step"], steps)):
        rate = course.learning_rate * pace(step, steps)
        model.optimizer.learning_rate.assign(rate)
        losses.append(learn(model, batch, step))
        if progress.on_batch:
            progress.on_batch(stretch, step % every + 1, every)
        if (step + 1) % every and step + 1 < steps:
            continue
        row = {
            "phase": phase,
            "step": step + 1,
            "loss": sum(losses) / len(losses),
            "learning_rate": rate,
        }
        before = state["checkpoint"]
        state["history"].append(row)
        state.update(step=step + 1, checkpoint=f"checkpoint-{phase}-{step + 1:06d}.keras")
        save_keras(model, run.root / state["checkpoint"])
        write_state(run, state)
        if before:
            (run.root / before).unlink(missing_ok=True)
        if progress.on_epoch:
            progress.on_epoch({**row, "epoch": stretch})
        losses, stretch = [], stretch + 1
    model.optimizer.finalize_variable_values(model.trainable_variables)
    return model


def drawn_ahead(
    draw: Callable[[int], Batch], steps: range, *, workers: int = _WORKERS
) -> Iterator[tuple[int, Batch]]:
    """Draw each step's batch, a few steps ahead; OpenCV and NumPy let other threads run."""
    with ThreadPoolExecutor(workers, thread_name_prefix="draw") as pool:
        waiting = iter(steps)
        ahead = [(step, pool.submit(draw, step)) for step in islice(waiting, workers + 1)]
        while ahead:
            step, drawn = ahead.pop(0)
            batch = drawn.result()
            ahead += [(later, pool.submit(draw, later)) for later in islice(waiting, 1)]
            yield step, batch


def pace(step: int, steps: int) -> float:
    """Return the share of the learning rate: a short rise, then half a cosine."""
    falling = 0.5 * (1.0 + math.cos(math.pi * step / steps)) + 0.01
    return min(1.0, (step + 1) / _WARM_UP) * falling


def seed_dropout(model: KerasModel, seed: tuple[int, int]) -> None:
    """Seed what a network leaves out in its next step: a checkpoint does not hold that state."""
    import keras

    for layer in model.layers:
        if isinstance(layer, keras.layers.Dropout):
            layer.seed_generator.state.assign(seed)
