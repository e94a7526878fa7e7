"""The picture for people: the X-ray, the map of the answer over it, what the model says."""

from lungwatch.daemon.overlay.preview import make_preview
from lungwatch.daemon.overlay.render import encode_png, on_common_scale, render_overlay
from lungwatch.daemon.overlay.text import FindingText, OverlayText

__all__ = [
    "FindingText",
    "OverlayText",
    "encode_png",
    "make_preview",
    "on_common_scale",
    "render_overlay",
]
