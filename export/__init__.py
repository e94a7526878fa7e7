"""From a Keras network to one ONNX graph that classifies and explains. Needs the extra `train`."""
