"""The content gate's network: one trunk, four answers, and the lung field.

EfficientNet-Lite0 is cut in its middle, where features are still fine and the network small
(0.8 M parameters); what it knows from ImageNet of edges and textures is what tells an X-ray from
other pictures. No part of it depends on a backend of Keras.
"""

import math
from collections.abc import Sequence

import numpy as np

from lungwatch.training.data.gate_images import TURNS, GateBatch
from lungwatch.training.data.pixels import FloatArray, KerasModel, Tensor
from lungwatch.training.evaluation.gate_rates import GateOutput
from lungwatch.training.lite0 import build_lite0
from lungwatch.training.steps import seed_dropout

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


def answering_network(model: KerasModel) -> KerasModel:
    """Give the network the answers that a gate gives.

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


def look_with(answering: KerasModel, pixels: FloatArray) -> GateOutput:
    """Ask such a network about preprocessed pictures, (N, S, S, 1), 0..1."""
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
    """Take one step; what is not known of a picture has no part in it.

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
    seed_dropout(model, seed)
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
