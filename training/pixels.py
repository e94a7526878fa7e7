"""Read a data set's pixels exactly as the daemon would read them."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from lungwatch.errors import DatasetError, FileRejected
from lungwatch.imaging import read_radiograph
from lungwatch.preprocess import PreprocessSpec, preprocess
from lungwatch.training.samples import Sample

FloatArray = NDArray[np.float32]


class HasPath(Protocol):
    """Whatever says where its image is."""

    @property
    def path(self) -> Path:
        """The image file."""


def read_pixels(
    samples: Sequence[HasPath],
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
    workers
        Decoding threads.
    progress
        Called with 1 after each image.

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
        path = samples[index].path
        try:
            pixels[index] = preprocess(read_radiograph(path).pixels, spec)
        except (FileRejected, OSError) as error:
            raise DatasetError(f"{path}: {error}") from error

    with ThreadPoolExecutor(workers, thread_name_prefix="decode") as pool:
        for _ in pool.map(read, range(len(samples))):
            if progress:
                progress(1)
    return pixels


def targets(samples: Sequence[Sample]) -> FloatArray:
    """Return 1 for COVID and 0 for the rest, float32, shape (N,)."""
    return np.array([s.positive for s in samples], dtype=np.float32)
