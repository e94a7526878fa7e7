"""Preprocessing: from a radiograph to a network's input, and what is measured on it.

A `PreprocessSpec` travels inside the model; training, serving and audits all call `preprocess`
with it. Standardisation and grey to three channels are part of the model's own graph.
"""

import hashlib
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
    """Parameters of `preprocess`.

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
            If a key is unknown or missing or a value is out of range: a network that is run with a
            slightly different preprocessing silently gives wrong answers.
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
    """Return the box of the image within the network's square input.

    Parameters
    ----------
    shape
        (rows, columns) of the radiograph.

    Returns
    -------
    tuple of int
        (top, left, height, width) in input pixels; the whole square for "stretch". This part of a
        class activation map is drawn over the radiograph.
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
    """Crop a map over the network's whole input, (h, w), to the radiograph without its padding.

    Without padding the map is returned as it is; else it is enlarged first, since the padding's
    edge rarely falls between two cells.

    Parameters
    ----------
    shape
        (rows, columns) of the radiograph.
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
    # Of OpenCV's methods only averaging over areas does not alias when shrinking 20-fold; when
    # enlarging it degenerates to nearest neighbour.
    shrinks = pixels.shape[0] >= height and pixels.shape[1] >= width
    how = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(pixels, (width, height), interpolation=how), dtype=np.float32)


_GOLDEN_SIDE_PX = 512


def golden_pixels() -> FloatImage:
    """Draw a frontal chest X-ray that every installation generates bit for bit.

    It shows no patient. A model's contract holds the model's answers on it, so that a broken file,
    codec, runtime or processor is found before the first real X-ray is scored.

    Returns
    -------
    numpy.ndarray
        float32, shape (512, 512), 0..1, multiples of 1/255. Made of polynomials only: no
        mathematical library's rounding enters.
    """
    y, x = np.mgrid[0:_GOLDEN_SIDE_PX, 0:_GOLDEN_SIDE_PX].astype(np.float64) / _GOLDEN_SIDE_PX

    def ellipse(cx: float, cy: float, rx: float, ry: float) -> NDArray[np.float64]:
        inside = 1.0 - ((x - cx) / rx) ** 2 - ((y - cy) / ry) ** 2
        return np.asarray(np.clip(inside * 4.0, 0.0, 1.0))

    picture = 0.75 * ellipse(0.5, 0.6, 0.48, 0.62)
    for cx in (0.32, 0.68):
        picture -= 0.5 * ellipse(cx, 0.47, 0.15, 0.32)
    ribs = np.abs((y * 12.0 + 2.0 * np.abs(x - 0.5)) % 1.0 - 0.5)
    picture += 0.12 * np.clip(ribs * 4.0 - 1.2, 0.0, 1.0) * ellipse(0.5, 0.47, 0.4, 0.36)
    picture += 0.25 * ellipse(0.56, 0.62, 0.14, 0.16)
    picture += 0.2 * np.clip(1.0 - np.abs(x - 0.5) * 25.0, 0.0, 1.0)
    levels = np.round(np.clip(picture, 0.0, 1.0) * 255.0).astype(np.uint8)
    return levels.astype(np.float32) / np.float32(255.0)


def golden_input(spec: PreprocessSpec) -> NDArray[np.float32]:
    """Return the golden picture as a model sees it, float32 (size_px, size_px, 1), 0..1."""
    return preprocess(golden_pixels(), spec)


def golden_digest() -> str:
    """Return the SHA-256 of the golden picture's pixels, before any preprocessing."""
    return hashlib.sha256(golden_pixels().tobytes()).hexdigest()


LEAST_SHARE_INSIDE = 0.5
"""Share of the map for COVID below which its attention is called outside the lungs."""

LEAST_HALF = 0.15
"""Share of the lung area below which one half of the picture is called without its lung."""

MOST_OF_AN_EDGE = 0.25
"""Share of one edge of the picture from which on lungs at that edge are called cut off."""

_LUNG_THRESHOLD = 0.5


def lung_mask(
    lungs: NDArray[np.float32], shape: tuple[int, int], spec: PreprocessSpec
) -> NDArray[np.bool_]:
    """Return a mask of lung, bool (h, w), over the radiograph without padding.

    Parameters
    ----------
    lungs
        float32, shape (side, side), 0..1: the gate's output over its whole input.
    shape
        (rows, columns) of the radiograph.
    spec
        The gate's.
    """
    return np.asarray(content_of(lungs, shape, spec) >= _LUNG_THRESHOLD)


def lung_area_of(mask: NDArray[np.bool_]) -> float:
    """Return the share of a picture that is lung, 0..1."""
    return float(mask.mean())


def has_partial_lungs(mask: NDArray[np.bool_], bounds: tuple[float, float]) -> bool:
    """Return whether part of the lungs seems to be missing.

    Their area is out of `bounds` (`lung_area` of the gate's contract), the left or right half of
    the picture holds less than 15 % of it, or they touch a quarter of an edge of the picture.
    """
    if not bounds[0] <= lung_area_of(mask) <= bounds[1] or not mask.any():
        return True
    columns = mask.sum(axis=0, dtype=np.int64)
    left = float(columns[: len(columns) // 2].sum() / columns.sum())
    if min(left, 1.0 - left) < LEAST_HALF:
        return True
    edges = (mask[0], mask[-1], mask[:, 0], mask[:, -1])
    return max(float(edge.mean()) for edge in edges) >= MOST_OF_AN_EDGE


def share_inside(small: NDArray[np.float32], mask: NDArray[np.float32]) -> float | None:
    """Return the share of a map's sum that lies on lungs; None for an empty map.

    Parameters
    ----------
    small
        float32, shape (h, w), at least 0, over the same picture as the mask.
    mask
        float32, shape (H, W), 0..1: each cell's share of lung.
    """
    wide = enlarged(small, (mask.shape[0], mask.shape[1]))
    total = float(wide.sum(dtype=np.float64))
    return float((wide * mask).sum(dtype=np.float64)) / total if total > 0 else None


def enlarged(small: NDArray[np.float32], shape: tuple[int, int]) -> NDArray[np.float32]:
    """Return a map of another shape as the overlay shows it: bilinear, and never below 0."""
    wide = cv2.resize(small, (shape[1], shape[0]), interpolation=cv2.INTER_LINEAR)
    return np.asarray(np.maximum(wide, 0.0), dtype=np.float32)


# At 160 px, chest X-rays have ratios from 0.14 to 0.62; 99 % of the same enlarged from 64 or 80 px
# stay below 0.137, those from fewer below that.
_LEAST_FINE = 0.135


def lacks_detail(content: NDArray[np.float32], shape: tuple[int, int]) -> bool:
    """Return whether an X-ray has fewer pixels than the input, or was enlarged or blurred.

    The ratio of structures of one to two pixels to those of two to eight hardly depends on
    exposure or contrast; a picture enlarged from half the size has no fine ones. Enlargement by
    repeating pixels is not recognised.

    Parameters
    ----------
    content
        float32, shape (h, w): the network's input without its padding.
    shape
        (rows, columns) of the radiograph.
    """
    height, width = content.shape
    if shape[0] < height or shape[1] < width:
        return True
    half, quarter, eighth = (_without_detail(content, factor) for factor in (2, 4, 8))
    fine = float(np.std(content - half))
    coarser = float(np.std(half - quarter)) + float(np.std(quarter - eighth))
    return fine < _LEAST_FINE * coarser


def _without_detail(content: NDArray[np.float32], factor: int) -> NDArray[np.float32]:
    height, width = content.shape
    small = (max(1, width // factor), max(1, height // factor))
    reduced = cv2.resize(content, small, interpolation=cv2.INTER_AREA)
    return np.asarray(
        cv2.resize(reduced, (width, height), interpolation=cv2.INTER_CUBIC), dtype=np.float32
    )


# Fewer are a side mark with the radiographer's initials, which nearly every X-ray has.
BURNT_IN_LETTERS = 4
_SIDE_PX = 1024
_HATS = (cv2.MORPH_TOPHAT, cv2.MORPH_BLACKHAT)
_STROKE_PX = 9  # letters are made of strokes narrower than this
_STROKE_CONTRAST = 76  # of 255, from what surrounds the stroke
_HEIGHT_PX = (5, 40)
_WIDTH_PX = (2, 40)
_LEAST_AREA_PX = 8
_MOST_SHAPES = 500


def letters_in_line(grey: NDArray[np.uint8]) -> int:
    """Return the number of letters in the longest line of burnt-in text.

    A heuristic for printed letters in a line, bright or dark. Handwriting, turned lines, small
    print and letters of lead on a strip are missed.

    Parameters
    ----------
    grey
        uint8, shape (rows, columns), air dark; reduced to a longest side of 1024 px.
    """
    scale = _SIDE_PX / max(grey.shape)
    if scale < 1.0:
        size = (max(1, round(grey.shape[1] * scale)), max(1, round(grey.shape[0] * scale)))
        grey = np.asarray(cv2.resize(grey, size, interpolation=cv2.INTER_AREA), dtype=np.uint8)
    # The gaps between bright letters that touch each other are a line of dark ones.
    return max(_longest_line(_letter_like(_shapes(grey, hat))) for hat in _HATS)


def _shapes(grey: NDArray[np.uint8], hat: int) -> NDArray[np.int64]:
    """Find narrow shapes of contrast; (n, 5): left, top, width, height, area."""
    kernel = np.ones((_STROKE_PX, _STROKE_PX), np.uint8)
    contrast = cv2.morphologyEx(grey, hat, kernel)
    _, strokes = cv2.threshold(contrast, _STROKE_CONTRAST, 1, cv2.THRESH_BINARY)
    # Labels of 16 bits take a third of the time.
    kind = cv2.CV_16U if cv2.countNonZero(strokes) < 1 << 16 else cv2.CV_32S
    _, _, found, _ = cv2.connectedComponentsWithStats(strokes, ltype=kind)
    return np.asarray(found[1:], dtype=np.int64)


def _letter_like(shapes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Keep shapes of a letter's size, from left to right."""
    width, height, area = shapes[:, 2], shapes[:, 3], shapes[:, 4]
    keep = (height >= _HEIGHT_PX[0]) & (height <= _HEIGHT_PX[1])
    keep &= (width >= _WIDTH_PX[0]) & (width <= _WIDTH_PX[1]) & (width <= 2 * height)
    # A wire's box is nearly empty.
    keep &= (area >= _LEAST_AREA_PX) & (area * 7 >= width * height)
    kept = shapes[keep][:_MOST_SHAPES]
    return kept[np.argsort(kept[:, 0], kind="stable")]


def _longest_line(letters: NDArray[np.int64]) -> int:
    left, top, width, height, _ = letters.T
    bottom = top + height
    # Row i, column j: whether letter j may come after letter i; later ones only, so no circles.
    gap = left[np.newaxis] - (left + width)[:, np.newaxis]
    follows = (gap >= -1) & (10 * gap <= 12 * np.maximum(height[np.newaxis], height[:, np.newaxis]))
    follows &= 4 * np.abs(bottom[np.newaxis] - bottom[:, np.newaxis]) <= height[:, np.newaxis] + 4
    follows &= 10 * height[np.newaxis] >= 7 * height[:, np.newaxis]
    follows &= 10 * height[np.newaxis] <= 14 * height[:, np.newaxis]
    follows &= np.tri(len(letters), dtype=bool).T & ~np.eye(len(letters), dtype=bool)
    longest = np.ones(len(letters), dtype=np.int64)
    for i in np.flatnonzero(follows.any(axis=1))[::-1]:
        longest[i] += longest[follows[i]].max()
    return int(longest.max(initial=0))
