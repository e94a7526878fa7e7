"""The picture for people: the X-ray in grey, the map over it, a margin of facts."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from lungwatch import RESEARCH_USE_ONLY
from lungwatch.contract import Label
from lungwatch.imaging.radiograph import FloatImage

Rgb = NDArray[np.uint8]

ALPHA = 0.4
# Below this the map fades out, so that grey stays grey where the map says nothing.
_FADE_BELOW = 0.25
_MIN_SIDE_PX = 512
_MIN_WIDTH_PX = 460
_MARGIN_PX = 16
_BAR_WIDTH_PX = 18
_BAR_PANEL_PX = 76
_BACKGROUND = (18, 18, 22)
_TEXT = (235, 235, 235)
_FAINT = (170, 170, 175)
_WARNING = (255, 196, 84)
# Perceptually ordered and readable with colour-blind eyes (Nuñez et al. 2018 for the family).
_COLOURS = cv2.COLORMAP_INFERNO


@dataclass(frozen=True, kw_only=True)
class OverlayText:
    """What the margin says.

    Attributes
    ----------
    label
        The decision.
    probability, threshold
        Calibrated probability of COVID and where the decision turns, 0..1.
    model
        Identity of the model.
    sha256
        Of the file's content; its first 12 digits are shown.
    note
        The line that nobody may miss.
    """

    label: Label
    probability: float
    threshold: float
    model: str
    sha256: str
    note: str = RESEARCH_USE_ONLY


def shown_class(label: Label) -> int:
    """Return which of the two maps explains a label: 0 for NORMAL, else 1 for COVID."""
    return 0 if label == "NORMAL" else 1


def make_preview(pixels: FloatImage, max_side_px: int = 1024) -> NDArray[np.uint8]:
    """Reduce a radiograph to the size at which people look at it.

    Parameters
    ----------
    pixels
        float32, shape (H, W), 0..1.
    max_side_px
        Longest side of the result. Small images are enlarged to 512, at most twofold.

    Returns
    -------
    numpy.ndarray
        uint8, shape (h, w), same aspect ratio.
    """
    rows, columns = pixels.shape
    longest = max(rows, columns)
    wanted = min(max_side_px, max(longest, min(_MIN_SIDE_PX, 2 * longest)))
    scale = wanted / longest
    size = (max(1, round(columns * scale)), max(1, round(rows * scale)))
    how = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    resized = cv2.resize(pixels, size, interpolation=how)
    return np.asarray(np.clip(np.rint(resized * 255.0), 0, 255), dtype=np.uint8)


def render_overlay(
    *, preview: NDArray[np.uint8], cam: NDArray[np.float32], text: OverlayText
) -> Rgb:
    """Lay the map over the X-ray and write the facts beside it, never on it.

    Parameters
    ----------
    preview
        uint8, shape (h, w), air dark.
    cam
        float32, shape (any, any), 0..1: the map of `shown_class(text.label)`, over exactly
        the area that `preview` shows.

    Returns
    -------
    numpy.ndarray
        uint8, shape (H, W, 3), RGB; the X-ray keeps its size within it.

    Raises
    ------
    ValueError
        If the map holds anything but numbers.
    """
    if not np.isfinite(cam).all():
        raise ValueError("the class activation map holds values that are not finite")
    height, width = preview.shape
    lines = _lines(text, has_map=bool(cam.any()))
    canvas_width = max(width + _BAR_PANEL_PX, _MIN_WIDTH_PX)
    sizes = [_fit(line, size, canvas_width - 2 * _MARGIN_PX) for line, size, _ in lines]
    text_height = sum(size + 8 for size in sizes) + 2 * _MARGIN_PX - 8
    image_height = max(height, 160)
    canvas: Rgb = np.empty((image_height + text_height, canvas_width, 3), dtype=np.uint8)
    canvas[:] = _BACKGROUND
    left = (canvas_width - _BAR_PANEL_PX - width) // 2
    canvas[:height, left : left + width] = blend(preview, cam)
    bar_left = canvas_width - _BAR_PANEL_PX + _MARGIN_PX
    bar_top, bar_bottom = 24, min(image_height, 400) - 16
    canvas[bar_top:bar_bottom, bar_left : bar_left + _BAR_WIDTH_PX] = _colour_bar(
        bar_bottom - bar_top
    )

    picture = Image.fromarray(canvas)
    draw = ImageDraw.Draw(picture)
    for value in (0.0, 0.5, 1.0):
        y = bar_bottom - value * (bar_bottom - bar_top - 1) - 7
        place = (bar_left + _BAR_WIDTH_PX + 6, y)
        draw.text(place, f"{value:.1f}", font=_font(13), fill=_TEXT)
    y = float(image_height + _MARGIN_PX)
    for (line, _, colour), size in zip(lines, sizes, strict=True):
        draw.text((_MARGIN_PX, y), line, font=_font(size), fill=colour)
        y += size + 8
    return np.asarray(picture)


def blend(preview: NDArray[np.uint8], cam: NDArray[np.float32]) -> Rgb:
    """Mix the X-ray's grey with the map's colours at `ALPHA`; grey where the map is 0."""
    height, width = preview.shape
    spread = cv2.resize(cam, (width, height), interpolation=cv2.INTER_LINEAR)
    levels = np.rint(np.clip(spread, 0.0, 1.0) * 255.0).astype(np.uint8)
    colours = cv2.applyColorMap(levels, _COLOURS)[:, :, ::-1].astype(np.float32)
    alpha = (_alphas()[levels])[:, :, np.newaxis]
    grey = preview[:, :, np.newaxis].astype(np.float32)
    return np.asarray(np.rint(grey + alpha * (colours - grey)), dtype=np.uint8)


def encode_png(image: Rgb) -> bytes:
    """Return an RGB picture as PNG; compressed lightly, since it is written once a case."""
    _, data = cv2.imencode(
        ".png", np.ascontiguousarray(image[:, :, ::-1]), [cv2.IMWRITE_PNG_COMPRESSION, 2]
    )
    return data.tobytes()


def format_probability(probability: float) -> str:
    """Return a probability with three digits, never rounded to a certainty."""
    if probability > 0.999:
        return ">0.999"
    return "<0.001" if probability < 0.001 else f"{probability:.3f}"


def _lines(text: OverlayText, *, has_map: bool) -> list[tuple[str, int, tuple[int, int, int]]]:
    explained = "NORMAL" if shown_class(text.label) == 0 else "COVID"
    map_line = f"Colours: Grad-CAM for {explained}, scaled to its own maximum"
    if not has_map:
        map_line = f"No colours: no part of the image speaks for {explained}"
    return [
        (f"{text.label}   P(COVID) {format_probability(text.probability)}", 24, _TEXT),
        (text.note, 18, _WARNING),
        (map_line, 14, _FAINT),
        (
            f"Threshold {text.threshold:.3f}   model {text.model}   image {text.sha256[:12]}",
            14,
            _FAINT,
        ),
    ]


def _fit(line: str, size: int, width: int) -> int:
    """Return the largest font size, at most `size`, at which a line fits."""
    while size > 8 and _font(size).getlength(line) > width:
        size -= 1
    return size


@lru_cache(maxsize=32)
def _font(size: int) -> Any:  # noqa: ANN401  # Pillow's type depends on its build
    return ImageFont.load_default(size=size)


@lru_cache(maxsize=1)
def _alphas() -> NDArray[np.float32]:
    values = np.arange(256, dtype=np.float32) / 255.0
    return np.asarray(ALPHA * np.clip(values / _FADE_BELOW, 0.0, 1.0), dtype=np.float32)


def _colour_bar(height: int) -> Rgb:
    """The scale as it looks over middle grey, 1 at the top."""
    levels = np.linspace(1.0, 0.0, height, dtype=np.float32)[:, np.newaxis]
    column = np.repeat(levels, _BAR_WIDTH_PX, axis=1)
    return blend(np.full(column.shape, 128, dtype=np.uint8), column)
