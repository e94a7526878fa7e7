"""The shipped model bundles, one folder each: `model.onnx`, its card, and their digests."""

SHIPPED_DEFAULT = "guided-1.0.0"
