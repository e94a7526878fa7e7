"""Overlay images: the X-ray, the class activation map over it, and the result in words."""
