"""Overlay rendering: preview, colour map, blending, margins and PNG encoding."""

import zlib
from functools import lru_cache

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from lungwatch.daemon.overlay.layout import Gauge, OverlayLayout, Rectangle, font, lay_out
from lungwatch.daemon.overlay.text import MapState, OverlayText
from lungwatch.imaging.radiograph import FloatImage
from lungwatch.imaging.reader import OVERLAY_MARGIN, OVERLAY_MARK

# Small pictures are enlarged towards this, to be readable on a screen; further than
# twofold, interpolation would pretend to a sharpness that the file does not have.
_READABLE_SIDE_PX = 512
_MAX_ENLARGEMENT = 2.0


def make_preview(pixels: FloatImage, max_side_px: int = 1024) -> NDArray[np.uint8]:
    """Scale a radiograph to a readable size, keeping its aspect ratio.

    Parameters
    ----------
    pixels
        float32, shape (H, W), 0..1, air dark.
    max_side_px
        Longest side of the result; larger pictures are shrunk to it by area averaging.

    Returns
    -------
    numpy.ndarray
        uint8, shape (h, w). A picture smaller than 512 pixels is enlarged to that, but no
        more than twofold and not beyond `max_side_px`.
    """
    rows, columns = pixels.shape
    longest = max(rows, columns)
    readable = min(_MAX_ENLARGEMENT, _READABLE_SIDE_PX / longest)
    scale = min(max(1.0, readable), max_side_px / longest)
    height, width = max(1, round(rows * scale)), max(1, round(columns * scale))
    if scale < 1.0:
        pixels = _resize(pixels, height, width, cv2.INTER_AREA)
    elif scale > 1.0:
        pixels = _resize(pixels, height, width, cv2.INTER_CUBIC)
    # Rounds and saturates, and so takes the overshoot of cubic interpolation with it.
    return np.asarray(cv2.convertScaleAbs(np.maximum(pixels, 0.0), alpha=255.0), dtype=np.uint8)


def _resize(pixels: FloatImage, height: int, width: int, how: int) -> FloatImage:
    return np.asarray(cv2.resize(pixels, (width, height), interpolation=how), dtype=np.float32)


# Below this value the colour fades out, so that the X-ray stays untouched where the map is 0.
_FADE_BELOW = 0.25


@lru_cache(maxsize=1)
def colours() -> NDArray[np.uint8]:
    """Return the scale from 0 to 1 in 256 steps, uint8 RGB, shape (256, 3)."""
    ramp = np.arange(256, dtype=np.uint8)[:, np.newaxis]
    table = cv2.applyColorMap(ramp, cv2.COLORMAP_VIRIDIS)[:, 0, ::-1]
    return np.ascontiguousarray(table, dtype=np.uint8)


def opacity(alpha: float) -> NDArray[np.float32]:
    """Return the opacity for each of the 256 steps, float32: 0 at 0, `alpha` from 0.25 on."""
    steps = np.arange(256, dtype=np.float32) / np.float32(255)
    return np.asarray(alpha * np.minimum(steps / _FADE_BELOW, 1.0), dtype=np.float32)


@lru_cache(maxsize=4)
def _blend_table(alpha: float) -> NDArray[np.uint32]:
    """Every (value, grey) pair's colour, RGB packed in 4 bytes, at index value * 256 + grey."""
    share = opacity(alpha)[:, np.newaxis, np.newaxis]
    grey = np.arange(256, dtype=np.float32)[np.newaxis, :, np.newaxis]
    blended = grey * (1 - share) + colours().astype(np.float32)[:, np.newaxis, :] * share
    packed = np.zeros((256, 256, 4), dtype=np.uint8)
    packed[:, :, :3] = np.rint(blended)
    return packed.view(np.uint32).reshape(-1)


def blend(grey: NDArray[np.uint8], values: NDArray[np.float32], alpha: float) -> NDArray[np.uint8]:
    """Blend a map over a grey image.

    Parameters
    ----------
    grey
        uint8, shape (h, w).
    values
        float32, shape (h, w), 0..1.
    alpha
        Largest opacity of the colour, 0..1.

    Returns
    -------
    numpy.ndarray
        uint8 RGB, shape (h, w, 3); the grey itself wherever the value is 0.
    """
    # One look-up of four bytes is several times as fast as blending three planes.
    index = cv2.convertScaleAbs(values, alpha=255.0).astype(np.uint16) << 8 | grey
    packed = np.take(_blend_table(alpha), index)
    return np.ascontiguousarray(packed.view(np.uint8).reshape(*grey.shape, 4)[:, :, :3])


_BACKGROUND = OVERLAY_MARGIN
_TICK = (255, 255, 255)
# The bar shows its colours as the image does: over bright parts above, over dark ones below.
_BAR_GREYS = (230, 50)
# Level 6, zlib's own choice, takes four times as long to save a sixth of the bytes.
_PNG_LEVEL = 1
_PNG_HEAD = 8 + 25
# Error of a quantised graph at 0 and 1; smaller than one shade of colour.
_CAM_TOLERANCE = 1e-3


def render_overlay(
    *,
    preview: NDArray[np.uint8],
    cam: NDArray[np.float32] | None,
    text: OverlayText,
    alpha: float = 0.4,
    side_by_side: bool = True,
) -> NDArray[np.uint8]:
    """Draw an overlay: the map over the X-ray, and the result in the margins.

    Parameters
    ----------
    preview
        uint8, shape (h, w): the X-ray, air dark.
    cam
        float32, shape (ch, cw), 0..1: the map for `text.mapped` over the whole X-ray and nothing
        else. Its pixels are areas: the first one's centre lies half a map pixel from the edge.
        None where that is None, and nowhere else.
    text
        Contents of the margins.
    alpha
        Opacity of the map, 0..1; it fades out towards values of 0.
    side_by_side
        Whether the untouched X-ray lies to the left of the one under the map. Both are shrunk to
        three quarters then, but not below 512 pixels; without a map there is one, not shrunk.

    Returns
    -------
    numpy.ndarray
        uint8 RGB, shape (H, W, 3). Nothing but the map covers the X-ray.

    Raises
    ------
    ValueError
        If the preview or the map has another shape, the map holds values that are not finite or
        not within 0..1, or there is one where the text speaks of none or the reverse.
    """
    if preview.ndim != 2 or preview.size == 0 or preview.dtype != np.uint8:
        raise ValueError(f"preview is {preview.dtype} {preview.shape}, not uint8 (h, w)")
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha is {alpha}, not within 0..1")
    if (cam is None) != (text.mapped is None):
        raise ValueError("a map is given where the text has none (NEGATIVE), or the reverse")
    state = _state(cam)
    shape = preview.shape[0], preview.shape[1]
    plan = lay_out(shape, text, state=state, side_by_side=side_by_side)
    canvas = _draw_margins(plan)
    if plan.bar is not None:
        canvas[plan.bar.slices] = _draw_bar(plan.bar, alpha)
    panel = _shrunk(preview, plan.panels[0])
    bare = list(plan.panels)
    if cam is not None and state == "drawn":
        box = bare.pop()
        canvas[box.slices] = blend(panel, upsample(cam, box.height, box.width), alpha)
    for box in bare:
        canvas[box.slices] = cv2.cvtColor(panel, cv2.COLOR_GRAY2RGB)
    return canvas


def on_common_scale(cam: NDArray[np.float32], peak: float, reference: float) -> NDArray[np.float32]:
    """Put a map that was scaled by its own maximum on the scale of all images of its model.

    Parameters
    ----------
    cam
        float32, shape (ch, cw), 0..1.
    peak
        The map's largest value before it was scaled, not negative.
    reference
        Evidence that is drawn with the full colour, in the same units, above 0; more than that
        is drawn the same.

    Returns
    -------
    numpy.ndarray
        float32, shape (ch, cw), 0..1.
    """
    return cam * np.float32(min(1.0, peak / reference))


def upsample(cam: NDArray[np.float32], height: int, width: int) -> NDArray[np.float32]:
    """Enlarge a map bilinearly, pixel centres aligned; no value leaves the map's own range.

    Parameters
    ----------
    cam
        float32, shape (ch, cw).
    height, width
        Of the result, in pixels.
    """
    # Cubic interpolation looks smoother and invents evidence: its overshoot widens every
    # peak and colours pixels between cells that are all 0.
    enlarged = cv2.resize(cam, (width, height), interpolation=cv2.INTER_LINEAR)
    return np.asarray(enlarged, dtype=np.float32)


def encode_png(image: NDArray[np.uint8]) -> bytes:
    """Return an RGB picture, uint8 (H, W, 3), as the bytes of a PNG file.

    A chunk says who drew it, so that the reader knows an overlay that is dropped again.
    """
    settings = [cv2.IMWRITE_PNG_COMPRESSION, _PNG_LEVEL]
    done, data = cv2.imencode(".png", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), settings)
    if not done:
        raise ValueError(f"a picture of shape {image.shape} cannot be encoded")
    encoded = data.tobytes()
    chunk = b"tEXt" + OVERLAY_MARK
    length, checksum = len(OVERLAY_MARK).to_bytes(4), zlib.crc32(chunk).to_bytes(4)
    # Behind the signature and IHDR, whose lengths are fixed.
    return encoded[:_PNG_HEAD] + length + chunk + checksum + encoded[_PNG_HEAD:]


def _state(cam: NDArray[np.float32] | None) -> MapState:
    if cam is None:
        return "none"
    if cam.ndim != 2 or cam.size == 0:
        raise ValueError(f"the map's shape is {cam.shape}, not (rows, columns)")
    low, high = float(cam.min()), float(cam.max())
    # Written so that NaN, for which every comparison is false, is refused as well.
    if not (low >= -_CAM_TOLERANCE and high <= 1.0 + _CAM_TOLERANCE):
        raise ValueError(f"the map holds {low}..{high}, not values within 0..1")
    return "drawn" if high > 0.0 else "empty"


def _shrunk(preview: NDArray[np.uint8], box: Rectangle) -> NDArray[np.uint8]:
    if preview.shape == (box.height, box.width):
        return preview
    smaller = cv2.resize(preview, (box.width, box.height), interpolation=cv2.INTER_AREA)
    return np.asarray(smaller, dtype=np.uint8)


def _draw_margins(plan: OverlayLayout) -> NDArray[np.uint8]:
    picture = Image.new("RGB", (plan.width, plan.height), _BACKGROUND)
    draw = ImageDraw.Draw(picture)
    for line in plan.texts:
        draw.text((line.left, line.top), line.text, font=font(line.size_px), fill=line.colour)
    for patch in (*plan.gauge.zones, *plan.keys):
        box = patch.box
        draw.rectangle((box.left, box.top, box.right - 1, box.bottom - 1), fill=patch.colour)
    _draw_gauge(draw, plan.gauge)
    if plan.bar is not None:
        below = plan.bar.bottom
        for column in plan.ticks:
            draw.line((column, below, column, below + plan.bar.height // 4), fill=_TICK)
    return np.array(picture, dtype=np.uint8)


def _draw_gauge(draw: ImageDraw.ImageDraw, gauge: Gauge) -> None:
    box = gauge.box
    reach = max(2, box.height // 2)
    # Dark beside white, so that both are seen on every zone.
    draw.rectangle(
        (gauge.threshold - 1, box.top, gauge.threshold + 1, box.bottom - 1), fill=_BACKGROUND
    )
    draw.line((gauge.threshold, box.top, gauge.threshold, box.bottom - 1 + reach), fill=_TICK)
    draw.polygon(
        [
            (gauge.marker - reach, box.top - reach - 1),
            (gauge.marker + reach, box.top - reach - 1),
            (gauge.marker, box.top - 1),
        ],
        fill=_TICK,
    )
    draw.rectangle((gauge.marker - 2, box.top, gauge.marker + 2, box.bottom - 1), fill=_BACKGROUND)
    draw.rectangle((gauge.marker - 1, box.top, gauge.marker + 1, box.bottom - 1), fill=_TICK)


def _draw_bar(box: Rectangle, alpha: float) -> NDArray[np.uint8]:
    values = np.tile(np.linspace(0, 1, box.width, dtype=np.float32), (box.height, 1))
    greys = np.linspace(*_BAR_GREYS, box.height).astype(np.uint8)[:, np.newaxis]
    return blend(np.tile(greys, (1, box.width)), values, alpha)
