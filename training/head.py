"""The head every network ends in: pooling, one hidden layer, one logit.

Its gradient has a closed form (see `lungwatch.export.graph`), which is what lets a plain
ONNX runtime draw Grad-CAM maps. The layers' names are how the export finds them.
"""

from lungwatch.training.foreign import Tensor

FEATURES = "features"
POOLED = "pooled"
HIDDEN = "head_hidden"
DROPOUT = "head_dropout"
LOGIT = "head_logit"


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
