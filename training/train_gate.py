"""Train the content gate: the whole of `lungwatch train gate`.

First the network learns the lung masks drawn by hand, and then finds the lungs of all X-rays that
nobody drew; from its start again, it learns everything on all of them.
"""

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from lungwatch.errors import ConfigError
from lungwatch.preprocess import PreprocessSpec
from lungwatch.training.foreign import KerasModel
from lungwatch.training.gate_data import GateData, read_gate_data
from lungwatch.training.gate_images import ByteArray, GateBatch, GateXray, draw_batch
from lungwatch.training.gate_measure import measure_gate
from lungwatch.training.gate_network import (
    LUNGS_CELL_PX,
    answering_network,
    build_gate_network,
    compile_gate,
    look_with,
    train_on,
)
from lungwatch.training.keras_file import save_keras
from lungwatch.training.pixels import FloatArray
from lungwatch.training.progress import Progress
from lungwatch.training.run import RunFolder
from lungwatch.training.runtime import prepare_tensorflow
from lungwatch.training.scorers import load_keras

FAMILY = "Content gate on EfficientNet-Lite0"
_COLUMNS = ("phase", "step", "loss", "learning_rate")
_MASKS, _ALL = 1, 2
_WARM_UP = 50
_LUNGS = "lungs.npy"
_WORKERS = 2


@dataclass(frozen=True, kw_only=True)
class GateFitConfig:
    """How to train the gate.

    Attributes
    ----------
    size_px
        Side of the input, a multiple of 16.
    imagenet
        Whether the trunk starts from ImageNet weights instead of random ones.
    mask_steps
        Steps on the lung masks alone, before the lungs of all X-rays are found.
    steps
        Steps on everything.
    batch_size
        Pictures of a step.
    learning_rate, weight_decay
        Of AdamW; the rate is the steepest of a cosine.
    held_out
        Fraction of the lung masks that measures.
    seed
        Of initial weights, pictures and of which masks are held out.
    checkpoint_steps
        After how many steps each the run is made safe.
    """

    size_px: int = 160
    imagenet: bool = True
    mask_steps: int = 450
    steps: int = 1600
    batch_size: int = 128
    learning_rate: float = 1.5e-3
    weight_decay: float = 1e-3
    held_out: float = 0.1
    seed: int = 1
    checkpoint_steps: int = 100

    def __post_init__(self) -> None:
        if min(self.mask_steps, self.steps, self.batch_size, self.checkpoint_steps) < 1:
            raise ConfigError("steps, batch size and checkpoint steps must be at least 1")
        if not self.learning_rate > 0 or not self.weight_decay >= 0:
            raise ConfigError("the learning rate must be above 0, the weight decay at least 0")
        if not 0 < self.held_out < 1:
            raise ConfigError("the fraction held out must lie within 0..1")
        if self.size_px % 16 or self.size_px < 32:
            raise ConfigError("the input's side must be a multiple of 16, at least 32")


def train_gate(
    location: Path,
    masks: Path,
    root: Path,
    *,
    fitting: GateFitConfig,
    leave_out: Sequence[str] = (),
    resume: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train the gate on frontal chest X-rays, and measure it.

    Parameters
    ----------
    location, masks, leave_out
        See `lungwatch.training.gate_data.read_gate_data`.
    root
        The run folder to fill.
    fitting
        How.
    resume
        Continue the run that is in `root`: pictures and steps depend on the seed and their
        number alone.
    progress
        Listeners; an epoch is a stretch of steps between two checkpoints.

    Returns
    -------
    dict
        What is written to `metrics.json`; see `lungwatch.training.gate_measure.measure_gate`.

    Raises
    ------
    DatasetError
        If images or masks are missing or unreadable.
    ConfigError
        If `root` holds another run.
    MissingExtraError
        If TensorFlow or the package with ImageNet's weights is not installed.
    """
    progress = progress or Progress()
    run = RunFolder(root=root)
    run.refuse_taken(resume=resume)
    prepare_tensorflow(fitting.seed)
    import keras

    # Fails early, before thousands of images are read, if ImageNet's weights cannot be had.
    build_gate_network(fitting.size_px, imagenet=fitting.imagenet)
    spec = PreprocessSpec(size_px=fitting.size_px)
    data = read_gate_data(
        location,
        masks,
        spec,
        leave_out=leave_out,
        held_out=fitting.held_out,
        seed=fitting.seed,
        progress=progress.on_read,
    )
    run.begin(
        {
            "family": FAMILY,
            "fit": asdict(fitting),
            "preprocess": spec.to_dict(),
            "data": data.about,
            "backend": f"Keras {keras.__version__} on {keras.backend.backend()}",
            "pictures": "drawn anew for every step",
        },
        resume=resume,
    )
    if not run.model.exists():
        _fit(data, _Course(run=run, spec=spec, fitting=fitting, progress=progress))
    metrics = measure_gate(load_keras(run.model), data, spec, seed=fitting.seed)
    run.write("metrics.json", metrics)
    return metrics


@dataclass(frozen=True, kw_only=True, eq=False)
class _Course:
    run: RunFolder
    spec: PreprocessSpec
    fitting: GateFitConfig
    progress: Progress


def _fit(data: GateData, course: _Course) -> None:
    run, fitting = course.run, course.fitting
    state = _read_state(run)
    if state["phase"] == _MASKS:
        finder = _phase(_MASKS, data.masks, course, state)
        state = {**state, "phase": _ALL, "step": 0, "checkpoint": ""}
        _write_lungs(run, find_lungs(finder, data.train.pixels))
        _advance(run, state)
    found = np.load(run.root / _LUNGS)
    xrays = [
        replace(xray, lungs=_stretched(lungs, xray.pixels))
        for xray, lungs in zip(data.train.xrays, found, strict=True)
    ]
    model = _phase(_ALL, [*xrays, *data.masks], course, state)
    # Without its optimiser, which nobody needs any more and which holds most of it.
    final = build_gate_network(fitting.size_px, imagenet=False)
    final.set_weights(model.get_weights())
    save_keras(final, run.model)
    for left in (*run.root.glob("checkpoint-*.keras"), run.root / _LUNGS):
        left.unlink(missing_ok=True)


def find_lungs(model: KerasModel, pixels: FloatArray) -> ByteArray:
    """Find the lungs of preprocessed X-rays.

    Parameters
    ----------
    model
        A gate's network.
    pixels
        float32, shape (N, S, S, 1), 0..1.

    Returns
    -------
    numpy.ndarray
        uint8, shape (N, M, M), 0..255: the mean of what it finds in the X-ray and in its mirror
        image.
    """
    answering = answering_network(model)
    plain = look_with(answering, pixels).lungs
    mirrored = look_with(answering, np.ascontiguousarray(pixels[:, :, ::-1])).lungs[:, :, ::-1]
    return np.asarray(np.round((plain + mirrored) * 127.5), np.uint8)


def _phase(
    phase: int, xrays: Sequence[GateXray], course: _Course, state: dict[str, Any]
) -> KerasModel:
    """Take the phase's steps, from the state's on, and average the weights in."""
    run, fitting, progress = course.run, course.fitting, course.progress
    import keras

    steps = fitting.mask_steps if phase == _MASKS else fitting.steps
    if state["checkpoint"]:
        model = keras.models.load_model(run.root / state["checkpoint"])
    else:
        model = build_gate_network(fitting.size_px, imagenet=fitting.imagenet)
        compile_gate(model, fitting.learning_rate, fitting.weight_decay, steps=steps)
    losses: list[float] = []
    stretch = len(state["history"]) + 1
    every = fitting.checkpoint_steps
    for step, batch in _batches(phase, xrays, course, range(state["step"], steps)):
        rate = fitting.learning_rate * _pace(step, steps)
        model.optimizer.learning_rate.assign(rate)
        losses.append(train_on(model, batch, (fitting.seed, phase * 1_000_000 + step)))
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
        _advance(run, state)
        if before:
            (run.root / before).unlink(missing_ok=True)
        if progress.on_epoch:
            progress.on_epoch({**row, "epoch": stretch})
        losses, stretch = [], stretch + 1
    model.optimizer.finalize_variable_values(model.trainable_variables)
    return model


def _batches(
    phase: int, xrays: Sequence[GateXray], course: _Course, steps: range
) -> Iterator[tuple[int, GateBatch]]:
    """Draw each step's pictures, a few steps ahead; OpenCV and NumPy let other threads run."""
    spec, fitting = course.spec, course.fitting

    def draw(step: int) -> GateBatch:
        rng = np.random.default_rng([fitting.seed, phase, step])
        return draw_batch(xrays, fitting.batch_size, spec, spec.size_px // LUNGS_CELL_PX, rng)

    with ThreadPoolExecutor(_WORKERS, thread_name_prefix="draw") as pool:
        waiting = iter(steps)
        ahead = [(step, pool.submit(draw, step)) for step in islice(waiting, _WORKERS + 1)]
        while ahead:
            step, drawn = ahead.pop(0)
            batch = drawn.result()
            ahead += [(later, pool.submit(draw, later)) for later in islice(waiting, 1)]
            yield step, batch


def _pace(step: int, steps: int) -> float:
    """Share of the learning rate: a short rise, then half a cosine."""
    falling = 0.5 * (1.0 + math.cos(math.pi * step / steps)) + 0.01
    return min(1.0, (step + 1) / _WARM_UP) * falling


def _read_state(run: RunFolder) -> dict[str, Any]:
    if (run.root / "state.json").exists():
        return run.read("state.json")
    return {"phase": _MASKS, "step": 0, "checkpoint": "", "history": []}


def _advance(run: RunFolder, state: dict[str, Any]) -> None:
    run.write("state.json", state)
    if state["history"]:
        run.write_table("history.csv", state["history"], columns=_COLUMNS)


def _write_lungs(run: RunFolder, found: ByteArray) -> None:
    temporary = run.root / f".tmp-{_LUNGS}"
    np.save(temporary, found)
    temporary.replace(run.root / _LUNGS)


def _stretched(lungs: ByteArray, pixels: ByteArray) -> ByteArray:
    side = (pixels.shape[1], pixels.shape[0])
    return np.asarray(cv2.resize(lungs, side, interpolation=cv2.INTER_LINEAR), np.uint8)
