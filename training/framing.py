"""Show each X-ray in another frame: turned, stretched, moved, or cropped to its lungs."""

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from lungwatch.errors import ConfigError
from lungwatch.training.data.pixels import FloatArray

_LUNG = 0.5
# A lung component smaller than this fraction of the image is a speck, and lungs narrower or
# lower than this fraction of its side are none that one could crop to.
_SPECK, _NARROWEST = 0.006, 0.27
_LARGEST_MARGIN = 0.1


@dataclass(frozen=True, kw_only=True)
class Framing:
    """How far the frame may differ; each amount is drawn uniformly, both ways.

    Attributes
    ----------
    rotation_deg
        Largest rotation, in degrees.
    zoom
        Largest change of scale, as a fraction.
    aspect
        Largest change of height against width, as a logarithm.
    shift
        Largest shift, sideways and up or down, as a fraction of the side.
    lung_crop
        Probability that the frame is the box around the lungs instead, with up to 10 % of the
        side as margin, and turned only.
    """

    rotation_deg: float = 12.0
    zoom: float = 0.2
    aspect: float = 0.12
    shift: float = 0.05
    lung_crop: float = 0.4

    def __post_init__(self) -> None:
        limits = {"rotation_deg": 15.0, "zoom": 0.5, "aspect": 0.5, "shift": 0.2, "lung_crop": 1.0}
        for name, limit in limits.items():
            if not 0.0 <= getattr(self, name) <= limit:
                raise ConfigError(f"framing: {name} must lie within 0..{limit}")


def reframe(
    batch: FloatArray, lungs: FloatArray, framing: Framing, rng: np.random.Generator
) -> tuple[FloatArray, FloatArray]:
    """Show every image of a batch, and its lungs with it, in a frame of its own.

    Parameters
    ----------
    batch
        float32, shape (N, S, S, 1), 0..1; not modified.
    lungs
        float32, shape (N, S, S), 0..1; zeros where they are not known.
    framing
        The limits.
    rng
        Source of chance; the same state gives the same frames.

    Returns
    -------
    batch, lungs
        As they came. What moves in from outside is black or repeats the edge, by chance. No
        frame mirrors.
    """
    side = batch.shape[1]
    images, masks = np.empty_like(batch), np.empty_like(lungs)
    for index, (image, mask) in enumerate(zip(batch[..., 0], lungs, strict=True)):
        frame = box_around(mask) if rng.random() < framing.lung_crop else None
        if frame is None:
            scale = 1.0 / (1.0 + rng.uniform(-framing.zoom, framing.zoom))
            stretch = np.exp(rng.uniform(-framing.aspect, framing.aspect))
            centre = 0.5 + rng.uniform(-framing.shift, framing.shift, 2)
            extent = np.array([scale * stretch, scale / stretch])
        else:
            margin = rng.uniform(0.0, _LARGEST_MARGIN, 4)
            low, high = frame[:2] - margin[:2], frame[2:] + margin[2:]
            centre, extent = (low + high) / 2.0, high - low
        turn = np.deg2rad(rng.uniform(-framing.rotation_deg, framing.rotation_deg))
        outside = cv2.BORDER_REPLICATE if rng.random() < 0.6 else cv2.BORDER_CONSTANT
        matrix = _matrix(side, centre, extent, float(turn))
        flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        images[index, :, :, 0] = cv2.warpAffine(
            image, matrix, (side, side), flags=flags, borderMode=outside
        )
        masks[index] = cv2.warpAffine(mask, matrix, (side, side), flags=flags)
    return images, masks


def _matrix(
    side: int, centre: NDArray[np.float64], extent: NDArray[np.float64], turn: float
) -> NDArray[np.float64]:
    # From pixels of the new frame to those of the image. Its determinant is positive.
    cos, sin = np.cos(turn), np.sin(turn)
    linear = extent[:, np.newaxis] * np.array([[cos, -sin], [sin, cos]])
    middle = np.full(2, (side - 1) / 2.0)
    offset = centre * side - 0.5 - linear @ middle
    return np.hstack([linear, offset[:, np.newaxis]])


def box_around(mask: FloatArray) -> NDArray[np.float64] | None:
    """Put a box around lungs: left, top, right, bottom, 0..1; None if there are none to see."""
    side = mask.shape[0]
    _, _, found, _ = cv2.connectedComponentsWithStats((mask > _LUNG).astype(np.uint8))
    parts = found[1:][found[1:, cv2.CC_STAT_AREA] > _SPECK * side * side]
    if not len(parts):
        return None
    low = parts[:, :2].min(axis=0) / side
    high = (parts[:, :2] + parts[:, 2:4]).max(axis=0) / side
    if (high - low).min() < _NARROWEST:
        return None
    return np.concatenate([low, high])
