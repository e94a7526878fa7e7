"""The shipped model bundles, one folder each: `model.onnx`, its card, and their digests."""

SHIPPED_DEFAULT = "baseline-1.0.0"
