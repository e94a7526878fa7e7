"""Augmentation of X-rays: geometry and exposure, framing, domain randomisation.

Histogram exchange.
"""

from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

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


_LETTERS = list("ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789")

# A lung mask that covers less of an image than this was not found, or is not of two lungs.
MIN_LUNG_SHARE = 0.08


@dataclass(frozen=True, kw_only=True)
class DomainRandomisation:
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
STRONG_RANDOMISATION = DomainRandomisation(exposure=0.0, tone=1.0, texture=1.0)


def randomise_domain(
    batch: FloatArray,
    lungs: FloatArray | None,
    amount: DomainRandomisation,
    rng: np.random.Generator,
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
        if rng.random() >= probability or lungs[index].mean() < MIN_LUNG_SHARE:
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


_LEVELS = 129


@dataclass(frozen=True, kw_only=True, eq=False)
class Histograms:
    """The grey levels of all training images.

    Attributes
    ----------
    quantiles
        float32 (N, 129), each row rising: from the darkest to the brightest level.
    source
        Numbers of the images' sources, int32 (N,).
    """

    quantiles: FloatArray
    source: NDArray[np.int32]


def read_histograms(pixels: FloatArray, source: NDArray[np.int32]) -> Histograms:
    """Take down the grey levels of images, (N, S, S, 1) in 0..1."""
    parts = np.linspace(0.0, 1.0, _LEVELS)
    rows = [np.quantile(image, parts) for image in pixels]
    return Histograms(quantiles=np.asarray(rows, dtype=np.float32), source=source)


def exchange_histograms(
    batch: FloatArray,
    indices: NDArray[np.intp],
    known: Histograms,
    probability: float,
    rng: np.random.Generator,
) -> FloatArray:
    """Give some images the histogram of a random image of another source, or a part of it.

    Parameters
    ----------
    batch
        float32 (N, S, S, 1), 0..1; not modified.
    indices
        Which of the known images these are, (N,).
    known
        What `read_histograms` took down.
    probability
        How often, 0..1. Half-way to fully, by chance.
    rng
        Source of chance; the same state gives the same images.

    Raises
    ------
    ConfigError
        If there is one source only.
    """
    if not probability:
        return batch
    if (known.source == known.source[0]).all():
        raise ConfigError("histograms can be exchanged between two sources or more; there is one")
    changed = batch.copy()
    for place, index in enumerate(indices):
        if rng.random() >= probability:
            continue
        # Sources in equal shares: the largest one would lend its levels to all others.
        others = np.unique(known.source[known.source != known.source[index]])
        lender = rng.choice(np.flatnonzero(known.source == rng.choice(others)))
        amount = rng.uniform(0.5, 1.0)
        image = batch[place]
        matched = np.interp(image, known.quantiles[index], known.quantiles[lender])
        changed[place] = (1.0 - amount) * image + amount * matched
    return changed
