"""Heads of every network, Grad-CAM through them, the lung view in front of them.

And joined networks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lungwatch.contract import Calibration
from lungwatch.errors import ModelError
from lungwatch.training.data.pixels import FloatArray, KerasModel, Tensor

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


def output_of(model: KerasModel, finding: str | None = None) -> KerasModel:
    """Return the network with a single logit: of a further finding, or of COVID for None."""
    import keras

    if finding is None and not further_findings(model):
        return model
    return keras.Model(model.input, head_layers(model, finding)[1].output)


_Pairs = NDArray[np.float64]


def split_logit(logits: ArrayLike) -> _Pairs:
    """Turn binary logits, shape (N,), into those of NEGATIVE and COVID, float64 (N, 2).

    Exact for every float32, subnormal ones and infinities included: halving a number loses a
    bit only at the bottom of its own format, and float64's lies far below.
    """
    half = np.asarray(logits, dtype=np.float64).ravel() / 2
    return np.stack([-half, half], axis=1)


def join_logits(pairs: ArrayLike) -> NDArray[np.float64]:
    """Turn the logits of NEGATIVE and COVID, (N, 2), back into binary ones, float64 (N,)."""
    pair = np.asarray(pairs, dtype=np.float64)
    return np.asarray(pair[:, 1] - pair[:, 0])


def softmax(pairs: ArrayLike) -> _Pairs:
    """Probabilities of NEGATIVE and COVID, float64 (N, 2), without overflow."""
    z = join_logits(pairs)
    return np.stack([np.exp(-np.logaddexp(0.0, z)), np.exp(-np.logaddexp(0.0, -z))], axis=1)


def decide(pairs: ArrayLike) -> NDArray[np.bool_]:
    """Return True where COVID's logit is the larger, (N,); a tie is COVID, as z >= 0 and p >= 0.5.

    It is taken of the logits, as softmax keeps their order: probabilities of logits nearer to
    each other than 1e-16 are equal once they are rounded, and `argmax` takes the first of
    equals, NEGATIVE.
    """
    pair = np.asarray(pairs, dtype=np.float64)
    return np.asarray(pair[:, 1] >= pair[:, 0])


BOX = "lung_box"
VIEW = "lung_view"
MARGIN = 0.1
"""What is shown around the lungs' box, as a fraction of the image's side."""
FINER = 2
"""Sides of the whole image for one of what is shown: a box is about half the image."""


# What is narrower or lower is no pair of lungs; the view is widened to it.
_NARROWEST = 0.3


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Cells of one size along an axis, for each image of a batch.

    Attributes
    ----------
    start, step
        Where the first cell begins, and their size, as fractions of the side: float64 tensors
        (N, 1, 1), or numbers.
    count
        How many.
    """

    start: Any
    step: Any
    count: int


def covered(cells: Grid, by: Grid) -> Tensor:
    """Share of each cell that each cell of another grid covers.

    Returns
    -------
    tensor
        float32, (N, cells.count, by.count), 0..1. Its product with values of the second grid
        gives their means over the cells of the first.
    """
    import numpy as np
    from keras import ops

    # Plain arrays: tensors made out here would turn into inputs of an exported graph. In double
    # precision, since an edge that is off by its last bit in single already shifts a map.
    rows = np.arange(cells.count, dtype=np.float64).reshape(1, -1, 1)
    columns = np.arange(by.count, dtype=np.float64).reshape(1, 1, -1)
    cell, other = cells.start + cells.step * rows, by.start + by.step * columns
    low = ops.maximum(cell, other)
    high = ops.minimum(cell + cells.step, other + by.step)
    return ops.cast(ops.maximum(high - low, 0.0) / cells.step, "float32")


def crop(pixels: Tensor, box: Tensor, side: int) -> Tensor:
    """Crop to a box, stretched to a square.

    Parameters
    ----------
    pixels
        float32, (N, S, S, 1).
    box
        float32, (N, 4): left, top, right, bottom, 0..1.
    side
        Of the square, in pixels.
    """
    from keras import ops

    size = int(pixels.shape[1])
    image = Grid(start=0.0, step=1.0 / size, count=size)
    across, down = (_grid(box, axis, side) for axis in (0, 1))
    plane = ops.reshape(pixels, (-1, size, size))
    shown = ops.matmul(
        ops.matmul(covered(down, image), plane), ops.transpose(covered(across, image), (0, 2, 1))
    )
    return ops.reshape(shown, (-1, side, side, 1))


def lay_back(maps: Tensor, box: Tensor) -> Tensor:
    """Paste maps of a box into the whole image, zero outside the box.

    Parameters
    ----------
    maps
        float32, (N, h, h).
    box
        As of `crop`.

    Returns
    -------
    tensor
        float32, (N, 2 h, 2 h): means over its cells.
    """
    from keras import ops

    cells = int(maps.shape[1])
    whole = Grid(start=0.0, step=1.0 / (FINER * cells), count=FINER * cells)
    across, down = (_grid(box, axis, cells) for axis in (0, 1))
    return ops.matmul(
        ops.matmul(covered(whole, down), maps), ops.transpose(covered(whole, across), (0, 2, 1))
    )


def view_lungs(pixels: Tensor, finder: KerasModel, side: int) -> Tensor:
    """Crop an input to the box of the lungs that a finder gives.

    Parameters
    ----------
    pixels
        Keras tensor, (N, S, S, 1), 0..1.
    finder
        From such pixels to the box of the lungs, (N, 4).
    side
        Of what is shown, in pixels.

    Returns
    -------
    keras.KerasTensor
        float32, (N, side, side, 1), of the layer named `VIEW`.
    """
    import keras
    from keras import ops

    found = finder(pixels)
    low = ops.clip(found[:, :2] - MARGIN, 0.0, 1.0 - _NARROWEST)
    high = ops.minimum(ops.maximum(found[:, 2:] + MARGIN, low + _NARROWEST), 1.0)
    box = keras.layers.Concatenate(name=BOX)([low, high])
    return keras.layers.Activation("linear", name=VIEW)(crop(pixels, box, side))


def has_lung_view(model: KerasModel) -> bool:
    """Tell if a network sees only the box of the lungs, which its layer `BOX` gives."""
    return BOX in {layer.name for layer in model.layers}


def _grid(box: Tensor, axis: int, count: int) -> Grid:
    from keras import ops

    edges = ops.cast(box, "float64")
    low = ops.reshape(edges[:, axis], (-1, 1, 1))
    high = ops.reshape(edges[:, axis + 2], (-1, 1, 1))
    return Grid(start=low, step=(high - low) / count, count=count)


def two_logits(logit: Tensor) -> Tensor:
    """Turn binary logits z, shape (N, 1), into one per class, (N, 2): (-z/2, z/2).

    Under softmax they give the sigmoid's probability exactly, so no decision changes, and
    each class has a score of its own to be explained.
    """
    import tensorflow as tf

    return tf.concat([-logit / 2.0, logit / 2.0], axis=1)


def gradcam(model: KerasModel, pixels: FloatArray) -> FloatArray:
    """Compute Grad-CAM of both classes for each image.

    Parameters
    ----------
    model
        Keras model from pixels to the binary logit, with a layer named "features".
    pixels
        float32, shape (N, S, S, 1), 0..1.

    Returns
    -------
    numpy.ndarray
        float32, shape (N, 2, h, w), each map scaled to 0..1 by its maximum and zero where
        nothing speaks for the class; index 0 NEGATIVE, 1 COVID. Of the whole image, also for a
        network that looks at the lungs alone (`heads`).

    Source: Selvaraju et al. 2017, with the last convolutional feature map.
    """
    import keras
    import tensorflow as tf

    layers = [FEATURES, BOX] if has_lung_view(model) else [FEATURES]
    found = keras.Model(model.input, [model.get_layer(name).output for name in layers])
    logit_of = keras.Model(model.get_layer(FEATURES).output, model.output)
    # As a graph, like the export's: run operation by operation it would round otherwise, and a
    # box that differs by that moves the map.
    forward = tf.function(lambda images: found(images, training=False), autograph=False)
    features, *box = tf.nest.flatten(forward(tf.constant(pixels)))
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(features)
        scores = two_logits(logit_of(features, training=False))
        # Images do not influence each other at inference: the sum keeps them apart.
        negative, covid = tf.reduce_sum(scores[:, 0]), tf.reduce_sum(scores[:, 1])
    maps = []
    for score in (negative, covid):
        weights = tf.reduce_mean(tape.gradient(score, features), axis=(1, 2), keepdims=True)
        evidence = tf.nn.relu(tf.reduce_sum(weights * features, axis=-1))
        if box:
            evidence = lay_back(evidence, *box)
        raw = evidence.numpy()
        peak = raw.max(axis=(1, 2), keepdims=True)
        maps.append(np.divide(raw, peak, out=np.zeros_like(raw), where=peak > 0))
    return np.stack(maps, axis=1).astype(np.float32)


@dataclass(frozen=True, kw_only=True)
class Member:
    """A network with its calibration, which makes its logits comparable.

    Attributes
    ----------
    name
        Of its layer in the joint network.
    model
        From pixels (N, S, S, 1) to the binary logit, with lungwatch's head.
    calibration
        Its own; the joint logit is the mean of the calibrated ones.
    """

    name: str
    model: KerasModel
    calibration: Calibration


def join_networks(members: Sequence[Member], *, finder: KerasModel | None = None) -> KerasModel:
    """Build one network whose logit is the mean of its members' calibrated logits.

    Parameters
    ----------
    members
        The networks.
    finder
        Finds the box of the lungs (`lungs.build_finder`): the members then see what
        is in it. None shows them the whole image.

    Returns
    -------
    keras.Model
        From `pixels`, float32 (N, S, S, 1), 0..1, to the binary logit, (N, 1); S is the
        finder's, where there is one.

    Raises
    ------
    ModelError
        If the members' inputs differ in size, or their maps' sides are no multiples.
    """
    import keras

    sizes = {int(member.model.input_shape[1]) for member in members}
    if len(sizes) != 1:
        raise ModelError(f"networks for inputs of {sorted(sizes)} px cannot be joined")
    sides = [int(member.model.get_layer(FEATURES).output.shape[1]) for member in members]
    if any(max(sides) % side for side in sides):
        raise ModelError(f"feature maps of {sides} cells a side do not fit onto each other")
    size = sizes.pop()
    side = int(finder.input_shape[1]) if finder is not None else size
    pixels = keras.Input((side, side, 1), name="pixels")
    shown = view_lungs(pixels, finder, size) if finder is not None else pixels
    maps = []
    for member, side in zip(members, sides, strict=True):
        inner = keras.Model(
            member.model.input, member.model.get_layer(FEATURES).output, name=member.name
        )
        wide = keras.layers.UpSampling2D(max(sides) // side, name=f"{member.name}_cells")
        maps.append(wide(inner(shown)))
    features = keras.layers.Activation("linear", name=FEATURES)(
        keras.layers.Concatenate(name="side_by_side")(maps)
    )
    hidden = [member.model.get_layer(HIDDEN) for member in members]
    units = [int(layer.units) for layer in hidden]
    logit = attach_head(features, dense_units=sum(units), dropout=0.0)
    model = keras.Model(pixels, logit, name="joined")

    kernel = np.zeros((int(features.shape[-1]), sum(units)), dtype=np.float32)
    row = column = 0
    for layer in hidden:
        block = layer.kernel.numpy()
        kernel[row : row + block.shape[0], column : column + block.shape[1]] = block
        row, column = row + block.shape[0], column + block.shape[1]
    model.get_layer(HIDDEN).set_weights([kernel, np.concatenate([h.bias.numpy() for h in hidden])])
    last = [member.model.get_layer(LOGIT) for member in members]
    slopes = [member.calibration.slope / len(members) for member in members]
    weights = [s * layer.kernel.numpy() for s, layer in zip(slopes, last, strict=True)]
    biases = [s * float(layer.bias.numpy()[0]) for s, layer in zip(slopes, last, strict=True)]
    offsets = [member.calibration.intercept / len(members) for member in members]
    bias = np.array([sum(biases) + sum(offsets)], dtype=np.float32)
    model.get_layer(LOGIT).set_weights([np.concatenate(weights), bias])
    return model
