"""The model bundles that ship: a folder each, with `model.onnx`, `bundle.json` and `card.md`."""

SHIPPED_DEFAULT = "baseline-1.0.0"
