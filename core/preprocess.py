"""The one definition of what a network sees, for training and serving alike.

A `PreprocessSpec` travels inside the model; whoever runs the model, trains it or audits it
calls `preprocess` with it. What follows the resizing (standardisation by the training set's
statistics, grey to three channels) is part of the model's own graph.
"""

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, Self

import cv2
import numpy as np
from numpy.typing import NDArray

from lungwatch.errors import ModelError
from lungwatch.imaging.radiograph import FloatImage

Intensity = Literal["as_is", "percentile"]
Fit = Literal["stretch", "pad"]


@dataclass(frozen=True, kw_only=True)
class PreprocessSpec:
    """How grey values become a network's input.

    Attributes
    ----------
    size_px
        Side of the square input, in pixels.
    fit
        "stretch" maps width and height onto the square independently, as the study did;
        "pad" keeps the aspect ratio and centres the image on black.
    intensity
        "as_is" keeps the display grey values; "percentile" maps `low_percentile` to 0 and
        `high_percentile` to 1 and clips, so that the window the file happens to carry, or
        the exporter's contrast, does not reach the network.
    low_percentile, high_percentile
        In percent of the resized image's pixels; only used by "percentile".
    """

    size_px: int
    fit: Fit = "stretch"
    intensity: Intensity = "percentile"
    low_percentile: float = 1.0
    high_percentile: float = 99.0

    def __post_init__(self) -> None:
        if not 16 <= self.size_px <= 4096:
            raise ModelError(f"preprocess.size_px is {self.size_px}, not within 16..4096")
        if self.fit not in ("stretch", "pad"):
            raise ModelError(f"preprocess.fit is {self.fit!r}, neither 'stretch' nor 'pad'")
        if self.intensity not in ("as_is", "percentile"):
            raise ModelError(
                f"preprocess.intensity is {self.intensity!r}, neither 'as_is' nor 'percentile'"
            )
        if not 0 <= self.low_percentile < self.high_percentile <= 100:
            raise ModelError("preprocess percentiles must satisfy 0 <= low < high <= 100")

    def to_dict(self) -> dict[str, Any]:
        """Return the specification as plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Read a specification, refusing keys this version does not know.

        Raises
        ------
        ModelError
            If a key is unknown or missing or a value is out of range: a network run with a
            preprocessing that is only nearly its own gives wrong answers without a sign.
        """
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ModelError(f"unknown preprocessing keys: {', '.join(unknown)}")
        try:
            return cls(**values)
        except TypeError as error:
            raise ModelError(f"incomplete preprocessing: {error}") from error


def preprocess(pixels: FloatImage, spec: PreprocessSpec) -> NDArray[np.float32]:
    """Turn a radiograph's grey values into a network's input.

    Parameters
    ----------
    pixels
        float32, shape (H, W), 0..1, air dark.
    spec
        The model's own specification.

    Returns
    -------
    numpy.ndarray
        float32, shape (size_px, size_px, 1), 0..1.
    """
    resized = _fit(pixels, spec)
    if spec.intensity == "percentile":
        low, high = np.percentile(resized, (spec.low_percentile, spec.high_percentile))
        if high - low > 1e-6:
            resized = np.clip((resized - low) / (high - low), 0.0, 1.0)
    return np.ascontiguousarray(resized[:, :, np.newaxis], dtype=np.float32)


def content_box(shape: tuple[int, int], spec: PreprocessSpec) -> tuple[int, int, int, int]:
    """Where the image lies within the network's square input.

    Parameters
    ----------
    shape
        (rows, columns) of the radiograph.
    spec
        The model's own specification.

    Returns
    -------
    tuple of int
        (top, left, height, width) in input pixels; the whole square for "stretch". A class
        activation map is laid over the radiograph by cutting this box out of it.
    """
    size = spec.size_px
    if spec.fit == "stretch":
        return 0, 0, size, size
    rows, columns = shape
    scale = size / max(rows, columns)
    height, width = max(1, round(rows * scale)), max(1, round(columns * scale))
    return (size - height) // 2, (size - width) // 2, height, width


def content_of(
    values: NDArray[np.float32], shape: tuple[int, int], spec: PreprocessSpec
) -> NDArray[np.float32]:
    """Cut out of a map over the network's input what lies over the radiograph, not its padding.

    Parameters
    ----------
    values
        float32, shape (h, w): a map of any size over the whole input.
    shape
        (rows, columns) of the radiograph.
    spec
        That of the network which made the map.

    Returns
    -------
    numpy.ndarray
        float32: the map as it is where there is no padding, else its part, enlarged first, since
        the padding's edge rarely falls between two cells.
    """
    top, left, height, width = content_box(shape, spec)
    if (height, width) == (spec.size_px, spec.size_px):
        return values
    whole = cv2.resize(values, (spec.size_px, spec.size_px), interpolation=cv2.INTER_LINEAR)
    return np.asarray(whole[top : top + height, left : left + width], dtype=np.float32)


def _fit(pixels: FloatImage, spec: PreprocessSpec) -> FloatImage:
    size = spec.size_px
    top, left, height, width = content_box((pixels.shape[0], pixels.shape[1]), spec)
    resized = _resize(pixels, height, width)
    if (height, width) == (size, size):
        return resized
    canvas = np.zeros((size, size), dtype=np.float32)
    canvas[top : top + height, left : left + width] = resized
    return canvas


def _resize(pixels: FloatImage, height: int, width: int) -> FloatImage:
    # Averaging over areas is the only one of OpenCV's ways that does not alias when
    # shrinking 20-fold; it degenerates to nearest neighbour when enlarging.
    shrinks = pixels.shape[0] >= height and pixels.shape[1] >= width
    how = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(pixels, (width, height), interpolation=how), dtype=np.float32)
