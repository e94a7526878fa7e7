"""Drawn pictures that are no chest X-ray: noise, text, shapes, phantoms of bones and slices.

Each function takes a random generator and returns float32, shape (h, w), 0..1. None is made after
a particular picture; together they are what a gate has to refuse without having seen it.
"""

from collections.abc import Callable

import cv2
import numpy as np

from lungwatch.training.pixels import FloatArray

_SIDE = 192


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
    """Lines of letters, with a table's rules now and then."""
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
    """Discs and polygons over each other, from large to small: how photographs are made up."""
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
