"""Augmentation of lung fields: the pictures that a network of lungs learns from.

A mask is ragged where a lung is opaque, and each source has its own masks, exposure and noise.
So outline, geometry and intensity change at random, whatever the finding.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from lungwatch.training.field_view import FloatArray, on_grey, soft_lungs, standardised, view

ByteArray = NDArray[np.uint8]

CLASSES = ("NORMAL", "OTHER", "OPACITY")
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


def plain_view(field: LungField, size_px: int) -> FloatArray:
    """Show a field as it is: float32, shape (S, S), 0..1, the box stretched to the square."""
    return view(*_warped(field, _stretch(field, size_px), size_px))


def draw_view(field: LungField, size_px: int, rng: np.random.Generator) -> FloatArray:
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


def draw_batch(
    groups: Mapping[tuple[str, int], Sequence[LungField]],
    counts: Mapping[tuple[str, int], int],
    size_px: int,
    rng: np.random.Generator,
) -> tuple[FloatArray, FloatArray]:
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
    return np.stack(pixels)[..., np.newaxis], np.eye(len(CLASSES), dtype=np.float32)[classes]


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


def _stretch(field: LungField, size_px: int) -> FloatArray:
    height, width = field.pixels.shape
    # Pixel centres lie half a pixel inside their edges.
    across, down = size_px / width, size_px / height
    return np.array(
        [[across, 0, across / 2 - 0.5], [0, down, down / 2 - 0.5], [0, 0, 1]], np.float32
    )


def _moved(matrix: FloatArray, size_px: int, rng: np.random.Generator) -> FloatArray:
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


def _warped(field: LungField, matrix: FloatArray, size_px: int) -> tuple[FloatArray, FloatArray]:
    side = (size_px, size_px)
    pixels = field.pixels.astype(np.float32) / np.float32(255.0)
    # What is outside the box has its edge's values, which the mask then leaves out.
    shown = cv2.warpAffine(pixels, matrix[:2], side, borderMode=cv2.BORDER_REPLICATE)
    lungs = cv2.warpAffine(field.lungs.astype(np.float32), matrix[:2], side)
    return np.asarray(shown, np.float32), np.asarray(lungs, np.float32)


def _outlined(lungs: FloatArray, rng: np.random.Generator) -> FloatArray:
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


def _exposed(values: FloatArray, rng: np.random.Generator) -> FloatArray:
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
