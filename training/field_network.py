"""The network that tells lungs with an opacity from others, by their field alone.

EfficientNet-Lite0 cut in its middle, as for the content gate: 0.8 M parameters and a map of 16
pixels a cell. What is deeper knew the sources of the training fields better, and foreign
sources worse. No part of it depends on a backend of Keras.
"""

from collections.abc import Sequence

import numpy as np

from lungwatch.training.data.pixels import KerasModel, Tensor
from lungwatch.training.field_images import CLASSES
from lungwatch.training.field_view import FloatArray
from lungwatch.training.lite0 import build_lite0
from lungwatch.training.steps import seed_dropout

TRUNK, POOLED = "field_trunk", "field_pooled"
HIDDEN, THREE = "field_hidden", "field_classes"

_TRUNK_END = "b11_exp_relu"  # 672 channels, 16 pixels a cell
_HIDDEN_UNITS = 64
_DROPOUT, _DROPOUT_HIDDEN = 0.3, 0.2
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
        From the view (`lungwatch.training.field_view`), float32 (N, S, S, 1), 0..1, to the
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
    x = layers.Dropout(_DROPOUT)(pooled)
    x = layers.Dense(_HIDDEN_UNITS, activation="relu", name=HIDDEN)(x)
    x = layers.Dropout(_DROPOUT_HIDDEN)(x)
    return keras.Model(shown, layers.Dense(len(CLASSES), name=THREE)(x), name="fields")


def build_trunk(size_px: int, *, imagenet: bool) -> KerasModel:
    """Build the trunk: from the view, (N, S, S, 1), to feature maps, (N, S/16, S/16, 672)."""
    import keras

    whole = build_lite0(size_px, imagenet=imagenet)
    cut = keras.Model(whole.input, whole.get_layer(_TRUNK_END).output, name="lite0")
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
    """Take one step.

    Parameters
    ----------
    model
        The compiled network.
    pixels, targets
        Of `lungwatch.training.field_images.draw_batch`.
    seed
        Of the features that are left out.

    Returns
    -------
    float
        The loss.
    """
    seed_dropout(model, seed)
    found = model.train_on_batch(pixels, targets)
    return float(found[0] if isinstance(found, Sequence | np.ndarray) else found)


def opacity_logit(logits: FloatArray) -> FloatArray:
    """Turn the logits of `CLASSES`, (N, 3), into that of an opacity against the rest, (N,)."""
    return np.asarray(logits[:, 2] - np.logaddexp(logits[:, 0], logits[:, 1]), np.float32)


def abnormal_logit(logits: FloatArray) -> FloatArray:
    """Turn the logits of `CLASSES`, (N, 3), into that of anything but normal, (N,)."""
    return np.asarray(np.logaddexp(logits[:, 1], logits[:, 2]) - logits[:, 0], np.float32)
