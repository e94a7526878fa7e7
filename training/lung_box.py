"""Where the lungs are, as a box: a small network that learns it from the segmenter's masks.

An eightieth of the segmenter's work, so that it can be part of the network that ships.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from lungwatch.errors import ConfigError, DatasetError
from lungwatch.training.data.pixels import FloatArray, KerasModel
from lungwatch.training.framing import Framing, box_around, reframe
from lungwatch.training.prepare import Part, Prepared
from lungwatch.training.progress import Progress
from lungwatch.training.runtime import prepare_tensorflow
from lungwatch.training.segmenter import segment

FINDER = "finder"
SIZE_PX = 64
EPOCHS = 30

_LEARNT_PX = 128  # so that frames can be changed without losing what the network sees

_FILTERS = (16, 32, 48, 64)
_PLACES = 16  # channels that are read cell by cell
_LEARNING_RATE = 2e-3
_GAMMA = 0.3  # largest change of exposure, as a logarithm


@dataclass(frozen=True, kw_only=True, eq=False)
class LearntBox:
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
    x = keras.layers.AveragePooling2D(side // SIZE_PX)(pixels)
    for filters in _FILTERS:
        x = keras.layers.Conv2D(filters, 3, padding="same", use_bias=False)(x)
        x = keras.layers.BatchNormalization(momentum=0.9)(x)
        x = keras.layers.ReLU()(x)
        if filters != _FILTERS[-1]:
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
    epochs: int = EPOCHS,
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

    model = build_finder(pixels.shape[1])
    steps = math.ceil(len(pixels) / batch_size)
    rate = keras.optimizers.schedules.CosineDecay(_LEARNING_RATE, epochs * steps)
    model.compile(optimizer=keras.optimizers.AdamW(rate, weight_decay=1e-3), loss="mae")
    framing = Framing(lung_crop=0.3)
    for epoch in range(1, epochs + 1):
        rng = np.random.default_rng([seed, epoch])
        losses = []
        for indices in np.array_split(rng.permutation(len(pixels)), steps):
            shown, masks = reframe(pixels[indices], lungs[indices], framing, rng)
            shown **= np.exp(rng.uniform(-_GAMMA, _GAMMA, (len(shown), 1, 1, 1)))
            known, boxes = boxes_around(masks)
            if known.any():
                losses.append(float(model.train_on_batch(shown[known], boxes[known])))
        if not losses:
            raise DatasetError("no lungs were found in the training images")
        if on_epoch:
            on_epoch({"epoch": epoch, "loss": float(np.mean(losses))})
    return model


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


def learn_box(
    prepared: Prepared, segmenter: KerasModel, *, progress: Progress | None = None
) -> LearntBox:
    """Train the network on a data set's training images, and see how well its boxes fit.

    Parameters
    ----------
    prepared
        The data set; its pixels' side must be a multiple of 64 px.
    segmenter
        See `lungwatch.training.segmenter`: what it finds is what is learnt.
    progress
        Listeners.

    Raises
    ------
    ConfigError
        If the side is no such multiple.
    DatasetError
        If no lungs are found in training or validation images.
    """
    if prepared.spec.size_px % SIZE_PX:
        raise ConfigError(f"a box of the lungs is found in inputs of a multiple of {SIZE_PX} px")

    def with_lungs(part: Part) -> tuple[FloatArray, FloatArray]:
        pixels = np.stack([_shrunk(image) for image in part.pixels])
        return pixels, segment(segmenter, pixels)

    small = fit_finder(
        *with_lungs(prepared.train), on_epoch=progress.on_epoch if progress else None
    )
    pixels, lungs = with_lungs(prepared.val)
    known, boxes = boxes_around(lungs)
    if not known.any():
        raise DatasetError("no lungs were found in the validation images")
    finder = build_finder(prepared.spec.size_px)
    finder.set_weights(small.get_weights())
    return LearntBox(
        finder=finder,
        parameters=int(finder.count_params()),
        overlap=agreement(np.asarray(small(pixels[known], training=False)), boxes[known]),
    )


def _shrunk(image: FloatArray) -> FloatArray:
    side = (_LEARNT_PX, _LEARNT_PX)
    plane = cv2.resize(image[..., 0], side, interpolation=cv2.INTER_AREA)
    return np.asarray(plane[..., np.newaxis], dtype=np.float32)
