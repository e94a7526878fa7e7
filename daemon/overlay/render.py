"""Draw an overlay, and turn it into a file's bytes."""

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from lungwatch.daemon.overlay.colormap import blend
from lungwatch.daemon.overlay.layout import Layout, font, lay_out
from lungwatch.daemon.overlay.text import OverlayText

_BACKGROUND = (17, 17, 20)
_TICK = (255, 255, 255)
# The bar shows its colours as the image does: over bright parts above, over dark ones below.
_BAR_GREYS = (230, 50)
# Level 6, zlib's own choice, takes four times as long to save a sixth of the bytes.
_PNG_LEVEL = 1
# What a quantised graph's arithmetic may miss 0 and 1 by; no shade of colour differs.
_CAM_TOLERANCE = 1e-3


def render_overlay(
    *,
    preview: NDArray[np.uint8],
    cam: NDArray[np.float32],
    text: OverlayText,
    alpha: float = 0.4,
) -> NDArray[np.uint8]:
    """Lay a class activation map over an X-ray and write the result into margins.

    Parameters
    ----------
    preview
        uint8, shape (h, w): the X-ray, air dark.
    cam
        float32, shape (ch, cw), 0..1: the map of class `shown_class(text.label)` over the
        whole X-ray and nothing else. Its pixels are areas: the first one's centre lies half
        a map pixel from the edge.
    text
        What the margins say.
    alpha
        Opacity of the map, 0..1; it fades out towards values of 0.

    Returns
    -------
    numpy.ndarray
        uint8 RGB, shape (H, W, 3), with H > h and W >= w. The X-ray is not scaled, and
        nothing but the map covers it.

    Raises
    ------
    ValueError
        If the preview or the map has another shape, or the map holds values that are not
        finite or not within 0..1.
    """
    if preview.ndim != 2 or preview.size == 0 or preview.dtype != np.uint8:
        raise ValueError(f"preview is {preview.dtype} {preview.shape}, not uint8 (h, w)")
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha is {alpha}, not within 0..1")
    plan = lay_out((preview.shape[0], preview.shape[1]), text, empty=_is_empty(cam))
    canvas = _draw_margins(plan)
    canvas[plan.bar.slices] = _draw_bar(plan, alpha)
    canvas[plan.image.slices] = blend(
        preview, upsample(cam, plan.image.height, plan.image.width), alpha
    )
    return canvas


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
    """Return an RGB picture, uint8 (H, W, 3), as the bytes of a PNG file."""
    settings = [cv2.IMWRITE_PNG_COMPRESSION, _PNG_LEVEL]
    done, data = cv2.imencode(".png", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), settings)
    if not done:
        raise ValueError(f"a picture of shape {image.shape} cannot be encoded")
    return data.tobytes()


def _is_empty(cam: NDArray[np.float32]) -> bool:
    if cam.ndim != 2 or cam.size == 0:
        raise ValueError(f"the map's shape is {cam.shape}, not (rows, columns)")
    low, high = float(cam.min()), float(cam.max())
    # Written so that NaN, for which every comparison is false, is refused as well.
    if not (low >= -_CAM_TOLERANCE and high <= 1.0 + _CAM_TOLERANCE):
        raise ValueError(f"the map holds {low}..{high}, not values within 0..1")
    return high <= 0.0


def _draw_margins(plan: Layout) -> NDArray[np.uint8]:
    picture = Image.new("RGB", (plan.width, plan.height), _BACKGROUND)
    draw = ImageDraw.Draw(picture)
    for line in plan.texts:
        draw.text((line.left, line.top), line.text, font=font(line.size_px), fill=line.colour)
    below = plan.bar.top + plan.bar.height
    for column in plan.ticks:
        draw.line((column, below, column, below + plan.bar.height // 4), fill=_TICK)
    return np.array(picture, dtype=np.uint8)


def _draw_bar(plan: Layout, alpha: float) -> NDArray[np.uint8]:
    shape = plan.bar.height, plan.bar.width
    values = np.tile(np.linspace(0, 1, shape[1], dtype=np.float32), (shape[0], 1))
    greys = np.linspace(*_BAR_GREYS, shape[0]).astype(np.uint8)[:, np.newaxis]
    return blend(np.tile(greys, (1, shape[1])), values, alpha)
