"""A network that looks at the lungs alone: it finds their box, and sees what is in it.

What surrounds the lungs (letters, borders, how tightly a place collimates) tells hospitals
apart. So the network is shown the lungs' box, stretched to its input, at twice the detail that
the whole image would have there. A small network gives the box (`lungwatch.training.lung_box`),
and the crop is two products with matrices of areas, so that all of it is one graph of plain
operations; maps are laid back onto the whole image the same way.
"""

from dataclasses import dataclass
from typing import Any

from lungwatch.training.data.pixels import KerasModel, Tensor

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
    """How much of each cell is covered by each cell of another grid.

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
    """Show what is in a box, stretched to a square.

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
    """Lay maps of what is in a box onto the whole image, zero outside the box.

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


def see_lungs(pixels: Tensor, finder: KerasModel, side: int) -> Tensor:
    """Put the view onto an input.

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


def looks_at_lungs(model: KerasModel) -> bool:
    """Whether a network sees the box of the lungs alone; its layer `BOX` gives it then."""
    return BOX in {layer.name for layer in model.layers}


def _grid(box: Tensor, axis: int, count: int) -> Grid:
    from keras import ops

    edges = ops.cast(box, "float64")
    low = ops.reshape(edges[:, axis], (-1, 1, 1))
    high = ops.reshape(edges[:, axis + 2], (-1, 1, 1))
    return Grid(start=low, step=(high - low) / count, count=count)
