"""Networks that locate the lungs: the segmenter and the finder of their box."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from lungwatch.errors import DatasetError
from lungwatch.preprocess import PreprocessSpec
from lungwatch.training.data.pixels import FloatArray, KerasModel, Tensor
from lungwatch.training.fitting.augmentation import Framing, box_around, reframe
from lungwatch.training.fitting.run import Progress, prepare_tensorflow
from lungwatch.training.fitting.trainer import FitConfig, Trainer, TrainingTask

SEGMENTER_PX = 128

SEGMENTER_INPUT = PreprocessSpec(size_px=SEGMENTER_PX)


_SEGMENTER_FILTERS = (12, 24, 48, 96)

_BOTTOM_FILTERS = 128

_SEGMENT_BATCH = 64


def build_segmenter() -> KerasModel:
    """Build the network, about 0.8 M parameters.

    Returns
    -------
    keras.Model
        From `pixels`, float32 (N, 128, 128, 1), 0..1, to each pixel's logit of being lung,
        (N, 128, 128, 1).
    """
    import keras

    def block(x: Tensor, filters: int) -> Tensor:
        for _ in range(2):
            x = keras.layers.Conv2D(filters, 3, padding="same", use_bias=False)(x)
            x = keras.layers.BatchNormalization(momentum=0.9)(x)
            x = keras.layers.ReLU()(x)
        return x

    pixels = keras.Input((SEGMENTER_PX, SEGMENTER_PX, 1), name="pixels")
    x, skips = pixels, []
    for filters in _SEGMENTER_FILTERS:
        x = block(x, filters)
        skips.append(x)
        x = keras.layers.MaxPooling2D()(x)
    x = block(x, _BOTTOM_FILTERS)
    for filters, skip in zip(reversed(_SEGMENTER_FILTERS), reversed(skips), strict=True):
        x = keras.layers.UpSampling2D(interpolation="bilinear")(x)
        x = block(keras.layers.Concatenate()([x, skip]), filters)
    return keras.Model(pixels, keras.layers.Conv2D(1, 1, name="lung_logit")(x), name="lungs")


def segmentation_loss(masks: Tensor, logits: Tensor) -> Tensor:
    """Cross-entropy plus one minus the soft Dice coefficient, over the whole batch."""
    import tensorflow as tf

    found = tf.sigmoid(logits)
    shared = tf.reduce_sum(found * masks)
    dice = (2.0 * shared + 1.0) / (tf.reduce_sum(found) + tf.reduce_sum(masks) + 1.0)
    crossed = tf.nn.sigmoid_cross_entropy_with_logits(masks, logits)
    return tf.reduce_mean(crossed) + 1.0 - dice


def segment(model: KerasModel, pixels: FloatArray) -> FloatArray:
    """Find the lungs.

    Parameters
    ----------
    model
        What `build_segmenter` built, trained.
    pixels
        float32, shape (N, S, S, 1), 0..1, windowed to the 1st..99th percentile.

    Returns
    -------
    numpy.ndarray
        float32, shape (N, S, S): each pixel's probability of being lung.
    """
    side = pixels.shape[1]
    found = np.empty(pixels.shape[:3], dtype=np.float32)
    for start in range(0, len(pixels), _SEGMENT_BATCH):
        small = np.stack(
            [_resized(x[:, :, 0], SEGMENTER_PX) for x in pixels[start : start + _SEGMENT_BATCH]]
        )
        logits = np.asarray(model(small[..., np.newaxis], training=False))[..., 0]
        for offset, logit in enumerate(logits):
            found[start + offset] = _resized(1.0 / (1.0 + np.exp(-logit)), side)
    return found


def _resized(image: FloatArray, side: int) -> FloatArray:
    how = cv2.INTER_AREA if side < image.shape[0] else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(image, (side, side), interpolation=how), dtype=np.float32)


FINDER = "finder"

FINDER_PX = 64

FINDER_EPOCHS = 30


_LEARNT_PX = 128  # so that frames can be changed without losing what the network sees


_FINDER_FILTERS = (16, 32, 48, 64)

_PLACES = 16  # channels that are read cell by cell

_LEARNING_RATE = 2e-3

_GAMMA = 0.3  # largest change of exposure, as a logarithm


@dataclass(frozen=True, kw_only=True, eq=False)
class FoundBox:
    """A network that finds the box of the lungs.

    Attributes
    ----------
    finder
        See `build_finder`.
    parameters
        How many it has.
    overlap
        Intersection over union with the segmenter's boxes, (N,), of validation images.
    """

    finder: KerasModel
    parameters: int
    overlap: FloatArray

    def to_dict(self) -> dict[str, float]:
        """Return what metrics.json says of it."""
        return {
            "parameters": self.parameters,
            "iou": round(float(self.overlap.mean()), 4),
            "iou_lowest": round(float(self.overlap.min()), 4),
        }


def build_finder(side: int) -> KerasModel:
    """Build the network, 0.34 M parameters.

    Parameters
    ----------
    side
        Of the images, a multiple of 64 px.

    Returns
    -------
    keras.Model
        From `pixels`, float32 (N, side, side, 1), 0..1, to left, top, right and bottom of the
        lungs, (N, 4), 0..1.
    """
    import keras

    pixels = keras.Input((side, side, 1), name="pixels")
    x = keras.layers.AveragePooling2D(side // FINDER_PX)(pixels)
    for filters in _FINDER_FILTERS:
        x = keras.layers.Conv2D(filters, 3, padding="same", use_bias=False)(x)
        x = keras.layers.BatchNormalization(momentum=0.9)(x)
        x = keras.layers.ReLU()(x)
        if filters != _FINDER_FILTERS[-1]:
            x = keras.layers.MaxPooling2D()(x)
    x = keras.layers.Conv2D(_PLACES, 1)(x)
    # No hidden layer: with this many inputs of one sign its units die in the first steps.
    edges = keras.layers.Dense(4, activation="sigmoid")(keras.layers.Flatten()(x))
    return keras.Model(pixels, edges, name=FINDER)


def fit_finder(
    pixels: FloatArray,
    lungs: FloatArray,
    *,
    seed: int = 1,
    epochs: int = FINDER_EPOCHS,
    batch_size: int = 32,
    on_epoch: Callable[[dict[str, float]], None] | None = None,
) -> KerasModel:
    """Train the network on images whose lungs are known.

    Parameters
    ----------
    pixels, lungs
        float32, (N, S, S, 1) and (N, S, S), 0..1; S a multiple of 64 px.
    seed
        Of weights and augmentation: the same seed trains the same network.
    epochs
        Passes over the images, each shown in another frame.
    batch_size
        Images of a step.
    on_epoch
        Called with `epoch` and `loss` after each.

    Raises
    ------
    DatasetError
        If no image has lungs that one could put a box around.
    """
    prepare_tensorflow(seed)
    import keras

    steps = math.ceil(len(pixels) / batch_size)
    framing = Framing(lung_crop=0.3)
    trained: list[KerasModel] = []

    def build() -> KerasModel:
        model = build_finder(pixels.shape[1])
        rate = keras.optimizers.schedules.CosineDecay(_LEARNING_RATE, epochs * steps)
        model.compile(optimizer=keras.optimizers.AdamW(rate, weight_decay=1e-3), loss="mae")
        return model

    def show(indices: NDArray[np.intp], rng: np.random.Generator) -> tuple[FloatArray, ...]:
        shown, masks = reframe(pixels[indices], lungs[indices], framing, rng)
        shown **= np.exp(rng.uniform(-_GAMMA, _GAMMA, (len(shown), 1, 1, 1)))
        known, boxes = boxes_around(masks)
        return shown[known], boxes[known]

    def task(model: KerasModel) -> TrainingTask:
        def step(shown: FloatArray, boxes: FloatArray) -> tuple[float | None, None]:
            return (float(model.train_on_batch(shown, boxes)) if len(shown) else None), None

        return TrainingTask(
            order=lambda _, rng: np.array_split(rng.permutation(len(pixels)), steps),
            show=show,
            step=step,
        )

    config = FitConfig(epochs=epochs, batch_size=batch_size, patience=None, average=0.0, seed=seed)
    listeners = Progress(on_epoch=on_epoch)
    state = Trainer(build, task, config, progress=listeners, keep=trained.append).fit()
    if not any(math.isfinite(row["loss"]) for row in state.history):
        raise DatasetError("no lungs were found in the training images")
    return trained[-1]


def boxes_around(lungs: FloatArray) -> tuple[NDArray[np.bool_], FloatArray]:
    """Put a box around the lungs of each mask.

    Returns
    -------
    known, boxes
        bool (N,), whether there are lungs; float32 (N, 4): left, top, right, bottom, 0..1.
    """
    boxes = np.zeros((len(lungs), 4), dtype=np.float32)
    known = np.zeros(len(lungs), dtype=np.bool_)
    for index, mask in enumerate(lungs):
        if (box := box_around(mask)) is not None:
            known[index], boxes[index] = True, box
    return known, boxes


def agreement(found: FloatArray, wanted: FloatArray) -> FloatArray:
    """Return the intersection of boxes over their union, (N,), for two times (N, 4)."""
    low, high = np.maximum(found[:, :2], wanted[:, :2]), np.minimum(found[:, 2:], wanted[:, 2:])
    shared = np.maximum(high - low, 0.0).prod(axis=1)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(axis=1) for boxes in (found, wanted)]
    return np.asarray(shared / (areas[0] + areas[1] - shared), dtype=np.float32)


def _shrunk(image: FloatArray) -> FloatArray:
    side = (_LEARNT_PX, _LEARNT_PX)
    plane = cv2.resize(image[..., 0], side, interpolation=cv2.INTER_AREA)
    return np.asarray(plane[..., np.newaxis], dtype=np.float32)
