"""The picture for people: the X-ray, the class activation map over it, what the model says."""

from lungwatch.daemon.overlay.preview import make_preview
from lungwatch.daemon.overlay.render import encode_png, render_overlay
from lungwatch.daemon.overlay.text import OverlayText, shown_class

__all__ = ["OverlayText", "encode_png", "make_preview", "render_overlay", "shown_class"]
