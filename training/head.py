"""The heads every network ends in: pooling, and for each finding one hidden layer, one logit.

Its gradient has a closed form (see `lungwatch.export.graph`), which is what lets a plain
ONNX runtime draw Grad-CAM maps. The layers' names are how the export finds them.
"""

from lungwatch.training.data.pixels import KerasModel, Tensor

FEATURES = "features"
POOLED = "pooled"
HIDDEN = "head_hidden"
DROPOUT = "head_dropout"
LOGIT = "head_logit"
# Of each finding beside COVID: `opacity_hidden`, `opacity_logit`.
_OF_FINDING = ("{}_hidden", "{}_dropout", "{}_logit")


def attach_head(features: Tensor, *, dense_units: int, dropout: float) -> Tensor:
    """Put GlobalAveragePooling2D, Dense(relu), Dropout and Dense(1) onto a feature map.

    Parameters
    ----------
    features
        Keras tensor, (N, h, w, C), of the layer named `FEATURES`.
    dense_units
        Width of the hidden layer.
    dropout
        Fraction of it that is dropped in training.

    Returns
    -------
    keras.KerasTensor
        The binary logit, (N, 1); positive for COVID.
    """
    import keras

    x = keras.layers.GlobalAveragePooling2D(name=POOLED)(features)
    x = keras.layers.Dense(dense_units, activation="relu", name=HIDDEN)(x)
    x = keras.layers.Dropout(dropout, name=DROPOUT)(x)
    return keras.layers.Dense(1, name=LOGIT)(x)


def attach_finding(pooled: Tensor, name: str, *, dense_units: int, dropout: float) -> Tensor:
    """Put the head of a further finding beside that of COVID: the same layers, its own weights.

    Parameters
    ----------
    pooled
        Keras tensor, (N, C), of the layer named `POOLED`.
    name
        Of the finding, as the contract is to have it ("opacity").
    dense_units, dropout
        As of `attach_head`.

    Returns
    -------
    keras.KerasTensor
        The finding's logit, (N, 1): another output of the network.
    """
    import keras

    hidden, drop, logit = (layer.format(name) for layer in _OF_FINDING)
    x = keras.layers.Dense(dense_units, activation="relu", name=hidden)(pooled)
    x = keras.layers.Dropout(dropout, name=drop)(x)
    return keras.layers.Dense(1, name=logit)(x)


def head_layers(model: KerasModel, finding: str | None = None) -> tuple[KerasModel, KerasModel]:
    """Return the hidden layer and that of the logit: of a further finding, or of COVID for None."""
    names = (HIDDEN, LOGIT) if finding is None else (f"{finding}_hidden", f"{finding}_logit")
    return model.get_layer(names[0]), model.get_layer(names[1])


def further_findings(model: KerasModel) -> tuple[str, ...]:
    """Return the names of the findings that a network scores beside COVID, in its own order."""
    names = [str(layer.name) for layer in model.layers]
    found = [name.removesuffix("_logit") for name in names if name.endswith("_logit")]
    return tuple(name for name in found if name != "head" and f"{name}_hidden" in names)


def answer_of(model: KerasModel, finding: str | None = None) -> KerasModel:
    """Return the network up to one logit alone: of a further finding, or of COVID for None."""
    import keras

    if finding is None and not further_findings(model):
        return model
    return keras.Model(model.input, head_layers(model, finding)[1].output)
