"""Training images of the content gate: altered X-rays, and pictures that are no chest X-ray.

Only frontal chest X-rays are read. Everything that the gate has to refuse is made from X-rays
(turned, inverted, cut to pieces, one half, collages) or drawn. Pictures of other body parts are
never learnt from, so that a collection of them measures the gate on unknown pictures.

The drawings take a random generator and return float32, shape (h, w), 0..1. None is made after
a particular picture; together they are what a gate has to refuse without having seen it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from lungwatch.preprocess import PreprocessSpec, preprocess
from lungwatch.training.data.pixels import FloatArray

_SIDE = 192
ByteArray = NDArray[np.uint8]
TURNS = 4
# Shares of the kinds in what is learnt from: upright, turned, inverted; the rest shows no chest.
_UPRIGHT, _TURNED, _INVERTED = 0.38, 0.22, 0.10
_BOTH = 0.15  # of the turned ones, also inverted


def noise(rng: np.random.Generator) -> FloatArray:
    """White to cloudy noise: a power law of the spatial frequency."""
    field = rng.standard_normal((_SIDE, _SIDE))
    frequency = np.hypot(np.fft.fftfreq(_SIDE)[:, None], np.fft.rfftfreq(_SIDE)[None, :])
    frequency[0, 0] = 1.0
    shaped = np.fft.irfft2(np.fft.rfft2(field) / frequency ** rng.uniform(0.0, 2.2), (_SIDE, _SIDE))
    return _scaled(shaped)


def gradient(rng: np.random.Generator) -> FloatArray:
    """A ramp, straight or round, with or without steps."""
    y, x = np.mgrid[-1 : 1 : _SIDE * 1j, -1 : 1 : _SIDE * 1j]
    angle = rng.uniform(0, 2 * np.pi)
    ramp = x * np.cos(angle) + y * np.sin(angle)
    if rng.random() < 0.4:
        ramp = np.hypot(x - rng.uniform(-0.5, 0.5), y - rng.uniform(-0.5, 0.5))
    if rng.random() < 0.3:
        ramp = np.floor(ramp * rng.integers(3, 12))
    if rng.random() < 0.3:
        ramp = np.sin(ramp * rng.uniform(4, 60))
    return _scaled(ramp)


def pattern(rng: np.random.Generator) -> FloatArray:
    """Checks, bars and grids, as on test patterns."""
    y, x = np.mgrid[0:_SIDE, 0:_SIDE]
    step = int(rng.integers(4, 48))
    if rng.random() < 0.5:
        picture = ((x // step + y // step) % 2).astype(np.float64)
    else:
        picture = ((x // step) % 2).astype(np.float64)
    steps = np.floor(x / _SIDE * rng.integers(4, 16)) / 16
    return _scaled(picture * rng.uniform(0.3, 1) + steps * rng.uniform(0, 1))


def text_page(rng: np.random.Generator) -> FloatArray:
    """Lines of letters, sometimes with the rules of a table."""
    page = np.full((256, int(rng.integers(160, 320))), 255, np.uint8)
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLM0123456789 .,:%"
    scale = float(rng.uniform(0.25, 1.1))
    for row in range(int(14 * scale) + 6, 256, int(30 * scale) + 4):
        if rng.random() < 0.15:
            continue
        line = "".join(letters[i] for i in rng.integers(0, len(letters), rng.integers(5, 60)))
        cv2.putText(
            page, line, (int(rng.integers(2, 30)), row), int(rng.integers(0, 5)), scale, 0, 1
        )
    if rng.random() < 0.3:
        for position in range(20, 256, int(rng.integers(15, 60))):
            cv2.line(page, (0, position), (page.shape[1], position), 80, 1)
    return page.astype(np.float32) / np.float32(255.0)


def shapes(rng: np.random.Generator) -> FloatArray:
    """Discs and polygons over each other, from large to small, as in photographs."""
    canvas = np.full((_SIDE, _SIDE), rng.random(), np.float32)
    for number in range(int(rng.integers(5, 120))):
        radius = int(rng.uniform(0.03, 0.5) * _SIDE / (1 + number / 15)) + 2
        centre = rng.integers(0, _SIDE, 2)
        value = float(rng.random())
        if rng.random() < 0.5:
            axes = (radius, max(1, int(radius * rng.uniform(0.2, 1))))
            cv2.ellipse(canvas, centre.tolist(), axes, rng.uniform(0, 180), 0, 360, value, -1)
        else:
            corners = centre + rng.integers(-radius, radius + 1, (int(rng.integers(3, 7)), 2))
            cv2.fillPoly(canvas, [corners.astype(np.int32)], value)
    if rng.random() < 0.6:
        canvas = canvas + (noise(rng) - 0.5) * np.float32(rng.uniform(0.05, 0.4))
    return _softened(canvas, rng)


def bones(rng: np.random.Generator) -> FloatArray:
    """Bright shafts in a soft halo on dark ground: limbs, hands, feet, joints."""
    canvas = np.zeros((_SIDE, _SIDE), np.float32)
    tissue = np.zeros_like(canvas)
    spread = rng.random() < 0.4
    heading = rng.uniform(0, np.pi)
    origin = np.array([_SIDE / 2, _SIDE * rng.uniform(0.4, 1.0)])
    for number in range(int(rng.integers(1, 7))):
        angle = heading + (rng.uniform(-0.7, 0.7) if spread else rng.normal(0, 0.08))
        along = np.array([np.cos(angle), np.sin(angle)])
        across = np.array([-along[1], along[0]])
        start = origin + across * rng.uniform(-40, 40) if not spread else origin
        length = rng.uniform(40, 200)
        width = rng.uniform(5, 26 if number < 2 else 12)
        joints = int(rng.integers(1, 5))
        for part in range(joints):
            first = start - along * length * part / joints
            last = start - along * length * (part + 0.9) / joints
            ends = [tuple(int(v) for v in end) for end in (first, last)]
            cv2.line(tissue, ends[0], ends[1], 1.0, int(width * rng.uniform(1.8, 3.2)))
            cv2.line(canvas, ends[0], ends[1], float(rng.uniform(0.6, 1)), int(width))
            # The cortex is brighter than the marrow.
            cv2.line(canvas, ends[0], ends[1], float(rng.uniform(0.3, 0.7)), int(width * 0.55) + 1)
            for end in ends:
                cv2.circle(canvas, end, int(width * rng.uniform(0.5, 0.85)), 0.75, -1)
    soft = cv2.GaussianBlur(tissue, (0, 0), rng.uniform(2, 7)) * rng.uniform(0.15, 0.5)
    hard = cv2.GaussianBlur(canvas, (0, 0), rng.uniform(0.6, 2.5))
    return _scaled(np.maximum(soft, hard) * (1 + 0.3 * (noise(rng) - 0.5)) + rng.uniform(0, 0.1))


def slice_phantom(rng: np.random.Generator) -> FloatArray:
    """A body's cross-section: an oval on black, perhaps with a bright rim, organs, two lungs."""
    canvas = np.zeros((_SIDE, _SIDE), np.float32)
    centre = tuple(int(v) for v in rng.uniform(0.42, 0.58, 2) * _SIDE)
    axes = tuple(int(v) for v in rng.uniform(0.25, 0.49, 2) * _SIDE)
    tilt = float(rng.uniform(-15, 15))
    base = float(rng.uniform(0.25, 0.6))
    cv2.ellipse(canvas, centre, axes, tilt, 0, 360, base, -1)
    body = canvas > 0
    if rng.random() < 0.6:  # a skull, or subcutaneous fat
        cv2.ellipse(
            canvas, centre, axes, tilt, 0, 360, float(rng.uniform(0.5, 1)), int(rng.integers(2, 16))
        )
    if rng.random() < 0.35:
        for side in (-1, 1):
            place = (centre[0] + int(side * axes[0] * rng.uniform(0.4, 0.55)), centre[1])
            lung = (int(axes[0] * rng.uniform(0.25, 0.42)), int(axes[1] * rng.uniform(0.4, 0.75)))
            cv2.ellipse(canvas, place, lung, side * rng.uniform(0, 20), 0, 360, 0.04, -1)
        spine = (centre[0], centre[1] + int(axes[1] * 0.6))
        cv2.circle(canvas, spine, int(rng.uniform(8, 18)), 0.95, -1)
    for _ in range(int(rng.integers(0, 16))):
        place = (np.array(centre) + rng.uniform(-0.7, 0.7, 2) * axes).astype(int).tolist()
        size = tuple(int(v) + 1 for v in rng.uniform(2, 34, 2))
        cv2.ellipse(canvas, place, size, rng.uniform(0, 180), 0, 360, float(rng.random()), -1)
    if rng.random() < 0.3:  # two lobes on a chest wall
        cv2.rectangle(canvas, (0, 0), (_SIDE, centre[1] - axes[1] // 2), 0.0, -1)
    canvas = np.where(body | (canvas > 0.9), canvas, 0.0).astype(np.float32)
    texture = (noise(rng) - 0.5) * np.float32(rng.uniform(0.05, 0.5))
    canvas = np.where(canvas > 0, canvas + texture, rng.uniform(0, 0.08)).astype(np.float32)
    return _softened(canvas, rng)


def trunk_phantom(rng: np.random.Generator) -> FloatArray:
    """A body part without two lungs: abdomen, pelvis, skull, neck as ovals of overlaid shadows."""
    canvas = np.zeros((_SIDE, _SIDE), np.float32)
    for _ in range(int(rng.integers(4, 14))):
        layer = np.zeros_like(canvas)
        place = tuple(int(v) for v in rng.normal(0.5, 0.18, 2) * _SIDE)
        size = tuple(int(v) + 2 for v in rng.uniform(0.05, 0.5, 2) * _SIDE)
        width = -1 if rng.random() < 0.6 else int(rng.integers(2, 12))
        cv2.ellipse(layer, place, size, rng.uniform(0, 180), 0, 360, 1.0, width)
        canvas += cv2.GaussianBlur(layer, (0, 0), rng.uniform(1, 9)) * np.float32(
            rng.normal(0.4, 0.4)
        )
    for _ in range(int(rng.integers(0, 12))):  # a column of vertebrae
        row = int(rng.integers(_SIDE))
        cv2.rectangle(canvas, (_SIDE // 2 - 9, row), (_SIDE // 2 + 9, row + 11), 1.2, 2)
    return _scaled(canvas + (noise(rng) - 0.5) * rng.uniform(0, 0.3))


def _softened(canvas: FloatArray, rng: np.random.Generator) -> FloatArray:
    return _scaled(cv2.GaussianBlur(canvas, (0, 0), rng.uniform(0.3, 3.0)))


def _scaled(values: FloatArray | np.ndarray) -> FloatArray:
    low, high = float(np.min(values)), float(np.max(values))
    return np.asarray((values - low) / max(high - low, 1e-6), dtype=np.float32)


DRAWINGS: tuple[Callable[[np.random.Generator], FloatArray], ...] = (
    noise,
    gradient,
    pattern,
    text_page,
    shapes,
    shapes,
    bones,
    bones,
    slice_phantom,
    slice_phantom,
    trunk_phantom,
)


@dataclass(frozen=True, kw_only=True, eq=False)
class GateXray:
    """An upright frontal chest X-ray at a size that is fast to warp.

    In bytes, so that thousands of them fit into memory.

    Attributes
    ----------
    pixels
        uint8, shape (h, w), 0..255, air dark.
    lungs
        uint8, shape (h, w), 0..255: the lung field; None where nobody drew it.
    """

    pixels: ByteArray
    lungs: ByteArray | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class GateBatch:
    """Pictures and the answers that the gate should give.

    Attributes
    ----------
    pixels
        float32, shape (N, S, S, 1), 0..1, preprocessed.
    frontal
        float32, shape (N, 1): 1 for a frontal chest X-ray, however it is turned.
    turn
        float32, shape (N, 4): one-hot; quarter turns anticlockwise that were made.
    inverted
        float32, shape (N, 1): 1 for inverted grey values.
    is_chest
        float32, shape (N,): where `turn` and `inverted` mean something.
    lungs
        float32, shape (N, M, M, 1): share of each cell that is lung.
    has_lungs
        float32, shape (N,): where `lungs` is known.
    """

    pixels: FloatArray
    frontal: FloatArray
    turn: FloatArray
    inverted: FloatArray
    is_chest: FloatArray
    lungs: FloatArray
    has_lungs: FloatArray


def draw_batch(
    xrays: Sequence[GateXray],
    count: int,
    spec: PreprocessSpec,
    lungs_side_px: int,
    rng: np.random.Generator,
) -> GateBatch:
    """Make `count` training pictures from X-rays drawn at random."""
    size, side = spec.size_px, lungs_side_px
    batch = GateBatch(
        pixels=np.empty((count, size, size, 1), np.float32),
        frontal=np.zeros((count, 1), np.float32),
        turn=np.zeros((count, TURNS), np.float32),
        inverted=np.zeros((count, 1), np.float32),
        is_chest=np.zeros(count, np.float32),
        lungs=np.zeros((count, side, side, 1), np.float32),
        has_lungs=np.ones(count, np.float32),
    )
    for index in range(count):
        kind = rng.random()
        if kind >= _UPRIGHT + _TURNED + _INVERTED:
            picture = exposed(no_chest(xrays, rng), rng)
            batch.pixels[index] = preprocess(picture, spec)
            batch.turn[index, 0] = 1.0
            continue
        xray = xrays[int(rng.integers(len(xrays)))]
        pixels, lungs = moved(xray, rng)
        turn = int(rng.integers(1, TURNS)) if _UPRIGHT <= kind < _UPRIGHT + _TURNED else 0
        inverted = kind >= _UPRIGHT + _TURNED or (turn > 0 and rng.random() < _BOTH)
        pixels = exposed(_clouded(pixels, lungs, rng), rng)
        pixels = np.rot90(1.0 - pixels if inverted else pixels, turn)
        batch.pixels[index] = preprocess(np.ascontiguousarray(pixels), spec)
        batch.frontal[index] = batch.is_chest[index] = 1.0
        batch.turn[index, turn] = 1.0
        batch.inverted[index] = inverted
        if lungs is None:
            batch.has_lungs[index] = 0.0
        else:
            field = np.ascontiguousarray(np.rot90(lungs, turn))
            batch.lungs[index, :, :, 0] = cv2.resize(
                field, (side, side), interpolation=cv2.INTER_AREA
            )
    return batch


def moved(xray: GateXray, rng: np.random.Generator) -> tuple[FloatArray, FloatArray | None]:
    """Change position, scale, aspect and a little of the angle, as patients and crops differ."""
    whole, field = _floats(xray.pixels), None if xray.lungs is None else _floats(xray.lungs)
    height, width = whole.shape
    centre = ((width - 1) / 2.0, (height - 1) / 2.0)
    turn, scale = rng.normal(0.0, 5.0), rng.uniform(0.82, 1.18)
    matrix = np.asarray(cv2.getRotationMatrix2D(centre, turn, scale), dtype=np.float64)
    matrix[0, :2] *= rng.uniform(0.88, 1.12)
    matrix[0, 2] += rng.uniform(-0.06, 0.06) * width
    matrix[1, 2] += rng.uniform(-0.06, 0.06) * height
    outside = cv2.BORDER_CONSTANT if rng.random() < 0.7 else cv2.BORDER_REPLICATE
    pixels = cv2.warpAffine(
        whole, matrix, (width, height), borderMode=outside, flags=cv2.INTER_LINEAR
    )
    lungs = None if field is None else cv2.warpAffine(field, matrix, (width, height))
    # A mirrored X-ray is as frontal as any; who sees it by its heart is not the gate.
    if rng.random() < 0.15:
        pixels = np.ascontiguousarray(pixels[:, ::-1])
        lungs = None if lungs is None else np.ascontiguousarray(lungs[:, ::-1])
    return np.asarray(pixels, np.float32), None if lungs is None else np.asarray(lungs, np.float32)


def exposed(pixels: FloatArray, rng: np.random.Generator) -> FloatArray:
    """Change exposure, window, sharpness, noise and compression; sometimes burn marks in."""
    grey: NDArray[Any] = np.clip(pixels, 0.0, 1.0) ** np.float32(np.exp(rng.normal(0.0, 0.35)))
    if rng.random() < 0.5:
        low, high = np.percentile(grey, (rng.uniform(0, 8), rng.uniform(92, 100)))
        grey = np.clip((grey - low) / max(high - low, 1e-3), 0.0, 1.0)
    if rng.random() < 0.2:
        equaliser = cv2.createCLAHE(rng.uniform(1.0, 4.0), (8, 8))
        grey = equaliser.apply((grey * 255).astype(np.uint8)).astype(np.float32) / 255.0
    if rng.random() < 0.3:
        grey = cv2.GaussianBlur(grey, (0, 0), rng.uniform(0.5, 2.5))
    elif rng.random() < 0.2:
        soft = cv2.GaussianBlur(grey, (0, 0), 3.0)
        grey = np.clip(grey + rng.uniform(0.5, 2.0) * (grey - soft), 0.0, 1.0)
    if rng.random() < 0.25:
        height, width = grey.shape
        share = rng.uniform(0.2, 0.6)
        small = cv2.resize(
            grey, (int(width * share), int(height * share)), interpolation=cv2.INTER_AREA
        )
        grey = cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)
    if rng.random() < 0.25:
        noise = rng.standard_normal(grey.shape, dtype=np.float32)
        grey = grey + np.float32(rng.uniform(0.01, 0.06)) * noise
    grey = np.clip(grey, 0.0, 1.0).astype(np.float32)
    if rng.random() < 0.2:
        grey = _marked(grey, rng)
    if rng.random() < 0.15:
        grey = _framed(grey, rng)
    if rng.random() < 0.3:
        quality = [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(12, 70))]
        _, data = cv2.imencode(".jpg", (grey * 255).astype(np.uint8), quality)
        grey = _floats(np.asarray(cv2.imdecode(data, cv2.IMREAD_GRAYSCALE), np.uint8))
    return np.ascontiguousarray(grey, dtype=np.float32)


def _clouded(pixels: FloatArray, lungs: FloatArray | None, rng: np.random.Generator) -> FloatArray:
    """Whiten parts of the lungs: a severely ill chest is still a chest."""
    if rng.random() > 0.25:
        return pixels
    height, width = pixels.shape
    cloud: NDArray[Any] = np.zeros((height, width), np.float32)
    for _ in range(int(rng.integers(1, 5))):
        centre = (int(rng.uniform(0.15, 0.85) * width), int(rng.uniform(0.2, 0.8) * height))
        axes = (int(rng.uniform(0.06, 0.25) * width), int(rng.uniform(0.08, 0.35) * height))
        cv2.ellipse(cloud, centre, axes, rng.uniform(0, 180), 0, 360, 1.0, -1)
    cloud = cv2.GaussianBlur(cloud, (0, 0), 0.05 * width)
    if lungs is not None:
        cloud = cloud * cv2.GaussianBlur(lungs, (0, 0), 0.02 * width)
    body = float(np.percentile(pixels, rng.uniform(55, 85)))
    strength = cloud * np.float32(rng.uniform(0.3, 0.95))
    return np.asarray(pixels * (1 - strength) + body * strength, dtype=np.float32)


def _marked(grey: FloatArray, rng: np.random.Generator) -> FloatArray:
    height, width = grey.shape
    page = (np.clip(grey, 0.0, 1.0) * 255.0).astype(np.uint8)
    words = ("R", "L", "PORTABLE", "AP", "SUPINE", "12:04", "PA ERECT", "ICU")
    for _ in range(int(rng.integers(1, 3))):
        text = words[int(rng.integers(len(words)))]
        place = (int(rng.uniform(0, 0.85) * width), int(rng.uniform(0.06, 1.0) * height))
        cv2.putText(
            page,
            text,
            place,
            cv2.FONT_HERSHEY_SIMPLEX,
            float(rng.uniform(0.3, 1.0)) * width / 256,
            255,
            int(rng.integers(1, 3)),
        )
    return page.astype(np.float32) / np.float32(255.0)


def _framed(grey: FloatArray, rng: np.random.Generator) -> FloatArray:
    height, width = grey.shape
    top, bottom = (rng.uniform(0, 0.1, 2) * height).astype(int)
    left, right = (rng.uniform(0, 0.1, 2) * width).astype(int)
    value = 0.0 if rng.random() < 0.75 else 1.0
    return np.asarray(
        cv2.copyMakeBorder(grey, top, bottom, left, right, cv2.BORDER_CONSTANT, value=value)
    )


def no_chest(xrays: Sequence[GateXray], rng: np.random.Generator) -> FloatArray:
    """Draw a picture that is none of a chest, or cut X-rays until they show none."""
    if rng.random() < 0.5:
        make = DRAWINGS[int(rng.integers(len(DRAWINGS)))]
        picture = make(rng)
    else:
        make_of = _SCRAPS[int(rng.integers(len(_SCRAPS)))]
        picture = make_of(xrays, rng)
    picture = picture if rng.random() < 0.7 else 1.0 - picture
    if rng.random() < 0.3:
        picture = np.rot90(picture, int(rng.integers(1, TURNS)))
    return np.ascontiguousarray(picture, dtype=np.float32)


def _any(xrays: Sequence[GateXray], rng: np.random.Generator) -> FloatArray:
    return _floats(xrays[int(rng.integers(len(xrays)))].pixels)


def _floats(grey: ByteArray) -> FloatArray:
    return grey.astype(np.float32) / np.float32(255.0)


def _patch(xrays: Sequence[GateXray], rng: np.random.Generator) -> FloatArray:
    """A piece of an X-ray: bones, soft tissue, a corner of a lung."""
    pixels = _any(xrays, rng)
    height, width = pixels.shape
    rows = int(rng.uniform(0.15, 0.42) * height)
    columns = int(rng.uniform(0.15, 0.42) * width)
    top, left = rng.integers(height - rows), rng.integers(width - columns)
    piece = pixels[top : top + rows, left : left + columns]
    return np.asarray(cv2.resize(piece, (192, 192), interpolation=cv2.INTER_CUBIC))


def _half(xrays: Sequence[GateXray], rng: np.random.Generator) -> FloatArray:
    """One side of a chest: a single lung beside a spine, as a lateral view has it."""
    pixels = _any(xrays, rng)
    width = pixels.shape[1]
    cut = int(rng.uniform(0.4, 0.52) * width)
    side = pixels[:, :cut] if rng.random() < 0.5 else pixels[:, width - cut :]
    if rng.random() < 0.5:  # both halves over each other, as a ray from the side sees them
        other = pixels[:, width - cut :][:, ::-1]
        side = 0.5 * (pixels[:, :cut] + other)
    return np.asarray(cv2.resize(np.ascontiguousarray(side), (192, 208)))


def _band(xrays: Sequence[GateXray], rng: np.random.Generator) -> FloatArray:
    """The top or the bottom of an X-ray: shoulders and neck, or the abdomen."""
    pixels = _any(xrays, rng)
    height = pixels.shape[0]
    cut = int(rng.uniform(0.15, 0.3) * height)
    band = pixels[:cut] if rng.random() < 0.5 else pixels[height - cut :]
    return np.asarray(cv2.resize(np.ascontiguousarray(band), (192, 160)))


def _jigsaw(xrays: Sequence[GateXray], rng: np.random.Generator) -> FloatArray:
    pieces = int(rng.integers(2, 5))
    side = 192 // pieces
    square = cv2.resize(_any(xrays, rng), (side * pieces, side * pieces))
    tiles = [
        square[r : r + side, c : c + side]
        for r in range(0, side * pieces, side)
        for c in range(0, side * pieces, side)
    ]
    order = rng.permutation(len(tiles))
    while (order == np.arange(len(tiles))).mean() > 0.5:
        order = rng.permutation(len(tiles))
    rows = [np.hstack([tiles[order[r * pieces + c]] for c in range(pieces)]) for r in range(pieces)]
    return np.asarray(np.vstack(rows), np.float32)


def _collage(xrays: Sequence[GateXray], rng: np.random.Generator) -> FloatArray:
    """A contact sheet of several X-rays, or one that is small in a large page."""
    if rng.random() < 0.5:
        across, down = ((2, 1), (2, 2), (3, 2), (3, 3), (1, 2))[int(rng.integers(5))]
        rows = [
            np.hstack([cv2.resize(_any(xrays, rng), (96, 112)) for _ in range(across)])
            for _ in range(down)
        ]
        return np.asarray(np.vstack(rows), np.float32)
    page = np.full((224, 224), rng.choice([0.0, 0.15, 1.0]), np.float32)
    side = int(rng.uniform(40, 84))
    top, left = rng.integers(0, 224 - side, 2)
    page[top : top + side, left : left + side] = cv2.resize(_any(xrays, rng), (side, side))
    return page


def _bent(xrays: Sequence[GateXray], rng: np.random.Generator) -> FloatArray:
    """An X-ray bent out of shape until no anatomy is left."""
    pixels = cv2.resize(_any(xrays, rng), (192, 192))
    steps = int(rng.integers(4, 8))
    shifts = [
        cv2.resize(
            rng.normal(0.0, rng.uniform(22, 45), (steps, steps)).astype(np.float32),
            (192, 192),
            interpolation=cv2.INTER_CUBIC,
        )
        for _ in range(2)
    ]
    y, x = np.mgrid[0:192, 0:192].astype(np.float32)
    bent = cv2.remap(
        pixels, x + shifts[0], y + shifts[1], cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT
    )
    return np.asarray(bent, np.float32)


def _squeezed(xrays: Sequence[GateXray], rng: np.random.Generator) -> FloatArray:
    """Two X-rays laid over each other, one of them turned."""
    first = cv2.resize(_any(xrays, rng), (192, 192))
    second = cv2.resize(_any(xrays, rng), (192, 192))
    mixed = 0.5 * first + 0.5 * np.rot90(second, int(rng.integers(1, TURNS)))
    return np.asarray(mixed, np.float32)


_Scrap = Callable[[Sequence[GateXray], np.random.Generator], FloatArray]

_SCRAPS: tuple[_Scrap, ...] = (
    _patch,
    _patch,
    _half,
    _half,
    _half,
    _band,
    _band,
    _jigsaw,
    _collage,
    _bent,
    _squeezed,
)
