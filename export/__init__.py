"""Export of Keras networks to ONNX bundles that classify and explain. Needs the extra `train`."""
