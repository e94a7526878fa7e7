"""Decoding of one file to the network's input and the overlay's background."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lungwatch.daemon.overlay.preview import make_preview
from lungwatch.flags import Flag, in_order
from lungwatch.imaging import RadiographMeta, ReadPolicy, read_radiograph
from lungwatch.imaging.detail import lacks_detail
from lungwatch.imaging.lettering import BURNT_IN_LETTERS, letters_in_line
from lungwatch.preprocess import PreprocessSpec, content_of, preprocess


@dataclass(frozen=True, kw_only=True, eq=False)
class Decoded:
    """What the later stages need of a file's pixels.

    Attributes
    ----------
    tensor
        float32, shape (size, size, 1), 0..1: the network's input.
    preview
        uint8, shape (h, w): the X-ray at the overlay's size, air dark.
    shape
        (rows, columns) of the radiograph.
    gate_tensor
        float32, shape (side, side, 1), 0..1: the content gate's input; None where that is the
        same as `tensor`, or where there is no gate.
    flags
        What reading noticed or had to mend, and what the pixels are like.
    orientation_known
        As in `Radiograph`: whether side marks may be drawn.
    """

    meta: RadiographMeta
    tensor: NDArray[np.float32]
    preview: NDArray[np.uint8]
    shape: tuple[int, int]
    gate_tensor: NDArray[np.float32] | None = None
    flags: tuple[Flag, ...] = ()
    orientation_known: bool = False


def decode(
    path: Path,
    *,
    policy: ReadPolicy,
    spec: PreprocessSpec,
    overlay_side_px: int,
    gate_spec: PreprocessSpec | None = None,
) -> Decoded:
    """Decode a file and reduce it to what the later stages need.

    The full-size pixels, by far the largest thing on the way, do not leave this function.

    Parameters
    ----------
    spec, gate_spec
        How the model and its content gate want their input; the gate's is None without a gate.

    Raises
    ------
    FileRejected
        If the file is no usable chest X-ray.
    OSError
        If it cannot be read.
    """
    radiograph = read_radiograph(path, policy)
    shape = radiograph.pixels.shape[0], radiograph.pixels.shape[1]
    tensor = preprocess(radiograph.pixels, spec)
    preview = make_preview(radiograph.pixels, overlay_side_px)
    flags = [*radiograph.flags]
    if lacks_detail(content_of(tensor[:, :, 0], shape, spec), shape):
        flags.append(Flag.LOW_DETAIL)
    if letters_in_line(preview) >= BURNT_IN_LETTERS:
        flags.append(Flag.TEXT_BURNT_IN)
    return Decoded(
        meta=radiograph.meta,
        tensor=tensor,
        preview=preview,
        shape=shape,
        gate_tensor=(
            preprocess(radiograph.pixels, gate_spec)
            if gate_spec is not None and gate_spec != spec
            else None
        ),
        flags=in_order(flags),
        orientation_known=radiograph.orientation_known,
    )
