"""Lung fields as training images: standardised view inside the lungs, augmentation.

Balanced batches.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType

import cv2
import numpy as np
from numpy.typing import NDArray

from lungwatch.training.data.pixels import Tensor

# Not that of `pixels`, whose module reads files: these pictures are drawn without a decoder.
FieldArray = NDArray[np.float32]


OUTSIDE = 0.5

"""Grey value of what is no lung, and of the lungs' mean."""


DEVIATIONS = 4.0

"""Standard deviations from black to white."""


_SOFTENING_PX = 1.2  # standard deviation of the Gaussian over the mask, of a view of any size

_LEAST_VARIANCE = 1e-6  # what is uniform becomes mid-grey instead of noise


def soft_lungs(lungs: FieldArray) -> FieldArray:
    """Soften the edge of masks.

    Parameters
    ----------
    lungs
        float32, shape (S, S), 0..1.

    Returns
    -------
    numpy.ndarray
        float32, of the same shape, 0..1: a Gaussian of 1.2 pixels; beyond the border is no lung.
    """
    blur = _gaussian()
    soft = cv2.sepFilter2D(lungs, cv2.CV_32F, blur, blur, borderType=cv2.BORDER_CONSTANT)
    return np.asarray(soft, np.float32)


def standardised(pixels: FieldArray, soft: FieldArray) -> FieldArray:
    """Standardise grey values by their mean and deviation inside the lungs.

    Parameters
    ----------
    pixels
        float32, shape (S, S).
    soft
        float32, of the same shape, 0..1: how much each pixel counts; see `soft_lungs`.

    Returns
    -------
    numpy.ndarray
        float32, of the same shape, clipped to 0..1: 0.5 at the mean, 0 and 1 two deviations
        from it.
    """
    return np.asarray(_standardised(pixels, soft, np), np.float32)


def on_grey(values: FieldArray, soft: FieldArray) -> FieldArray:
    """Fill what is no lung with mid-grey."""
    return np.asarray(_on_grey(values, soft), np.float32)


def view(pixels: FieldArray, lungs: FieldArray) -> FieldArray:
    """Return what the network sees of a picture, float32 (S, S), 0..1; see `view_tensor`."""
    soft = soft_lungs(lungs)
    return on_grey(standardised(pixels, soft), soft)


def view_tensor(pixels: Tensor, lungs: Tensor) -> Tensor:
    """Compute `view` in a graph of Keras.

    Parameters
    ----------
    pixels, lungs
        float32, (N, S, S), grey values and masks, 0..1.

    Returns
    -------
    tensor
        float32, (N, S, S), 0..1.
    """
    from keras import ops

    # Plain arrays: tensors made out here would turn into inputs of an exported graph.
    blur = _gaussian()
    soft = lungs[..., np.newaxis]
    for shape in ((-1, 1, 1, 1), (1, -1, 1, 1)):
        soft = ops.conv(soft, blur.reshape(shape), padding="same", data_format="channels_last")
    soft = soft[..., 0]
    return _on_grey(_standardised(pixels, soft, ops), soft)


def _standardised(pixels: Tensor, soft: Tensor, ops: ModuleType) -> Tensor:
    def mean(values: Tensor) -> Tensor:
        return ops.sum(values * soft, axis=(-2, -1), keepdims=True) / weight

    weight = ops.maximum(ops.sum(soft, axis=(-2, -1), keepdims=True), 1.0)
    centred = pixels - mean(pixels)
    deviation = ops.sqrt(mean(centred * centred) + _LEAST_VARIANCE)
    return ops.clip(OUTSIDE + centred / (DEVIATIONS * deviation), 0.0, 1.0)


def _on_grey(values: Tensor, soft: Tensor) -> Tensor:
    return OUTSIDE + (values - OUTSIDE) * soft


@functools.cache
def _gaussian() -> FieldArray:
    away = np.arange(-4, 5) / _SOFTENING_PX
    weights = np.exp(-0.5 * away**2)
    return np.asarray(weights / weights.sum(), np.float32)


ByteArray = NDArray[np.uint8]


FIELD_CLASSES = ("NORMAL", "OTHER", "OPACITY")

"""What a field shows: nothing, something that is no opacity, an opacity."""


_BLACK = 12  # of 255: what a JPEG makes of black

_EDGE_PX, _NEAR_PX = 2, 3.0

# Standard deviations of the geometry: degrees, and fractions of the side.
_TURN_DEG, _SCALE, _STRETCH, _SHIFT = 4.0, 0.05, 0.04, 0.02

_MOST_ERODED_PX, _MOST_DILATED_PX = 4, 2

_BITTEN, _ONE_LUNG = 0.4, 0.15  # share of the pictures

_LEAST_LUNG = 0.03  # of the view; what would be less stays as it is


@dataclass(frozen=True, kw_only=True, eq=False)
class LungField:
    """The box of the lungs, cut out of an X-ray.

    Attributes
    ----------
    pixels
        uint8, shape (h, w), air dark.
    lungs
        uint8, of the same shape: 1 inside the lungs, 0 outside.
    """

    pixels: ByteArray
    lungs: ByteArray


def ready_field(pixels: ByteArray) -> LungField:
    """Take a field that is black outside the lungs for what it is.

    Black mixes into the lungs' edge, at least where the file is a JPEG. That edge is taken off,
    and the surround is filled with what is near: a dark rim would be of this kind of file alone.

    Parameters
    ----------
    pixels
        uint8, shape (h, w).
    """
    square = np.ones((3, 3), np.uint8)
    inside = cv2.morphologyEx((pixels > _BLACK).astype(np.uint8), cv2.MORPH_OPEN, square)
    lungs = np.asarray(cv2.erode(inside, square, iterations=_EDGE_PX), np.uint8)
    weight = lungs.astype(np.float32)
    grey = float(pixels[lungs > 0].mean()) if lungs.any() else 0.0
    near = cv2.GaussianBlur((pixels.astype(np.float32) - grey) * weight, (0, 0), _NEAR_PX)
    near = grey + near / np.maximum(cv2.GaussianBlur(weight, (0, 0), _NEAR_PX), 1e-3)
    filled = np.where(lungs > 0, pixels, np.clip(np.round(near), 0, 255))
    return LungField(pixels=filled.astype(np.uint8), lungs=lungs)


def plain_view(field: LungField, size_px: int) -> FieldArray:
    """Show a field as it is: float32, shape (S, S), 0..1, the box stretched to the square."""
    return view(*_warped(field, _stretch(field, size_px), size_px))


def draw_view(field: LungField, size_px: int, rng: np.random.Generator) -> FieldArray:
    """Draw a picture of a field to learn from.

    Geometry: turn, scale, stretch, shift, half of them mirrored (findings have no side).
    Outline: eroded by up to 4 px or dilated by up to 2; bites out of it in 40 %; one lung only
    in 15 %. Intensity, within the standardised lungs: gamma, contrast, brightness; local
    equalisation, blur or sharpening, noise, and uneven illumination in some.

    Returns
    -------
    numpy.ndarray
        float32, shape (S, S), 0..1.
    """
    pixels, lungs = _warped(field, _moved(_stretch(field, size_px), size_px, rng), size_px)
    outlined = _outlined(lungs, rng)
    soft = soft_lungs(outlined if outlined.mean() >= _LEAST_LUNG else lungs)
    return on_grey(_exposed(standardised(pixels, soft), rng), soft)


def draw_field_batch(
    groups: Mapping[tuple[str, int], Sequence[LungField]],
    counts: Mapping[tuple[str, int], int],
    size_px: int,
    rng: np.random.Generator,
) -> tuple[FieldArray, FieldArray]:
    """Draw a batch, so many pictures of each group.

    Parameters
    ----------
    groups
        Fields by (source, index of the class).
    counts
        Pictures of each group.
    size_px
        Side of the view, S.
    rng
        Of everything that is drawn.

    Returns
    -------
    pixels, targets
        float32, shapes (N, S, S, 1), 0..1, and (N, 3), one-hot.
    """
    pixels, classes = [], []
    for group, count in counts.items():
        for index in rng.integers(len(groups[group]), size=count):
            pixels.append(draw_view(groups[group][index], size_px, rng))
            classes.append(group[1])
    return np.stack(pixels)[..., np.newaxis], np.eye(len(FIELD_CLASSES), dtype=np.float32)[classes]


def batch_counts(
    fields: Sequence[tuple[str, int]],
    pairs: Sequence[tuple[str, int]],
    batch_size: int,
    pair_share: float,
) -> dict[tuple[str, int], int]:
    """Share a batch out: as many pictures of each group of a kind.

    Parameters
    ----------
    fields, pairs
        Groups of ready fields, and of pairs within a source.
    batch_size
        Pictures of a batch.
    pair_share
        Share of the batch that the pairs have, 0..1; nothing without pairs.
    """
    of_pairs = round(batch_size * pair_share) if pairs else 0
    return {**_shared(fields, batch_size - of_pairs), **_shared(pairs, of_pairs)}


def _shared(groups: Sequence[tuple[str, int]], count: int) -> dict[tuple[str, int], int]:
    return {
        group: count // len(groups) + (index < count % len(groups))
        for index, group in enumerate(groups)
    }


def _stretch(field: LungField, size_px: int) -> FieldArray:
    height, width = field.pixels.shape
    # Pixel centres lie half a pixel inside their edges.
    across, down = size_px / width, size_px / height
    return np.array(
        [[across, 0, across / 2 - 0.5], [0, down, down / 2 - 0.5], [0, 0, 1]], np.float32
    )


def _moved(matrix: FieldArray, size_px: int, rng: np.random.Generator) -> FieldArray:
    angle = np.deg2rad(rng.normal(0.0, _TURN_DEG))
    scale, stretch = 1.0 + rng.normal(0.0, (_SCALE, _STRETCH))
    cosine, sine = np.cos(angle) * scale, np.sin(angle) * scale
    turned = np.array([[cosine * stretch, -sine, 0], [sine * stretch, cosine, 0], [0, 0, 1]])
    if rng.random() < 0.5:
        turned = np.diag((-1.0, 1.0, 1.0)) @ turned
    middle = (size_px - 1) / 2
    to_middle = np.array([[1, 0, -middle], [0, 1, -middle], [0, 0, 1]])
    across, down = middle + rng.normal(0.0, _SHIFT * size_px, 2)
    back = np.array([[1, 0, across], [0, 1, down], [0, 0, 1]])
    return np.asarray(back @ turned @ to_middle @ matrix, np.float32)


def _warped(field: LungField, matrix: FieldArray, size_px: int) -> tuple[FieldArray, FieldArray]:
    side = (size_px, size_px)
    pixels = field.pixels.astype(np.float32) / np.float32(255.0)
    # What is outside the box has its edge's values, which the mask then leaves out.
    shown = cv2.warpAffine(pixels, matrix[:2], side, borderMode=cv2.BORDER_REPLICATE)
    lungs = cv2.warpAffine(field.lungs.astype(np.float32), matrix[:2], side)
    return np.asarray(shown, np.float32), np.asarray(lungs, np.float32)


def _outlined(lungs: FieldArray, rng: np.random.Generator) -> FieldArray:
    size = lungs.shape[0]
    change = int(rng.integers(-_MOST_ERODED_PX, _MOST_DILATED_PX + 1))
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (1 + 2 * abs(change),) * 2)
    changed = cv2.erode(lungs, disc) if change < 0 else cv2.dilate(lungs, disc)
    lungs = np.array(changed, np.float32)
    if rng.random() < _BITTEN:
        for _ in range(int(rng.integers(1, 4))):
            inside = (lungs > 0.5).astype(np.uint8)
            edge = cv2.morphologyEx(inside, cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8))
            rows, columns = np.nonzero(edge)
            if not len(rows):
                break
            place = int(rng.integers(len(rows)))
            wide, high = (int(rng.uniform(0.02, 0.1) * size) + 1 for _ in range(2))
            middle = (int(columns[place]), int(rows[place]))
            cv2.ellipse(lungs, middle, (wide, high), rng.uniform(0, 180), 0, 360, 0.0, -1)
    if rng.random() < _ONE_LUNG:
        half = np.s_[:, : size // 2] if rng.random() < 0.5 else np.s_[:, size // 2 :]
        lungs[half] = 0.0
    return lungs


def _exposed(values: FieldArray, rng: np.random.Generator) -> FieldArray:
    x = values ** np.float32(np.exp(rng.normal(0.0, 0.25)))
    contrast, brightness = np.exp(rng.normal(0.0, 0.15)), rng.normal(0.0, 0.05)
    x = np.asarray(np.clip((x - 0.5) * contrast + 0.5 + brightness, 0.0, 1.0), np.float32)
    if rng.random() < 0.15:
        equaliser = cv2.createCLAHE(rng.uniform(1.0, 3.0), (8, 8))
        equalised = equaliser.apply((x * 255.0).astype(np.uint8))
        x = equalised.astype(np.float32) / np.float32(255.0)
    kind = rng.random()
    if kind < 0.3:
        x = np.asarray(cv2.GaussianBlur(x, (0, 0), rng.uniform(0.4, 1.6)), np.float32)
    elif kind < 0.5:
        fine = x - cv2.GaussianBlur(x, (0, 0), 2.5)
        x = np.clip(x + np.float32(rng.uniform(0.3, 1.5)) * fine, 0.0, 1.0)
    if rng.random() < 0.25:
        grain = rng.standard_normal(x.shape, dtype=np.float32)
        x = x + np.float32(rng.uniform(0.01, 0.05)) * grain
    if rng.random() < 0.3:
        coarse = rng.normal(0.0, 0.12, (3, 3)).astype(np.float32)
        x = x + cv2.resize(coarse, x.shape[::-1], interpolation=cv2.INTER_CUBIC)
    return np.asarray(np.clip(x, 0.0, 1.0), np.float32)
