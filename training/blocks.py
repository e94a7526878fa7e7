"""What a block of a backbone is: the unit in which it is unfrozen from its end."""

import re
from dataclasses import dataclass

from lungwatch.training.data.pixels import KerasModel

# How the families of `keras.applications`, and our own network, name the layers of a block.
_NAMES = re.compile(
    r"(?P<block>"
    r".*stage_\d+_block_\d+"  # ConvNeXt: a residual block
    r"|conv\d+_block\d+"  # ResNet: a residual block; DenseNet: a densely connected layer
    r"|block\d+[a-z]"  # EfficientNet: an inverted residual block
    r"|b\d+(?=_(exp|dw|pw))"  # EfficientNet-Lite0: likewise
    r"|block_\d+|expanded_conv(_\d+)?"  # MobileNetV2 and V3: likewise
    r"|block\d+"  # VGG: what lies between two poolings; Xception: a residual block
    r")_"
)
_FEWEST = 2


@dataclass(frozen=True, kw_only=True)
class Block:
    """A run of layers.

    Attributes
    ----------
    name
        What its layers' names have in common.
    first
        Position of its first layer in the backbone's list.
    """

    name: str
    first: int


def blocks_of(backbone: KerasModel) -> list[Block]:
    """Find a backbone's blocks, in order.

    A block begins with the first layer that bears its name and ends before the next block:
    what lies between two (DenseNet's transitions) belongs to the earlier one, what follows the
    last (a closing norm, EfficientNet's widening convolution) to the last, and what comes
    before the first (the stem) is no block. Where names tell nothing (Inception, NASNet, a
    network of one's own), every convolution begins a block.
    """
    import keras

    convolution = keras.layers.Conv2D | keras.layers.DepthwiseConv2D | keras.layers.SeparableConv2D
    named: dict[str, int] = {}
    for index, layer in enumerate(backbone.layers):
        if found := _NAMES.match(layer.name):
            named.setdefault(found["block"], index)
    if len(named) < _FEWEST:
        named = {
            layer.name: index
            for index, layer in enumerate(backbone.layers)
            if isinstance(layer, convolution)
        }
    return [Block(name=name, first=first) for name, first in named.items()]
