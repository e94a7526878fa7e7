"""Lung fields found in whole X-rays by the content gate's network, in NumPy and in a graph.

What the gate's network takes for lung is cleaned of specks: of the cells above one half, those
are kept that hang together with a cell whose neighbours are all lung. The field is the exact box
of what is left; where there is hardly anything, it is the whole picture.
"""

import cv2
import numpy as np

from lungwatch.training.data.pixels import KerasModel, Tensor
from lungwatch.training.field_images import LungField
from lungwatch.training.field_view import FloatArray, view_tensor
from lungwatch.training.gate_network import LUNGS
from lungwatch.training.lung_box import FINDER
from lungwatch.training.lung_view import BOX, VIEW, crop

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
    """Build what finds the lungs of an X-ray.

    Parameters
    ----------
    gate
        Of `lungwatch.training.gate_network.build_gate_network`.
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


def see_field(pixels: Tensor, finder: KerasModel, view_px: int) -> Tensor:
    """Put the view onto an input.

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
