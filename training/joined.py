"""Several networks as one: their mean logit, still with the head that explains itself.

A mean of networks with lungwatch's head is a network with lungwatch's head. Feature maps are
brought to one size by repeating cells, which changes no mean over a map, and are laid side by
side; the hidden layers become one with blocks on its diagonal. So the closed form of the maps
(`lungwatch.export.graph`) holds for the whole, and the map is the sum of all its members'.

Source: Lakshminarayanan, Pritzel, Blundell 2017, for averaging networks trained apart.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lungwatch.contract import Calibration
from lungwatch.errors import ModelError
from lungwatch.training.data.pixels import KerasModel
from lungwatch.training.head import FEATURES, HIDDEN, LOGIT, attach_head
from lungwatch.training.lung_view import see_lungs


@dataclass(frozen=True, kw_only=True)
class Member:
    """A network and what makes its logits comparable with the others'.

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
        Finds the box of the lungs (`lungwatch.training.lung_box`): the members then see what
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
    shown = see_lungs(pixels, finder, size) if finder is not None else pixels
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
