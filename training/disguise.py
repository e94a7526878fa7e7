"""Make what betrays an X-ray's origin vary at random, so that only the lungs can be learnt.

Collections differ in exposure, sharpness, compression, borders, letters and in all that lies
around the lungs. A network that may see every COVID image with the marks of its hospital
learns the hospital (DeGrave, Janizek, Lee 2021). Here each training image gets marks, tones
and surroundings of its own at every showing.
"""

from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from lungwatch.errors import ConfigError
from lungwatch.training.data.pixels import FloatArray

_LETTERS = list("ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789")
# A lung mask that covers less of an image than this was not found, or is not of two lungs.
FEWEST_LUNG = 0.08


@dataclass(frozen=True, kw_only=True)
class Disguise:
    """How often each disguise is put on; probabilities, 0..1.

    Attributes
    ----------
    exposure
        Slight changes of gamma, slope, level and resolution; each is drawn on its own besides.
    tone
        Larger ones: local contrast (CLAHE), gamma, window and slope.
    texture
        Much lower resolution, sharpening, noise and JPEG compression.
    marks
        Borders, letters and blanked corners.
    surroundings
        Everything outside the lungs is taken from another image of the batch, or blanked.
    """

    exposure: float = 1.0
    tone: float = 0.0
    texture: float = 0.0
    marks: float = 1.0
    surroundings: float = 0.4

    def __post_init__(self) -> None:
        for name in ("exposure", "tone", "texture", "marks", "surroundings"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ConfigError(f"disguise: {name} must lie within 0..1")


# What hides most of a source, but also much of what faint opacities look like.
STRONG = Disguise(exposure=0.0, tone=1.0, texture=1.0)


def disguise(
    batch: FloatArray, lungs: FloatArray | None, amount: Disguise, rng: np.random.Generator
) -> FloatArray:
    """Disguise every image of a batch.

    Parameters
    ----------
    batch
        float32, shape (N, S, S, 1), 0..1; not modified.
    lungs
        float32, shape (N, S, S), 0..1: what of each image is lung. None leaves the
        surroundings as they are.
    amount
        How often.
    rng
        Source of chance; the same state gives the same images.

    Returns
    -------
    numpy.ndarray
        float32, shape (N, S, S, 1), 0..1.
    """
    images = batch[..., 0].copy()
    if lungs is not None and amount.surroundings:
        _exchange_surroundings(images, lungs, amount.surroundings, rng)
    steps: tuple[tuple[float, Callable[[FloatArray, np.random.Generator], FloatArray]], ...] = (
        (amount.exposure, _exposure),
        (amount.tone, _tone),
        (amount.texture, _texture),
        (amount.marks, _marks),
    )
    for index, image in enumerate(images):
        changed = image
        for probability, step in steps:
            if rng.random() < probability:
                changed = step(changed, rng)
        images[index] = changed
    return np.clip(images, 0.0, 1.0)[..., np.newaxis]


def _exchange_surroundings(
    images: FloatArray, lungs: FloatArray, probability: float, rng: np.random.Generator
) -> None:
    originals = images.copy()
    others = rng.permutation(len(images))
    for index, other in enumerate(others):
        if rng.random() >= probability or lungs[index].mean() < FEWEST_LUNG:
            continue
        margin = int(rng.integers(5, 17)) | 1
        kept = cv2.dilate(lungs[index], np.ones((margin, margin), np.uint8))
        kept = cv2.GaussianBlur(kept, (0, 0), 2.5)
        around = originals[other]
        if rng.random() < 0.25:
            around = np.full_like(around, rng.random())
        images[index] = originals[index] * kept + around * (1.0 - kept)


def _exposure(image: FloatArray, rng: np.random.Generator) -> FloatArray:
    if rng.random() < 0.5:
        image = np.clip(image, 0.0, 1.0) ** np.exp(rng.uniform(-0.15, 0.15))
    image = (image - 0.5) * rng.uniform(0.85, 1.15) + 0.5 + rng.uniform(-0.08, 0.08)
    if rng.random() < 0.2:
        image = _blurred(image, rng.uniform(1.0, 1.5))
    return np.clip(image, 0.0, 1.0).astype(np.float32)


def _tone(image: FloatArray, rng: np.random.Generator) -> FloatArray:
    if rng.random() < 0.2:
        equaliser = cv2.createCLAHE(rng.uniform(1.0, 3.0), (4, 4))
        image = equaliser.apply(_bytes(image)).astype(np.float32) / 255.0
    if rng.random() < 0.6:
        image = np.clip(image, 0.0, 1.0) ** np.exp(rng.uniform(-0.4, 0.4))
    if rng.random() < 0.5:
        low, high = np.percentile(image, (rng.uniform(0, 4), rng.uniform(96, 100)))
        image = (image - low) / max(high - low, 0.05)
    image = (image - 0.5) * rng.uniform(0.75, 1.25) + 0.5 + rng.uniform(-0.12, 0.12)
    return np.clip(image, 0.0, 1.0).astype(np.float32)


def _texture(image: FloatArray, rng: np.random.Generator) -> FloatArray:
    if rng.random() < 0.4:
        image = _blurred(image, rng.uniform(1.0, 2.5))
    if rng.random() < 0.2:
        image = image + rng.uniform(0.3, 1.0) * (image - cv2.GaussianBlur(image, (0, 0), 1.5))
    if rng.random() < 0.3:
        noise = rng.normal(0.0, rng.uniform(0.005, 0.03), image.shape)
        image = image + noise.astype(np.float32)
    if rng.random() < 0.3:
        quality = [cv2.IMWRITE_JPEG_QUALITY, int(rng.uniform(30, 90))]
        _, compressed = cv2.imencode(".jpg", _bytes(image), quality)
        decoded = cv2.imdecode(compressed, cv2.IMREAD_GRAYSCALE)
        image = np.asarray(decoded, dtype=np.float32) / 255.0
    return np.clip(image, 0.0, 1.0).astype(np.float32)


def _marks(image: FloatArray, rng: np.random.Generator) -> FloatArray:
    marked = image.copy()
    side = marked.shape[0]
    if rng.random() < 0.3:
        for edge in range(4):
            width = int(rng.uniform(0.0, 0.08) * side)
            if rng.random() < 0.5 and width:
                # A view: turning it by quarters makes every edge the first rows.
                np.rot90(marked, edge)[:width] = rng.choice([0.0, 0.0, 0.0, 1.0, rng.random()])
    if rng.random() < 0.4:
        marked = _lettered(marked, rng)
    if rng.random() < 0.2:
        height, width = (int(rng.uniform(0.05, most) * side) for most in (0.2, 0.3))
        rows = slice(0, height) if rng.random() < 0.5 else slice(side - height, side)
        columns = slice(0, width) if rng.random() < 0.5 else slice(side - width, side)
        marked[rows, columns] = rng.choice([0.0, 0.0, 1.0, rng.random()])
    return marked


def _lettered(image: FloatArray, rng: np.random.Generator) -> FloatArray:
    canvas = _bytes(image)
    side = canvas.shape[0]
    for _ in range(rng.integers(1, 4)):
        text = "".join(rng.choice(_LETTERS, rng.integers(1, 9)))
        left = rng.choice([rng.uniform(0.0, 0.25), rng.uniform(0.6, 0.95)])
        base = rng.choice([rng.uniform(0.04, 0.2), rng.uniform(0.85, 1.0)])
        cv2.putText(
            canvas,
            text,
            (int(left * side), int(base * side)),
            int(rng.integers(0, 4)),
            rng.uniform(0.25, 0.6) * side / 160.0,
            int(rng.choice([255, 255, 230, 0])),
            1,
            cv2.LINE_AA,
        )
    return canvas.astype(np.float32) / 255.0


def _blurred(image: FloatArray, factor: float) -> FloatArray:
    # As if it had been stored at a lower resolution.
    side = image.shape[0]
    small = max(8, int(side / factor))
    reduced = cv2.resize(image, (small, small), interpolation=cv2.INTER_AREA)
    return np.asarray(cv2.resize(reduced, (side, side), interpolation=cv2.INTER_LINEAR), np.float32)


def _bytes(image: FloatArray) -> NDArray[np.uint8]:
    return np.asarray(np.round(np.clip(image, 0.0, 1.0) * 255.0), dtype=np.uint8)
