"""Recipes `train lungs` and `train gate`: the lung segmenter and the content gate."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from lungwatch.errors import ConfigError, DatasetError
from lungwatch.files import replacing
from lungwatch.preprocess import PreprocessSpec
from lungwatch.training.data.dataset import LabelMap
from lungwatch.training.data.gate_data import GateData, measure_gate, read_gate_data
from lungwatch.training.data.gate_images import ByteArray, GateBatch, GateXray, draw_batch
from lungwatch.training.data.pixels import FloatArray, KerasModel, LungMasks, read_lung_masks
from lungwatch.training.data.splits import DataRecord
from lungwatch.training.fitting.run import Progress, RunFolder, prepare_tensorflow
from lungwatch.training.fitting.trainer import (
    StepSchedule,
    read_state,
    remove_checkpoints,
    run_steps,
    write_state,
)
from lungwatch.training.networks.lite0_networks import (
    LUNGS_CELL_PX,
    build_gate_network,
    compile_gate,
    gate_output_network,
    gate_outputs,
    train_on,
)
from lungwatch.training.networks.lungs import SEGMENTER_INPUT, build_segmenter, segmentation_loss
from lungwatch.training.networks.weights import load_keras, save_keras

_FEWEST_PAIRS = 8

_COLUMNS = ("epoch", "loss", "val_dice", "learning_rate")


@dataclass(frozen=True, kw_only=True)
class LungFitConfig:
    """How to train the segmenter.

    Attributes
    ----------
    epochs
        How many; the learning rate falls to zero over them as a cosine.
    batch_size, learning_rate
        Of the AdamW optimiser's steps; the rate is that of the first.
    validation
        Fraction of the pairs held out to measure.
    seed
        Of initial weights, drawing, augmentation and of which pairs are held out.
    """

    epochs: int = 25
    batch_size: int = 16
    learning_rate: float = 2e-3
    validation: float = 0.15
    seed: int = 1

    def __post_init__(self) -> None:
        if min(self.epochs, self.batch_size) < 1 or not self.learning_rate > 0:
            raise ConfigError("epochs and batch size must be at least 1, the learning rate above 0")
        if not 0 < self.validation < 1:
            raise ConfigError("the fraction held out must lie within 0..1")


def train_lungs(
    folder: Path,
    root: Path,
    *,
    fitting: LungFitConfig,
    resume: bool = False,
    on_epoch: Callable[[dict[str, float]], None] | None = None,
) -> dict[str, Any]:
    """Train the U-Net on hand-drawn masks, and measure it on pairs it never saw.

    Parameters
    ----------
    folder
        See `read_lung_masks`.
    root
        The run folder to fill.
    fitting
        How.
    resume
        Continue the run that is in `root`.
    on_epoch
        Called with the epoch's row of the history.

    Returns
    -------
    dict
        What is written to `metrics.json`: the numbers of pairs and, on those held out, the
        mean `dice` coefficient and intersection over union (`iou`), and the lowest Dice.

    Raises
    ------
    DatasetError
        If pairs are missing, unreadable or too few.
    ConfigError
        If `root` holds another run.
    MissingExtraError
        If TensorFlow is not installed.
    """
    prepare_tensorflow(fitting.seed)
    data = read_lung_masks(folder, SEGMENTER_INPUT)
    if len(data.names) < _FEWEST_PAIRS:
        raise DatasetError(f"{folder}: {len(data.names)} pairs are too few to learn from")
    order = np.random.default_rng(fitting.seed).permutation(len(data.names))
    held_out = max(1, round(fitting.validation * len(order)))
    val, train = order[:held_out], order[held_out:]
    run = RunFolder(root=root)
    record = DataRecord.of_files(folder)
    run.begin(
        {
            "family": "U-Net, lungs",
            "fit": asdict(fitting),
            "preprocess": SEGMENTER_INPUT.to_dict(),
            "data": {"name": folder.resolve().name, "train": len(train), "val": len(val)},
        },
        resume=resume,
        record=record,
    )
    model = _fit_segmenter(data, train, val, run, fitting=fitting, on_epoch=on_epoch)
    dice, overlap = _agreement(model, data, val)
    metrics = {
        "train": len(train),
        "val": len(val),
        "parameters": int(model.count_params()),
        "dice": round(float(dice.mean()), 4),
        "dice_lowest": round(float(dice.min()), 4),
        "iou": round(float(overlap.mean()), 4),
    }
    run.write("metrics.json", metrics)
    return metrics


def _fit_segmenter(
    data: LungMasks,
    train: NDArray[np.intp],
    val: NDArray[np.intp],
    run: RunFolder,
    *,
    fitting: LungFitConfig,
    on_epoch: Callable[[dict[str, float]], None] | None,
) -> KerasModel:
    import keras

    if run.model.exists():
        return load_keras(run.model)
    history: list[dict[str, float]] = []
    if (run.root / "state.json").exists():
        history = run.read("state.json")["history"]
        model = keras.models.load_model(
            _checkpoint(run, len(history)), custom_objects={"segmentation_loss": segmentation_loss}
        )
    else:
        model = build_segmenter()
        model.compile(
            optimizer=keras.optimizers.AdamW(fitting.learning_rate, weight_decay=1e-3),
            loss=segmentation_loss,
        )
    for epoch in range(len(history) + 1, fitting.epochs + 1):
        done = (epoch - 1) / fitting.epochs
        rate = fitting.learning_rate * (0.5 * (1.0 + math.cos(math.pi * done)) + 0.005)
        model.optimizer.learning_rate.assign(rate)
        loss = _train_epoch(model, data, train, fitting, epoch)
        dice, _ = _agreement(model, data, val)
        row = {
            "epoch": epoch,
            "loss": loss,
            "val_dice": float(dice.mean()),
            "learning_rate": rate,
        }
        history.append(row)
        save_keras(model, _checkpoint(run, epoch))
        run.write("state.json", {"history": history})
        run.write_table("history.csv", history, columns=_COLUMNS)
        _checkpoint(run, epoch - 1).unlink(missing_ok=True)
        if on_epoch:
            on_epoch(row)
    # Without its optimiser, which nobody needs any more and which holds two thirds of it.
    final = build_segmenter()
    final.set_weights(model.get_weights())
    save_keras(final, run.model)
    _checkpoint(run, fitting.epochs).unlink(missing_ok=True)
    return load_keras(run.model)


def _checkpoint(run: RunFolder, epoch: int) -> Path:
    return run.root / f"checkpoint-{epoch:04d}.keras"


def _train_epoch(
    model: KerasModel,
    data: LungMasks,
    train: NDArray[np.intp],
    fitting: LungFitConfig,
    epoch: int,
) -> float:
    rng = np.random.default_rng([fitting.seed, epoch])
    order = rng.permutation(train)
    batches = max(1, len(order) // fitting.batch_size)
    total = 0.0
    for indices in np.array_split(order, batches):
        pairs = [_augmented(data.pixels[i, :, :, 0], data.masks[i], rng) for i in indices]
        pixels, masks = (np.stack(side)[..., np.newaxis] for side in zip(*pairs, strict=True))
        total += float(model.train_on_batch(pixels, masks))
    return total / batches


def _augmented(
    pixels: FloatArray, mask: FloatArray, rng: np.random.Generator
) -> tuple[FloatArray, FloatArray]:
    # Wider than for the classifier: here a mask moves along, nothing is lost, and the
    # segmenter has to find lungs on images of any crop and exposure.
    side = pixels.shape[0]
    centre = (side - 1) / 2.0
    turn, scale = rng.uniform(-15, 15), rng.uniform(0.7, 1.25)
    matrix = np.asarray(cv2.getRotationMatrix2D((centre, centre), turn, scale), dtype=np.float64)
    matrix[0, :2] *= rng.uniform(0.85, 1.15)
    matrix[:, 2] += rng.uniform(-0.1, 0.1, 2) * side
    outside = cv2.BORDER_REPLICATE if rng.random() < 0.5 else cv2.BORDER_CONSTANT
    moved = cv2.warpAffine(pixels, matrix, (side, side), borderMode=outside)
    grey = np.clip(moved, 0.0, 1.0) ** np.exp(rng.uniform(-0.5, 0.5))
    grey = (grey - 0.5) * rng.uniform(0.7, 1.3) + 0.5 + rng.uniform(-0.15, 0.15)
    if rng.random() < 0.3:
        grey = cv2.GaussianBlur(grey, (0, 0), rng.uniform(0.5, 1.5))
    found = cv2.warpAffine(mask, matrix, (side, side))
    return np.clip(grey, 0.0, 1.0).astype(np.float32), found.astype(np.float32)


def _agreement(
    model: KerasModel, data: LungMasks, chosen: NDArray[np.intp]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    logits = np.concatenate(
        [
            np.asarray(model(data.pixels[part], training=False))[..., 0]
            for part in np.array_split(chosen, math.ceil(len(chosen) / 64))
        ]
    )
    found, drawn = logits > 0, data.masks[chosen] > 0.5
    shared = (found & drawn).sum(axis=(1, 2))
    both = found.sum(axis=(1, 2)) + drawn.sum(axis=(1, 2))
    return 2.0 * shared / np.maximum(both, 1), shared / np.maximum(both - shared, 1)


GATE_FAMILY = "Content gate on EfficientNet-Lite0"

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
        See `gate_data.read_gate_data`.
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
        What is written to `metrics.json`; see `gate_data.measure_gate`.

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
            "family": GATE_FAMILY,
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
        _fit_gate(data, run, fitting, progress)
    metrics = measure_gate(load_keras(run.model), data, spec, seed=fitting.seed)
    run.write("metrics.json", metrics)
    return metrics


def _fit_gate(data: GateData, run: RunFolder, fitting: GateFitConfig, progress: Progress) -> None:
    course = StepSchedule(
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
    answering = gate_output_network(model)
    plain = gate_outputs(answering, pixels).lungs
    mirrored = gate_outputs(answering, np.ascontiguousarray(pixels[:, :, ::-1])).lungs[:, :, ::-1]
    return np.asarray(np.round((plain + mirrored) * 127.5), np.uint8)


def _phase(
    xrays: Sequence[GateXray], course: StepSchedule, state: dict[str, Any], fitting: GateFitConfig
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

    return run_steps(course, state, steps, build=build, draw=draw, learn=learn)


def _write_lungs(run: RunFolder, found: ByteArray) -> None:
    with replacing(run.root / _LUNGS) as temporary:
        np.save(temporary, found)


def _stretched(lungs: ByteArray, pixels: ByteArray) -> ByteArray:
    side = (pixels.shape[1], pixels.shape[0])
    return np.asarray(cv2.resize(lungs, side, interpolation=cv2.INTER_LINEAR), np.uint8)
