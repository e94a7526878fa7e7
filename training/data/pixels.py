"""Pixels of a data set as arrays, and drawn masks of lungs and opacities.

Files are read as the daemon reads them.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import cv2
import numpy as np
from numpy.typing import NDArray

from lungwatch.errors import DatasetError, FileRejected
from lungwatch.imaging.radiograph import Radiograph
from lungwatch.imaging.reader import read_radiograph
from lungwatch.preprocess import PreprocessSpec, preprocess
from lungwatch.training.data.dataset import LabelledImage, Sample

FloatArray = NDArray[np.float32]
# Objects of libraries that carry no usable types.
KerasModel: TypeAlias = Any
Tensor: TypeAlias = Any
OnnxProto: TypeAlias = Any
OnnxSession: TypeAlias = Any
_In = TypeVar("_In")
_Out = TypeVar("_Out")
_BATCH = 64
_AT_ONCE = 32
# The fraction of an image that lungs may cover. Outside it, the drawing is of something else.
_FEWEST, _MOST = 0.02, 0.9
# Longest side at which maps and drawings are compared: twenty times finer than a map's cells.
_COMPARED_PX = 256


@dataclass(frozen=True, kw_only=True, eq=False)
class LungMasks:
    """Images with masks of their lungs.

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


@dataclass(frozen=True, kw_only=True, eq=False)
class LesionImage:
    """An X-ray with drawn opacities.

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
        Likewise, the lungs; None where they are not drawn.
    """

    name: str
    pixels: FloatArray
    shape: tuple[int, int]
    opacity: NDArray[np.bool_]
    lung: NDArray[np.bool_] | None


def read_image(path: Path) -> Radiograph:
    """Read one image of a data set through the daemon's reader.

    Raises
    ------
    DatasetError
        If it cannot be read; it is named.
    """
    try:
        return read_radiograph(path)
    except (FileRejected, OSError) as error:
        raise DatasetError(f"{path}: {error}") from error


def decode_all(
    read: Callable[[_In], _Out],
    items: Sequence[_In],
    *,
    workers: int = 2,
    progress: Callable[[int], None] | None = None,
) -> Iterator[_Out]:
    """Read items in threads, in order; a few at a time, which bounds the memory.

    Parameters
    ----------
    read
        Reads one.
    items
        What to read.
    workers
        Decoding threads.
    """
    with ThreadPoolExecutor(workers, thread_name_prefix="decode") as pool:
        for start in range(0, len(items), _AT_ONCE):
            for found in pool.map(read, items[start : start + _AT_ONCE]):
                yield found
                if progress:
                    progress(1)


def in_batches(
    function: Callable[[FloatArray], NDArray[Any]], pixels: FloatArray, size: int = _BATCH
) -> NDArray[Any]:
    """Apply a function to images, (N, …), in batches, and join what it gives."""
    parts = [function(pixels[start : start + size]) for start in range(0, len(pixels), size)]
    return np.concatenate(parts)


def read_pixels(
    samples: Sequence[Sample | LabelledImage],
    spec: PreprocessSpec,
    *,
    workers: int = 2,
    progress: Callable[[int], None] | None = None,
) -> FloatArray:
    """Read and preprocess every sample.

    Nothing is cached on disk: reading thousands of images takes less than one epoch, and a
    cache would be a second definition of what the network sees.

    Parameters
    ----------
    samples
        Files to read.
    spec
        The network's preprocessing.
    workers, progress
        See `decode_all`.

    Returns
    -------
    numpy.ndarray
        float32, shape (N, size_px, size_px, 1), 0..1, in the order of `samples`.

    Raises
    ------
    DatasetError
        If a file cannot be read; it is named.
    """
    pixels = np.empty((len(samples), spec.size_px, spec.size_px, 1), dtype=np.float32)

    def read(index: int) -> None:
        pixels[index] = preprocess(read_image(samples[index].path).pixels, spec)

    for _ in decode_all(read, range(len(samples)), workers=workers, progress=progress):
        pass
    return pixels


def targets(samples: Sequence[Sample]) -> FloatArray:
    """Return 1 for COVID and 0 for the rest, float32, shape (N,)."""
    return np.array([s.positive for s in samples], dtype=np.float32)


def read_lung_masks(
    folder: Path, spec: PreprocessSpec, *, progress: Callable[[int], None] | None = None
) -> LungMasks:
    """Read all pairs of `images/NAME.*` and `masks/NAME.png` below a folder.

    Parameters
    ----------
    folder
        Holds `images` and `masks`; in a mask, white is lung.
    spec
        How the images are preprocessed; must stretch, so that masks fit by stretching too.

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
    """Read the pairs below a folder one by one, at their own sizes, in the order of their names.

    Raises
    ------
    DatasetError
        As `read_lung_masks`.
    """
    images = _images(folder)
    if not images:
        raise DatasetError(f"{folder}: no lung masks; expected images/NAME.* and masks/NAME.png")
    for image in images:
        radiograph = read_image(image)
        path = folder / "masks" / f"{image.stem}.png"
        drawn = drawn_on(path, radiograph)
        if not _FEWEST <= float(drawn.mean()) <= _MOST:
            raise DatasetError(f"{path}: marks {drawn.mean():.0%} of the image as lung")
        yield LungPair(name=image.stem, pixels=radiograph.pixels, drawn=drawn)


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


def read_lesions(
    folder: Path, spec: PreprocessSpec, *, progress: Callable[[int], None] | None = None
) -> tuple[list[LesionImage], int]:
    """Read all X-rays below a folder on which opacities are drawn.

    Parameters
    ----------
    folder
        Holds `images/NAME.*`, `opacity/NAME.png` and perhaps `lung/NAME.png`; in a mask, white
        is what it is named for.
    spec
        How the images are preprocessed.

    Returns
    -------
    images, without
        The X-rays, and the number of those on which no opacity is drawn.

    Raises
    ------
    DatasetError
        If there are none, or a file cannot be read.
    """
    found, without = [], 0
    for path in _images(folder):
        radiograph = read_image(path)
        rows, columns = radiograph.pixels.shape
        masks = {
            kind: _compared(drawn_on(file, radiograph), (rows, columns))
            for kind in ("opacity", "lung")
            if (file := folder / kind / f"{path.stem}.png").is_file()
        }
        if progress:
            progress(1)
        if "opacity" not in masks or not masks["opacity"].any():
            without += 1
            continue
        found.append(
            LesionImage(
                name=path.stem,
                pixels=preprocess(radiograph.pixels, spec),
                shape=(rows, columns),
                opacity=masks["opacity"],
                lung=masks.get("lung"),
            )
        )
    if not found:
        raise DatasetError(
            f"{folder}: no drawn opacities; expected images/NAME.* and opacity/NAME.png"
        )
    return found, without


def _images(folder: Path) -> list[Path]:
    return sorted(p for p in (folder / "images").glob("*") if not p.name.startswith("."))


def _compared(drawn: FloatArray, shape: tuple[int, int]) -> NDArray[np.bool_]:
    scale = min(1.0, _COMPARED_PX / max(shape))
    size = (max(1, round(shape[1] * scale)), max(1, round(shape[0] * scale)))
    return np.asarray(cv2.resize(drawn, size, interpolation=cv2.INTER_AREA) >= 0.5)
