"""Augmentation of X-rays (exposure, framing, domain randomisation, histograms) and lung fields."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType

import cv2
import numpy as np
from numpy.typing import NDArray

from lungwatch.errors import ConfigError
from lungwatch.training.data.pixels import FloatArray, Tensor


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Limits of the random changes to an image; each amount is drawn uniformly, both ways.

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
    """Change every image of a batch independently.

    Parameters
    ----------
    batch
        float32, shape (N, S, S, 1), 0..1; not modified.
    augmentation
        The limits.

    Returns
    -------
    numpy.ndarray
        float32, shape (N, S, S, 1), 0..1. What moves in from outside repeats the edge, so
        that no black wedge shows the network how an image was turned.
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
    """Limits of the random frame; each amount is drawn uniformly, both ways.

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
    """Reframe every image of a batch, and its lungs with it.

    Parameters
    ----------
    batch
        float32, shape (N, S, S, 1), 0..1; not modified.
    lungs
        float32, shape (N, S, S), 0..1; zeros where they are not known.
    framing
        The limits.

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
    """Probability of each group of random changes, 0..1.

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
                raise ConfigError(f"domain randomisation: {name} must lie within 0..1")


# What hides most of a source, but also much of what faint opacities look like.
STRONG_RANDOMISATION = DomainRandomisation(exposure=0.0, tone=1.0, texture=1.0)


def randomise_domain(
    batch: FloatArray,
    lungs: FloatArray | None,
    amount: DomainRandomisation,
    rng: np.random.Generator,
) -> FloatArray:
    """Randomise exposure, tone, texture, marks and surroundings of every image of a batch.

    Parameters
    ----------
    batch
        float32, shape (N, S, S, 1), 0..1; not modified.
    lungs
        float32, shape (N, S, S), 0..1: what of each image is lung. None leaves the
        surroundings as they are.
    amount
        How often.

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
    """Histograms of all training images.

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
    """Read the cumulated histograms of images, (N, S, S, 1) in 0..1."""
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


OUTSIDE = 0.5
"""Grey value of what is no lung, and of the lungs' mean."""
DEVIATIONS = 4.0
"""Standard deviations from black to white."""
_SOFTENING_PX = 1.2  # standard deviation of the Gaussian over the mask, of a view of any size
_LEAST_VARIANCE = 1e-6  # what is uniform becomes mid-grey instead of noise


def soft_lungs(lungs: FloatArray) -> FloatArray:
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


def standardised(pixels: FloatArray, soft: FloatArray) -> FloatArray:
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


def on_grey(values: FloatArray, soft: FloatArray) -> FloatArray:
    """Fill the outside of the lungs with mid-grey."""
    return np.asarray(_on_grey(values, soft), np.float32)


def view(pixels: FloatArray, lungs: FloatArray) -> FloatArray:
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
def _gaussian() -> FloatArray:
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
    """Read a ready lung field, which is black outside the lungs.

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
    """Return a field as it is, float32 (S, S), 0..1: its box stretched to the square."""
    return view(*_warped(field, _stretch(field, size_px), size_px))


def draw_view(field: LungField, size_px: int, rng: np.random.Generator) -> FloatArray:
    """Draw an augmented picture of a field.

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
) -> tuple[FloatArray, FloatArray]:
    """Draw a batch with a given number of pictures of each group.

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
    """Divide a batch equally among the groups of a kind.

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
