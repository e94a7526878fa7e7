"""X-rays with opacities drawn by hand: `images/NAME.*`, `opacity/NAME.png`, `lung/NAME.png`."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from lungwatch.errors import DatasetError, FileRejected
from lungwatch.imaging import read_radiograph
from lungwatch.preprocess import PreprocessSpec, preprocess
from lungwatch.training.lung_masks import drawn_on
from lungwatch.training.pixels import FloatArray

# Longest side at which maps and drawings are compared: twenty times finer than a map's cells.
_COMPARED_PX = 256


@dataclass(frozen=True, kw_only=True, eq=False)
class LesionImage:
    """An X-ray on which somebody drew opacities.

    Attributes
    ----------
    name
        File name without its suffix.
    pixels
        float32, shape (S, S, 1), 0..1, preprocessed.
    shape
        (rows, columns) of the radiograph, in pixels.
    opacity
        bool, shape (h, w), over the radiograph without the frame that the reader cut off.
    lung
        Likewise, the lungs; None where nobody drew them.
    """

    name: str
    pixels: FloatArray
    shape: tuple[int, int]
    opacity: NDArray[np.bool_]
    lung: NDArray[np.bool_] | None


def read_lesions(
    folder: Path, spec: PreprocessSpec, *, progress: Callable[[int], None] | None = None
) -> tuple[list[LesionImage], int]:
    """Read all X-rays below a folder on which opacities are drawn.

    Parameters
    ----------
    folder
        Holds `images`, `opacity` and perhaps `lung`; in a mask, white is what it is named for.
    spec
        How the images are preprocessed.
    progress
        Called with 1 after each image.

    Returns
    -------
    images, without
        The X-rays, and the number of those on which no opacity is drawn.

    Raises
    ------
    DatasetError
        If there are none, or a file cannot be read.
    """
    paths = sorted(p for p in (folder / "images").glob("*") if not p.name.startswith("."))
    found, without = [], 0
    for path in paths:
        try:
            radiograph = read_radiograph(path)
        except (FileRejected, OSError) as error:
            raise DatasetError(f"{path}: {error}") from error
        masks = {}
        for kind in ("opacity", "lung"):
            file = folder / kind / f"{path.stem}.png"
            if file.is_file():
                drawn = drawn_on(file, radiograph)
                masks[kind] = _compared(drawn, radiograph.pixels.shape[:2])
        if progress:
            progress(1)
        if "opacity" not in masks or not masks["opacity"].any():
            without += 1
            continue
        found.append(
            LesionImage(
                name=path.stem,
                pixels=preprocess(radiograph.pixels, spec),
                shape=(radiograph.pixels.shape[0], radiograph.pixels.shape[1]),
                opacity=masks["opacity"],
                lung=masks.get("lung"),
            )
        )
    if not found:
        raise DatasetError(
            f"{folder}: no drawn opacities; expected images/NAME.* and opacity/NAME.png"
        )
    return found, without


def _compared(drawn: FloatArray, shape: tuple[int, ...]) -> NDArray[np.bool_]:
    scale = min(1.0, _COMPARED_PX / max(shape[:2]))
    size = (max(1, round(shape[1] * scale)), max(1, round(shape[0] * scale)))
    return np.asarray(cv2.resize(drawn, size, interpolation=cv2.INTER_AREA) >= 0.5)
