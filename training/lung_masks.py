"""X-rays with the lungs drawn by hand: pairs of `images/NAME.*` and `masks/NAME.png`."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from lungwatch.errors import DatasetError, FileRejected
from lungwatch.imaging import Radiograph, read_radiograph
from lungwatch.preprocess import PreprocessSpec, preprocess
from lungwatch.training.pixels import FloatArray

# The fraction of an image that lungs may cover. Outside it, the drawing is of something else.
_FEWEST, _MOST = 0.02, 0.9


@dataclass(frozen=True, kw_only=True, eq=False)
class LungMasks:
    """Images and what of them is lung.

    Attributes
    ----------
    names
        File names without their suffix, in alphabetical order.
    pixels
        float32, shape (N, S, S, 1), 0..1, preprocessed.
    masks
        float32, shape (N, S, S), 0..1: the fraction of each pixel that is lung.
    """

    names: tuple[str, ...]
    pixels: FloatArray
    masks: FloatArray


@dataclass(frozen=True, kw_only=True, eq=False)
class LungPair:
    """An X-ray and its drawing, each at its own size.

    Attributes
    ----------
    name
        File name without its suffix.
    pixels, drawn
        float32, shape (h, w), 0..1, not necessarily of one shape; in `drawn` 1 is lung.
    """

    name: str
    pixels: FloatArray
    drawn: FloatArray


def read_lung_masks(
    folder: Path, spec: PreprocessSpec, *, progress: Callable[[int], None] | None = None
) -> LungMasks:
    """Read all pairs below a folder.

    Parameters
    ----------
    folder
        Holds `images` and `masks`; in a mask, white is lung.
    spec
        How the images are preprocessed; must stretch, so that masks fit by stretching too.
    progress
        Called with 1 after each pair.

    Raises
    ------
    DatasetError
        If there are no pairs, a mask is missing or unreadable, or it marks no lungs.
    """
    side = (spec.size_px, spec.size_px)
    names, pixels, masks = [], [], []
    for pair in read_pairs(folder):
        names.append(pair.name)
        pixels.append(preprocess(pair.pixels, spec))
        masks.append(cv2.resize(pair.drawn, side, interpolation=cv2.INTER_AREA))
        if progress:
            progress(1)
    return LungMasks(
        names=tuple(names), pixels=np.stack(pixels), masks=np.stack(masks).astype(np.float32)
    )


def read_pairs(folder: Path) -> Iterator[LungPair]:
    """Read the pairs below a folder one by one, as they lie, in the order of their names.

    Raises
    ------
    DatasetError
        As `read_lung_masks`.
    """
    images = sorted(p for p in (folder / "images").glob("*") if not p.name.startswith("."))
    if not images:
        raise DatasetError(f"{folder}: no lung masks; expected images/NAME.* and masks/NAME.png")
    for image in images:
        radiograph = _radiograph(image)
        drawn = _mask(folder / "masks" / f"{image.stem}.png", radiograph)
        yield LungPair(name=image.stem, pixels=radiograph.pixels, drawn=drawn)


def _radiograph(path: Path) -> Radiograph:
    try:
        return read_radiograph(path)
    except (FileRejected, OSError) as error:
        raise DatasetError(f"{path}: {error}") from error


def _mask(path: Path, radiograph: Radiograph) -> FloatArray:
    drawn = drawn_on(path, radiograph)
    if not _FEWEST <= float(drawn.mean()) <= _MOST:
        raise DatasetError(f"{path}: marks {drawn.mean():.0%} of the image as lung")
    return drawn


def drawn_on(path: Path, radiograph: Radiograph) -> FloatArray:
    """Read what was drawn on a radiograph, without the frame that the reader cut off.

    Parameters
    ----------
    path
        A grey image, drawn on the file as it is, with its frame, at any size.
    radiograph
        The file as it was read.

    Returns
    -------
    numpy.ndarray
        float32, 0..1, over `radiograph.pixels`, though not necessarily of their shape.

    Raises
    ------
    DatasetError
        If there is no such image.
    """
    grey = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE) if path.is_file() else None
    if grey is None:
        raise DatasetError(f"{path}: no such mask, or not an image")
    drawn = np.asarray(grey, dtype=np.float32) / 255.0
    if radiograph.kept is not None:
        # The mask was drawn on the image as the file has it, with its frame.
        whole = (radiograph.meta.columns, radiograph.meta.rows)
        drawn = np.asarray(cv2.resize(drawn, whole, interpolation=cv2.INTER_NEAREST), np.float32)
        drawn = np.ascontiguousarray(radiograph.kept.of(drawn))
    return drawn
