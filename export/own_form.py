"""A foreign network in the form of lungwatch's own: its feature map under lungwatch's head.

The exported graph draws its maps in closed form, which holds for pooling, one hidden layer and
one logit (`lungwatch.export.graph`). A network without the hidden layer is brought to it exactly:
u = relu(u) - relu(-u).
"""

from typing import Any

import numpy as np

from lungwatch.errors import ModelError
from lungwatch.training.declared import Declaration, last_layer
from lungwatch.training.foreign import KerasModel
from lungwatch.training.head import FEATURES, HIDDEN, LOGIT, attach_head

_FORM = "GlobalAveragePooling2D, at most one Dense layer with relu, and a last Dense layer"


def own_form(model: KerasModel, declared: Declaration, name: str) -> KerasModel:
    """Put a foreign network's feature map under lungwatch's head, with its own weights.

    Parameters
    ----------
    model, declared
        The network, and what its numbers mean.
    name
        What messages call it.

    Returns
    -------
    keras.Model
        From pixels, float32 (N, S, S, 1), 0..1, to the binary logit, (N, 1).

    Raises
    ------
    ModelError
        If it does not end in that form, or has more than two classes.
    """
    import keras

    pooling, hidden, last = _tail(model, name)
    weights, bias = (np.asarray(part, np.float64) for part in _weights(last))
    if declared.output == "softmax":
        if weights.shape[1] != 2:
            raise ModelError(
                f"{name} has {weights.shape[1]} classes: only networks of two can be exported"
            )
        other = 1 - declared.index
        weights = weights[:, [declared.index]] - weights[:, [other]]
        bias = bias[[declared.index]] - bias[[other]]
    if hidden is not None:
        head = [*_weights(hidden), weights, bias]
    else:
        head = [
            np.concatenate([weights, -weights], axis=1),
            np.concatenate([bias, -bias]),
            np.array([[1.0], [-1.0]]),
            np.zeros(1),
        ]
    size = int(model.inputs[0].shape[1])
    pixels = keras.Input((size, size, 1))
    wide = keras.layers.Concatenate()([pixels] * 3) if declared.channels == 3 else pixels
    scaled = keras.layers.Rescaling(list(declared.scale), list(declared.offset))(wide)
    inner = keras.Model(model.inputs, pooling.input)
    features = keras.layers.Activation("linear", name=FEATURES)(inner(scaled))
    logit = attach_head(features, dense_units=int(head[0].shape[1]), dropout=0.0)
    built = keras.Model(pixels, logit, name=model.name)
    for layer, parts in ((HIDDEN, head[:2]), (LOGIT, head[2:])):
        built.get_layer(layer).set_weights([np.asarray(part, np.float32) for part in parts])
    return built


def _tail(model: KerasModel, name: str) -> tuple[Any, Any | None, Any]:
    """Return the pooling, the hidden layer or None, and the last layer with weights."""
    layers = [layer for layer in _backwards(model) if type(layer).__name__ != "Dropout"]
    if type(layers[0]).__name__ in ("Activation", "Softmax") and len(layers) > 1:
        layers = layers[1:]  # the last layer's own activation, which the declaration is about
    kinds = [type(layer).__name__ for layer in layers]
    if kinds[:2] == ["Dense", "GlobalAveragePooling2D"]:
        pooling, hidden = layers[1], None
    elif kinds[:3] == ["Dense", "Dense", "GlobalAveragePooling2D"] and (
        layers[1].activation.__name__ == "relu"
    ):
        pooling, hidden = layers[2], layers[1]
    else:
        raise ModelError(
            f"{name} ends in {', '.join(reversed(kinds[:3]))}: only networks that end in {_FORM} "
            "can be exported with their maps"
        )
    if pooling.keepdims or pooling.data_format != "channels_last":
        raise ModelError(f"{name} pools in another form than {_FORM}")
    return pooling, hidden, layers[0]


def _backwards(model: KerasModel) -> list[Any]:
    """List the layers from the output to the first one that has not exactly one input."""
    layer, found = last_layer(model), []
    while True:
        found.append(layer)
        given = layer.input
        if isinstance(given, list | tuple | dict) or type(layer).__name__ == "InputLayer":
            return found
        layer = given._keras_history.operation  # noqa: SLF001 - Keras has no other name


def _weights(dense: Any) -> tuple[Any, Any]:  # noqa: ANN401 - a Keras layer
    kernel = np.asarray(dense.kernel)
    return kernel, np.asarray(dense.bias) if dense.use_bias else np.zeros(kernel.shape[1])
