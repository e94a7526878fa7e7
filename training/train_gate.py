"""Train the content gate: the whole of `lungwatch train gate`.

First the network learns the lung masks drawn by hand, and then finds the lungs of all X-rays that
nobody drew; from its start again, it learns everything on all of them.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from lungwatch.errors import ConfigError
from lungwatch.preprocess import PreprocessSpec
from lungwatch.training.data.dataset import LabelMap
from lungwatch.training.data.gate_data import GateData, measure_gate, read_gate_data
from lungwatch.training.data.gate_images import ByteArray, GateBatch, GateXray, draw_batch
from lungwatch.training.data.pixels import FloatArray, KerasModel
from lungwatch.training.evaluation.scorers import load_keras
from lungwatch.training.gate_network import (
    LUNGS_CELL_PX,
    answering_network,
    build_gate_network,
    compile_gate,
    look_with,
    train_on,
)
from lungwatch.training.keras_file import save_keras
from lungwatch.training.progress import Progress
from lungwatch.training.run import RunFolder
from lungwatch.training.runtime import prepare_tensorflow
from lungwatch.training.steps import (
    Course,
    read_state,
    remove_checkpoints,
    take_steps,
    write_state,
)

FAMILY = "Content gate on EfficientNet-Lite0"
_MASKS, _ALL = 1, 2
_LUNGS = "lungs.npy"


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
    labels: LabelMap | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train the gate on frontal chest X-rays, and measure it.

    Parameters
    ----------
    location, masks, leave_out, labels
        See `lungwatch.training.data.gate_data.read_gate_data`.
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
        What is written to `metrics.json`; see `lungwatch.training.data.gate_data.measure_gate`.

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
        labels=labels,
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
        record=data.files,
    )
    if not run.model.exists():
        _fit(data, run, fitting, progress)
    metrics = measure_gate(load_keras(run.model), data, spec, seed=fitting.seed)
    run.write("metrics.json", metrics)
    return metrics


def _fit(data: GateData, run: RunFolder, fitting: GateFitConfig, progress: Progress) -> None:
    course = Course(
        run=run,
        learning_rate=fitting.learning_rate,
        checkpoint_steps=fitting.checkpoint_steps,
        progress=progress,
    )
    state = read_state(run)
    if state["phase"] == _MASKS:
        finder = _phase(data.masks, course, state, fitting)
        state = {**state, "phase": _ALL, "step": 0, "checkpoint": ""}
        _write_lungs(run, find_lungs(finder, data.train.pixels))
        write_state(run, state)
    found = np.load(run.root / _LUNGS)
    xrays = [
        replace(xray, lungs=_stretched(lungs, xray.pixels))
        for xray, lungs in zip(data.train.xrays, found, strict=True)
    ]
    model = _phase([*xrays, *data.masks], course, state, fitting)
    # Without its optimiser, which nobody needs any more and which holds most of it.
    final = build_gate_network(fitting.size_px, imagenet=False)
    final.set_weights(model.get_weights())
    save_keras(final, run.model)
    remove_checkpoints(run)
    (run.root / _LUNGS).unlink(missing_ok=True)


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
    xrays: Sequence[GateXray], course: Course, state: dict[str, Any], fitting: GateFitConfig
) -> KerasModel:
    """Take the phase's steps, from the state's on, and average the weights in."""
    phase, spec = state["phase"], PreprocessSpec(size_px=fitting.size_px)
    steps = fitting.mask_steps if phase == _MASKS else fitting.steps

    def build() -> KerasModel:
        model = build_gate_network(fitting.size_px, imagenet=fitting.imagenet)
        compile_gate(model, fitting.learning_rate, fitting.weight_decay, steps=steps)
        return model

    def draw(step: int) -> GateBatch:
        rng = np.random.default_rng([fitting.seed, phase, step])
        return draw_batch(xrays, fitting.batch_size, spec, spec.size_px // LUNGS_CELL_PX, rng)

    def learn(model: KerasModel, batch: GateBatch, step: int) -> float:
        return train_on(model, batch, (fitting.seed, phase * 1_000_000 + step))

    return take_steps(course, state, steps, build=build, draw=draw, learn=learn)


def _write_lungs(run: RunFolder, found: ByteArray) -> None:
    temporary = run.root / f".tmp-{_LUNGS}"
    np.save(temporary, found)
    temporary.replace(run.root / _LUNGS)


def _stretched(lungs: ByteArray, pixels: ByteArray) -> ByteArray:
    side = (pixels.shape[1], pixels.shape[0])
    return np.asarray(cv2.resize(lungs, side, interpolation=cv2.INTER_LINEAR), np.uint8)
