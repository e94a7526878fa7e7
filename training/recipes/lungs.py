"""Recipes `train lungs` and `train gate`: the lung segmenter and the content gate."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
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
from lungwatch.training.fitting.run import Progress, RunFolder, open_run, prepare_tensorflow
from lungwatch.training.fitting.tasks import StepConfig, fit_steps
from lungwatch.training.fitting.trainer import (
    FitConfig,
    Trainer,
    TrainingTask,
    save_without_optimizer,
)
from lungwatch.training.networks.lungs import (
    LUNGS_CELL_PX,
    SEGMENTER_INPUT,
    build_gate_network,
    build_segmenter,
    compile_gate,
    gate_output_network,
    gate_outputs,
    segmentation_loss,
    train_on,
)
from lungwatch.training.networks.weights import load_keras

_FEWEST_PAIRS = 8


@dataclass(frozen=True, kw_only=True)
class LungFitConfig:
    """Configuration of the training of the segmenter.

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
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train the U-Net on hand-drawn masks, and measure it on pairs it never saw.

    `metrics.json` holds the numbers of pairs and, on those held out, the mean `dice` coefficient
    and intersection over union (`iou`), and the lowest Dice.

    Parameters
    ----------
    folder
        See `read_lung_masks`.
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
    if not run.model.exists():
        _fit_segmenter(data, train, val, run, fitting=fitting, progress=progress)
    model = load_keras(run.model)
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
    progress: Progress | None,
) -> None:
    def build() -> KerasModel:
        import keras

        model = build_segmenter()
        model.compile(
            optimizer=keras.optimizers.AdamW(loop.rate(1), weight_decay=1e-3),
            loss=segmentation_loss,
        )
        return model

    def show(indices: NDArray[np.intp], rng: np.random.Generator) -> tuple[FloatArray, ...]:
        pairs = [_augmented(data.pixels[i, :, :, 0], data.masks[i], rng) for i in indices]
        return tuple(np.stack(side)[..., np.newaxis] for side in zip(*pairs, strict=True))

    def task(model: KerasModel) -> TrainingTask:
        batches = max(1, len(train) // fitting.batch_size)
        return TrainingTask(
            order=lambda _, rng: np.array_split(rng.permutation(train), batches),
            show=show,
            step=lambda pixels, masks: (float(model.train_on_batch(pixels, masks)), None),
            validate=lambda: {"val_dice": float(_agreement(model, data, val)[0].mean())},
        )

    progress_made = np.arange(fitting.epochs) / fitting.epochs
    loop = FitConfig(
        epochs=fitting.epochs,
        batch_size=fitting.batch_size,
        patience=None,
        learning_rates=tuple(
            fitting.learning_rate * (0.5 * (1.0 + math.cos(math.pi * done)) + 0.005)
            for done in progress_made.tolist()
        ),
        average=0.0,
        seed=fitting.seed,
    )
    Trainer(
        build,
        task,
        loop,
        run,
        progress=progress,
        keep=lambda model: save_without_optimizer(model, build_segmenter, run.model),
        custom_objects={"segmentation_loss": segmentation_loss},
    ).fit()


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
class GateFitConfig(StepConfig):
    """Configuration of the training of the gate; `steps` are those on all pictures.

    Attributes
    ----------
    mask_steps
        Steps on the lung masks alone, before the lungs of all X-rays are found.
    held_out
        Fraction of the lung masks that measures.
    """

    size_px: int = 160
    mask_steps: int = 450
    steps: int = 1600
    learning_rate: float = 1.5e-3
    weight_decay: float = 1e-3
    held_out: float = 0.1
    checkpoint_steps: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mask_steps < 1 or not 0 < self.held_out < 1:
            raise ConfigError("mask steps must be at least 1, the fraction held out within 0..1")


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
    """Train the gate on frontal chest X-rays, and measure it by `measure_gate`.

    First the network learns the lung masks drawn by hand, and then finds the lungs of all X-rays
    that nobody drew; a fresh network then learns everything on all of them.

    Parameters
    ----------
    location, masks, leave_out, labels
        See `gate_data.read_gate_data`.
    progress
        Listeners; an epoch is the steps between two checkpoints.
    """
    progress = progress or Progress()
    run = open_run(root, resume=resume, seed=fitting.seed)
    import keras

    # Fails early, before thousands of images are read, if ImageNet weights are not available.
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
    """Train on the masks, find the lungs of all X-rays, then train a fresh network on all."""
    spec = PreprocessSpec(size_px=fitting.size_px)
    lungs = run.root / _LUNGS

    def train(
        xrays: Sequence[GateXray], phase: int, steps: int, keep: Callable[[KerasModel], None]
    ) -> None:
        def build() -> KerasModel:
            model = build_gate_network(fitting.size_px, imagenet=fitting.imagenet)
            compile_gate(model, fitting.learning_rate, fitting.weight_decay, steps=steps)
            return model

        def draw(step: int) -> GateBatch:
            rng = np.random.default_rng([fitting.seed, phase, step])
            return draw_batch(xrays, fitting.batch_size, spec, spec.size_px // LUNGS_CELL_PX, rng)

        fit_steps(
            build,
            fitting,
            run,
            draw=draw,
            learn=lambda model, batch, step: train_on(
                model, batch, (fitting.seed, phase * 1_000_000 + step)
            ),
            keep=keep,
            steps=steps,
            phase=phase,
            earlier_epochs=math.ceil(fitting.mask_steps / fitting.checkpoint_steps) * (phase - 1),
            progress=progress,
        )

    def keep_lungs(model: KerasModel) -> None:
        with replacing(lungs) as temporary:
            np.save(temporary, find_lungs(model, data.train.pixels))

    def keep_gate(model: KerasModel) -> None:
        fresh = partial(build_gate_network, fitting.size_px, imagenet=False)
        save_without_optimizer(model, fresh, run.model)

    train(data.masks, _MASKS, fitting.mask_steps, keep_lungs)
    xrays = [
        replace(xray, lungs=_stretched(found, xray.pixels))
        for xray, found in zip(data.train.xrays, np.load(lungs), strict=True)
    ]
    train([*xrays, *data.masks], _ALL, fitting.steps, keep_gate)
    lungs.unlink(missing_ok=True)


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


def _stretched(lungs: ByteArray, pixels: ByteArray) -> ByteArray:
    side = (pixels.shape[1], pixels.shape[0])
    return np.asarray(cv2.resize(lungs, side, interpolation=cv2.INTER_LINEAR), np.uint8)
