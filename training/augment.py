"""Small changes of geometry and exposure that leave an X-ray the same X-ray.

No flips: a mirrored chest has its heart on the right, which hardly anybody's is.
"""

from dataclasses import dataclass

import cv2
import numpy as np

from lungwatch.errors import ConfigError
from lungwatch.training.data.pixels import FloatArray


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """How far an image may be changed; each amount is drawn uniformly, both ways.

    Attributes
    ----------
    width_shift
        Largest shift to the left or right, as a fraction of the width.
    rotation_deg
        Largest rotation about the centre, in degrees; at most 15.
    zoom
        Largest change of scale, as a fraction; at most 0.2.
    contrast, brightness
        Largest change of the slope about mid-grey, and of the grey level (0..1).
    """

    width_shift: float = 0.05
    rotation_deg: float = 15.0
    zoom: float = 0.2
    contrast: float = 0.2
    brightness: float = 0.1

    def __post_init__(self) -> None:
        limits = {
            "width_shift": 0.2,
            "rotation_deg": 15.0,
            "zoom": 0.2,
            "contrast": 0.5,
            "brightness": 0.5,
        }
        for name, limit in limits.items():
            if not 0.0 <= getattr(self, name) <= limit:
                raise ConfigError(f"augmentation: {name} must lie within 0..{limit}")


NO_AUGMENTATION = Augmentation(
    width_shift=0.0, rotation_deg=0.0, zoom=0.0, contrast=0.0, brightness=0.0
)


def augment(batch: FloatArray, augmentation: Augmentation, rng: np.random.Generator) -> FloatArray:
    """Change every image of a batch on its own.

    Parameters
    ----------
    batch
        float32, shape (N, S, S, 1), 0..1; not modified.
    augmentation
        The limits.
    rng
        Source of chance; the same state gives the same images.

    Returns
    -------
    numpy.ndarray
        float32, shape (N, S, S, 1), 0..1. What moves in from outside repeats the edge, so
        that no black wedge tells the network how an image was turned.
    """
    draws = rng.uniform(-1.0, 1.0, size=(len(batch), 5))
    changed = np.empty_like(batch)
    side = batch.shape[1]
    for index, (shift, turn, scale, slope, level) in enumerate(draws):
        matrix = affine(
            side,
            shift_px=shift * augmentation.width_shift * side,
            rotation_deg=turn * augmentation.rotation_deg,
            scale=1.0 + scale * augmentation.zoom,
        )
        moved = cv2.warpAffine(
            batch[index, :, :, 0],
            matrix,
            (side, side),
            flags=cv2.INTER_LINEAR,
            borderMode=cv2.BORDER_REPLICATE,
        )
        grey = (moved - 0.5) * (1.0 + slope * augmentation.contrast) + 0.5
        changed[index, :, :, 0] = np.clip(grey + level * augmentation.brightness, 0.0, 1.0)
    return changed


def affine(
    side_px: int, *, shift_px: float, rotation_deg: float, scale: float
) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    """Return the 2x3 matrix that turns and scales about the centre, then shifts sideways.

    Its left 2x2 part has a positive determinant for any positive scale: it cannot mirror.
    """
    centre = (side_px - 1) / 2.0
    matrix = np.asarray(cv2.getRotationMatrix2D((centre, centre), rotation_deg, scale))
    matrix[0, 2] += shift_px
    return matrix.astype(np.float64).reshape(2, 3)
