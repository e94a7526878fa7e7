"""Train the lung segmenter: the whole of `lungwatch train lungs`."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from lungwatch.errors import ConfigError, DatasetError
from lungwatch.training.data.pixels import FloatArray, KerasModel, LungMasks, read_lung_masks
from lungwatch.training.data.splits import DataRecord
from lungwatch.training.evaluation.scorers import load_keras
from lungwatch.training.keras_file import save_keras
from lungwatch.training.run import RunFolder
from lungwatch.training.runtime import prepare_tensorflow
from lungwatch.training.segmenter import (
    SEGMENTER_INPUT,
    build_segmenter,
    segmentation_loss,
)

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
    model = _fit(data, train, val, run, fitting=fitting, on_epoch=on_epoch)
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


def _fit(
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
