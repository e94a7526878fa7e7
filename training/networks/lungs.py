"""Networks of the lungs: segmenter, box finder, content gate, network and finder of lung fields."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from lungwatch.errors import DatasetError
from lungwatch.preprocess import PreprocessSpec
from lungwatch.training.data.gate_images import TURNS, GateBatch
from lungwatch.training.data.pixels import FloatArray, KerasModel, Tensor
from lungwatch.training.evaluation.gate_rates import GateOutput
from lungwatch.training.fitting.augmentation import (
    FIELD_CLASSES,
    Framing,
    LungField,
    box_around,
    reframe,
    view_tensor,
)
from lungwatch.training.fitting.run import Progress, prepare_tensorflow
from lungwatch.training.fitting.trainer import FitConfig, Trainer, TrainingTask
from lungwatch.training.networks.heads import BOX, VIEW, crop
from lungwatch.training.networks.weights import build_lite0

SEGMENTER_PX = 128
SEGMENTER_INPUT = PreprocessSpec(size_px=SEGMENTER_PX)
_SEGMENTER_FILTERS = (12, 24, 48, 96)
_BOTTOM_FILTERS = 128
_SEGMENT_BATCH = 64


def build_segmenter() -> KerasModel:
    """Build the segmenter, a U-Net of about 0.8 M parameters.

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
    """Segment the lungs of images.

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
    """Build the box finder, 0.34 M parameters.

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
    """Train the box finder on images whose lungs are known.

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


FRONTAL, TURN, INVERTED, LUNGS = "frontal", "turn", "inverted", "lungs"
CHANCES, EMBEDDING = "chances", "embedding"
LUNGS_CELL_PX = 4
_TRUNK_END = "b11_exp_relu"  # 672 channels, 16 pixels a cell
_DEEP, _MIDDLE, _FINE = "b10_add", "b4_add", "b2_add"  # 16, 8 and 4 pixels a cell
_DROPOUT = 0.2
_AT_ONCE = 64

# Of the averaged weights; reached from 450 steps on.
_MOST_MOMENTUM, _SHORT_RUN = 0.995, 2.25


def build_gate_network(size_px: int, *, imagenet: bool) -> KerasModel:
    """Build the network.

    Parameters
    ----------
    size_px
        Side of the input; a multiple of 16.
    imagenet
        Whether the trunk starts from ImageNet weights.

    Returns
    -------
    keras.Model
        From `pixels`, float32 (N, S, S, 1), 0..1, to a dict of logits: `frontal` (N, 1), `turn`
        (N, 4), `inverted` (N, 1), `lungs` (N, S/4, S/4, 1).

    Raises
    ------
    MissingExtraError
        If the package with ImageNet's weights is not installed.
    """
    import keras

    layers = keras.layers
    whole = build_lite0(size_px, imagenet=imagenet)
    trunk = keras.Model(
        whole.input,
        [whole.get_layer(name).output for name in (_TRUNK_END, _DEEP, _MIDDLE, _FINE)],
        name="trunk",
    )
    pixels = keras.Input((size_px, size_px, 1), name="pixels")
    x = layers.Concatenate()([pixels] * 3)
    x = layers.Rescaling(255.0 / 128.0, offset=-127.0 / 128.0)(x)
    top, deep, middle, fine = trunk(x)
    pooled = layers.GlobalAveragePooling2D(name=EMBEDDING)(top)
    hidden = layers.Dropout(_DROPOUT, name="dropout")(pooled)
    hidden = layers.Dense(96, activation="relu", name="hidden")(hidden)

    field = _conv(deep, 32, 1)
    field = layers.UpSampling2D(interpolation="bilinear")(field)
    field = _conv(layers.Concatenate()([field, _conv(middle, 24, 1)]), 32, 3)
    field = layers.UpSampling2D(interpolation="bilinear")(field)
    field = _conv(layers.Concatenate()([field, _conv(fine, 16, 1)]), 16, 3)
    return keras.Model(
        pixels,
        {
            FRONTAL: layers.Dense(1, name=FRONTAL)(hidden),
            TURN: layers.Dense(TURNS, name=TURN)(hidden),
            INVERTED: layers.Dense(1, name=INVERTED)(hidden),
            LUNGS: layers.Conv2D(1, 1, name=LUNGS)(field),
        },
        name="gate",
    )


def gate_output_network(model: KerasModel) -> KerasModel:
    """Return the network with the outputs of an exported gate.

    Returns
    -------
    keras.Model
        From the same `pixels` to a dict: `chances` (N, 3), 0..1, of being frontal, upright and
        not inverted; `embedding` (N, C); `lungs` (N, S/4, S/4), 0..1.
    """
    from keras import Model, layers, ops

    found = model.output
    chances = [
        ops.sigmoid(found[FRONTAL]),
        ops.softmax(found[TURN])[:, :1],
        1.0 - ops.sigmoid(found[INVERTED]),
    ]
    return Model(
        model.input,
        {
            # As a layer, which can be named: a loaded network has its own "concatenate".
            CHANCES: layers.Concatenate(axis=1, name=CHANCES)(chances),
            EMBEDDING: model.get_layer(EMBEDDING).output,
            LUNGS: ops.sigmoid(found[LUNGS])[..., 0],
        },
    )


def gate_outputs(answering: KerasModel, pixels: FloatArray) -> GateOutput:
    """Run that network on preprocessed pictures, (N, S, S, 1), 0..1."""
    parts = np.array_split(pixels, max(1, math.ceil(len(pixels) / _AT_ONCE)))
    found = [answering(part, training=False) for part in parts]

    def joined(name: str) -> FloatArray:
        return np.concatenate([np.asarray(one[name], np.float32) for one in found])

    return GateOutput(chances=joined(CHANCES), embedding=joined(EMBEDDING), lungs=joined(LUNGS))


def compile_gate(
    model: KerasModel, learning_rate: float, weight_decay: float, *, steps: int
) -> None:
    """Give the network its losses and AdamW with averaged weights.

    Parameters
    ----------
    model
        Of `build_gate_network`.
    learning_rate, weight_decay
        AdamW's.
    steps
        How many will be taken: the average reaches back over 200 of them, or over less than half
        of a short run, whose first weights it would not forget otherwise.
    """
    import keras

    momentum = min(_MOST_MOMENTUM, max(0.0, 1.0 - _SHORT_RUN / steps))
    model.compile(
        optimizer=keras.optimizers.AdamW(
            learning_rate, weight_decay=weight_decay, use_ema=True, ema_momentum=momentum
        ),
        loss={
            FRONTAL: keras.losses.BinaryCrossentropy(from_logits=True, label_smoothing=0.01),
            TURN: keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=0.01),
            INVERTED: keras.losses.BinaryCrossentropy(from_logits=True, label_smoothing=0.01),
            LUNGS: keras.losses.BinaryCrossentropy(from_logits=True),
        },
        loss_weights={FRONTAL: 1.0, TURN: 0.5, INVERTED: 0.5, LUNGS: 1.0},
        # On a processor XLA takes half a minute to compile what TensorFlow runs as fast without.
        jit_compile=False if keras.backend.backend() == "tensorflow" else "auto",
    )


def train_on(model: KerasModel, batch: GateBatch, seed: tuple[int, int]) -> float:
    """Train on one batch; unknown labels of a picture have no weight.

    Parameters
    ----------
    model
        The compiled network.
    batch
        What is learnt from.
    seed
        Of the features that are left out: a checkpoint does not hold that state.

    Returns
    -------
    float
        The loss.
    """
    _seed_dropout(model, seed)
    found = model.train_on_batch(
        batch.pixels,
        {
            FRONTAL: batch.frontal,
            TURN: batch.turn,
            INVERTED: batch.inverted,
            LUNGS: batch.lungs,
        },
        sample_weight={
            FRONTAL: np.ones(len(batch.pixels), np.float32),
            TURN: batch.is_chest,
            INVERTED: batch.is_chest,
            LUNGS: np.repeat(batch.has_lungs, batch.lungs.shape[1] ** 2).reshape(
                batch.lungs.shape[:3]
            ),
        },
    )
    return float(found[0] if isinstance(found, Sequence | np.ndarray) else found)


def _conv(x: Tensor, filters: int, kernel: int) -> Tensor:
    import keras

    x = keras.layers.Conv2D(filters, kernel, padding="same", use_bias=False)(x)
    x = keras.layers.BatchNormalization()(x)
    return keras.layers.ReLU(max_value=6.0)(x)


TRUNK, POOLED = "field_trunk", "field_pooled"
HIDDEN, THREE = "field_hidden", "field_classes"
_FIELD_TRUNK_END = "b11_exp_relu"  # 672 channels, 16 pixels a cell
_HIDDEN_UNITS = 64
_FIELD_DROPOUT, _DROPOUT_HIDDEN = 0.3, 0.2
_SMOOTHING = 0.05
_AVERAGED = 0.99


def build_field_network(size_px: int, *, imagenet: bool) -> KerasModel:
    """Build the network.

    Parameters
    ----------
    size_px
        Side of the view; a multiple of 16.
    imagenet
        Whether the trunk starts from ImageNet weights.

    Returns
    -------
    keras.Model
        From the view (`augmentation.view_tensor`), float32 (N, S, S, 1), 0..1, to the
        logits of `CLASSES`, (N, 3).

    Raises
    ------
    MissingExtraError
        If the package with ImageNet's weights is not installed.
    """
    import keras

    layers = keras.layers
    shown = keras.Input((size_px, size_px, 1), name="view")
    features = build_trunk(size_px, imagenet=imagenet)(shown)
    pooled = layers.GlobalAveragePooling2D(name=POOLED)(features)
    x = layers.Dropout(_FIELD_DROPOUT)(pooled)
    x = layers.Dense(_HIDDEN_UNITS, activation="relu", name=HIDDEN)(x)
    x = layers.Dropout(_DROPOUT_HIDDEN)(x)
    return keras.Model(shown, layers.Dense(len(FIELD_CLASSES), name=THREE)(x), name="fields")


def build_trunk(size_px: int, *, imagenet: bool) -> KerasModel:
    """Build the trunk: from the view, (N, S, S, 1), to feature maps, (N, S/16, S/16, 672)."""
    import keras

    whole = build_lite0(size_px, imagenet=imagenet)
    cut = keras.Model(whole.input, whole.get_layer(_FIELD_TRUNK_END).output, name="lite0")
    shown = keras.Input((size_px, size_px, 1), name="view")
    x: Tensor = keras.layers.Concatenate()([shown] * 3)
    x = keras.layers.Rescaling(255.0 / 128.0, offset=-127.0 / 128.0)(x)
    return keras.Model(shown, cut(x), name=TRUNK)


def compile_fields(model: KerasModel, learning_rate: float, weight_decay: float) -> None:
    """Give the network its loss and AdamW with averaged weights."""
    import keras

    model.compile(
        optimizer=keras.optimizers.AdamW(
            learning_rate, weight_decay=weight_decay, use_ema=True, ema_momentum=_AVERAGED
        ),
        loss=keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=_SMOOTHING),
        # On a processor XLA takes half a minute to compile what TensorFlow runs as fast without.
        jit_compile=False if keras.backend.backend() == "tensorflow" else "auto",
    )


def learn_fields(
    model: KerasModel, pixels: FloatArray, targets: FloatArray, seed: tuple[int, int]
) -> float:
    """Train on one batch.

    Parameters
    ----------
    model
        The compiled network.
    pixels, targets
        Of `augmentation.draw_field_batch`.
    seed
        Of the features that are left out.

    Returns
    -------
    float
        The loss.
    """
    _seed_dropout(model, seed)
    found = model.train_on_batch(pixels, targets)
    return float(found[0] if isinstance(found, Sequence | np.ndarray) else found)


def _seed_dropout(model: KerasModel, seed: tuple[int, int]) -> None:
    import keras

    for layer in model.layers:
        if isinstance(layer, keras.layers.Dropout):
            layer.seed_generator.state.assign(seed)


def opacity_logit(logits: FloatArray) -> FloatArray:
    """Turn the logits of `CLASSES`, (N, 3), into that of an opacity against the rest, (N,)."""
    return np.asarray(logits[:, 2] - np.logaddexp(logits[:, 0], logits[:, 1]), np.float32)


def abnormal_logit(logits: FloatArray) -> FloatArray:
    """Turn the logits of `CLASSES`, (N, 3), into that of anything but normal, (N,)."""
    return np.asarray(np.logaddexp(logits[:, 1], logits[:, 2]) - logits[:, 0], np.float32)


LONGEST_PX = 192
"""Longest side of a field that is kept to learn from: the network sees no more."""
_IS_LUNG = 0.5
_LEAST_LUNG = 0.02  # of the picture
_REACH = 24  # cells that kept lung may be away from where it is surely lung
_STEEPNESS = 20.0  # of the mask's edge in the graph, where a step would lose parity


def cut_field(pixels: FloatArray, chances: FloatArray) -> LungField:
    """Cut the lungs' box out of an X-ray.

    Parameters
    ----------
    pixels
        float32, shape (h, w), 0..1, air dark.
    chances
        float32, shape (M, M), 0..1: each cell's probability of being lung, over all of it.
    """
    height, width = pixels.shape
    chance = chances * _kept(chances)
    wide = cv2.resize(chance, (width, height), interpolation=cv2.INTER_LINEAR)
    lungs = (wide > _IS_LUNG).astype(np.uint8)
    if lungs.mean() < _LEAST_LUNG:
        lungs = np.ones_like(lungs)
    rows, columns = np.flatnonzero(lungs.any(axis=1)), np.flatnonzero(lungs.any(axis=0))
    box = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    cut, inside = pixels[box], lungs[box]
    scale = min(1.0, LONGEST_PX / max(cut.shape))
    side = (max(1, round(cut.shape[1] * scale)), max(1, round(cut.shape[0] * scale)))
    small = cv2.resize(cut, side, interpolation=cv2.INTER_AREA)
    share = cv2.resize(inside.astype(np.float32), side, interpolation=cv2.INTER_AREA)
    return LungField(
        pixels=np.round(np.clip(small, 0.0, 1.0) * 255.0).astype(np.uint8),
        lungs=(share >= _IS_LUNG).astype(np.uint8),
    )


def build_field_finder(gate: KerasModel, size_px: int) -> KerasModel:
    """Build the network that finds the lung field of an X-ray.

    Parameters
    ----------
    gate
        Of `lungs.build_gate_network`.
    size_px
        Side of the X-ray, S: a multiple of the gate's.

    Returns
    -------
    keras.Model
        From `pixels`, float32 (N, S, S, 1), 0..1, to the mask, (N, S, S, 1), 0..1, and its box,
        (N, 4): left, top, right, bottom, 0..1.
    """
    import keras
    from keras import ops

    layers = keras.layers
    branch = keras.Model(gate.input, gate.output[LUNGS], name="lungs")
    pixels = keras.Input((size_px, size_px, 1), name="pixels")
    seen = layers.AveragePooling2D(size_px // int(gate.input_shape[1]))(pixels)
    chances = ops.sigmoid(branch(seen))
    chances = chances * _kept_tensor(chances)
    cells = int(chances.shape[1])
    wide = layers.UpSampling2D(size_px // cells, interpolation="bilinear")(chances)
    lungs = ops.clip((wide - _IS_LUNG) * _STEEPNESS + 0.5, 0.0, 1.0)
    is_lung = ops.cast(wide > _IS_LUNG, "float32")
    # Nothing found: everything is.
    none = ops.cast(ops.mean(is_lung, axis=(1, 2, 3), keepdims=True) < _LEAST_LUNG, "float32")
    lungs, is_lung = ops.maximum(lungs, none), ops.maximum(is_lung, none)
    low, high = (
        ops.concatenate([_edge(is_lung, axis, first=first) for axis in (1, 2)], axis=-1)
        for first in (True, False)
    )
    return keras.Model(pixels, [lungs, ops.concatenate([low, high], axis=-1)], name=FINDER)


def view_field(pixels: Tensor, finder: KerasModel, view_px: int) -> Tensor:
    """Standardise an input inside its lung field.

    Parameters
    ----------
    pixels
        Keras tensor, (N, S, S, 1), 0..1.
    finder
        Of `build_field_finder`.
    view_px
        Side of the view, V.

    Returns
    -------
    keras.KerasTensor
        float32, (N, V, V, 1), of the layer named `VIEW`; its box is of the layer named `BOX`.
    """
    import keras

    lungs, found = finder(pixels)
    box = keras.layers.Activation("linear", name=BOX)(found)
    given = [keras.Input(shape[1:]) for shape in (pixels.shape, lungs.shape, box.shape)]
    seen, inside = (crop(plane, given[2], view_px)[..., 0] for plane in given[:2])
    # By its name it is left out when a network is quantised, as the finder is.
    shown = keras.Model(given, view_tensor(seen, inside)[..., np.newaxis], name=f"{FINDER}_view")
    return keras.layers.Activation("linear", name=VIEW)(shown([pixels, lungs, box]))


def _kept(chances: FloatArray) -> FloatArray:
    square = np.ones((3, 3), np.uint8)
    is_lung = (chances > _IS_LUNG).astype(np.uint8)
    kept = cv2.erode(is_lung, square)
    for _ in range(_REACH):
        kept = np.minimum(cv2.dilate(kept, square), is_lung)
    # One cell more, for the slope of the edge.
    return np.asarray(cv2.dilate(kept, square), np.float32)


def _kept_tensor(chances: Tensor) -> Tensor:
    from keras import ops

    def dilated(mask: Tensor) -> Tensor:
        return ops.max_pool(mask, 3, 1, padding="same", data_format="channels_last")

    is_lung = ops.cast(chances > _IS_LUNG, "float32")
    kept = -dilated(-is_lung)
    for _ in range(_REACH):
        kept = ops.minimum(dilated(kept), is_lung)
    return dilated(kept)


def _edge(is_lung: Tensor, axis: int, *, first: bool) -> Tensor:
    """Return where lung begins or ends, (N, 1), 0..1, of a mask (N, S, S, 1)."""
    from keras import ops

    size = int(is_lung.shape[1])
    along = ops.max(is_lung, axis=(axis, 3))
    # A plain array: a tensor made out here would turn into an input of an exported graph.
    starts = np.arange(size, dtype=np.float32).reshape(1, -1) / np.float32(size)
    if first:
        return ops.min(1.0 - along * (1.0 - starts), axis=1, keepdims=True)
    return ops.max(along * (starts + np.float32(1.0 / size)), axis=1, keepdims=True)
