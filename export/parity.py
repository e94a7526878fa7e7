"""Proof that the exported graph says what the Keras network says, and shows why."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lungwatch.contract import CAM, INPUT, OUTPUTS, PROBABILITY
from lungwatch.errors import ModelError
from lungwatch.export.graph import build_graph
from lungwatch.golden import golden_input
from lungwatch.preprocess import PreprocessSpec
from lungwatch.training.augment import Augmentation, augment
from lungwatch.training.fit import predict_logits
from lungwatch.training.foreign import KerasModel
from lungwatch.training.gradcam import gradcam
from lungwatch.training.metrics import sigmoid
from lungwatch.training.pixels import FloatArray
from lungwatch.training.scorers import onnx_session

PROBABILITY_LIMIT = 1e-5
MAP_LIMIT = 1e-3
GRADIENT_LIMIT = 1e-4


@dataclass(frozen=True, kw_only=True)
class Parity:
    """Largest absolute differences over some images.

    Attributes
    ----------
    images
        How many were compared.
    kind
        Where they came from.
    probability
        ONNX against the Keras network; at most 1e-5.
    cam
        ONNX maps against the same graph in TensorFlow; at most 1e-3.
    gradient
        The closed form against Grad-CAM by automatic differentiation; at most 1e-4.
    """

    images: int
    kind: str
    probability: float
    cam: float
    gradient: float

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)

    def check(self) -> None:
        """Refuse a graph that differs.

        Raises
        ------
        ModelError
            If a difference is above its limit, or no number.
        """
        for what, found, limit in (
            ("probability", self.probability, PROBABILITY_LIMIT),
            ("map", self.cam, MAP_LIMIT),
            ("map against automatic differentiation", self.gradient, GRADIENT_LIMIT),
        ):
            if not found <= limit:  # a NaN must not pass
                raise ModelError(f"the exported graph differs: {what} by {found:.2e} > {limit:.0e}")


def run_onnx(data: bytes, pixels: FloatArray) -> dict[str, FloatArray]:
    """Run an ONNX file's bytes on (N, S, S, 1) and return its outputs by name."""
    found = onnx_session(data, "the exported graph").run(list(OUTPUTS), {INPUT: pixels})
    return dict(zip(OUTPUTS, found, strict=True))


def compare(model: KerasModel, data: bytes, pixels: FloatArray, kind: str) -> Parity:
    """Compare a Keras network with its exported graph.

    Parameters
    ----------
    model
        The network that was exported.
    data
        The ONNX file's bytes.
    pixels
        Preprocessed images, (N, S, S, 1), 0..1.
    kind
        What the images are, for the record.
    """
    graph, _ = build_graph(model)
    found = run_onnx(data, pixels)
    closed = graph(pixels)[CAM].numpy()
    keras_probability = sigmoid(predict_logits(model, pixels))
    return Parity(
        images=len(pixels),
        kind=kind,
        probability=_largest(found[PROBABILITY] - keras_probability),
        cam=_largest(found[CAM] - closed),
        gradient=_largest(closed - gradcam(model, pixels)),
    )


def synthetic_images(spec: PreprocessSpec, count: int = 16) -> FloatArray:
    """Golden pictures, moved about, for parity where no real images are at hand."""
    batch = np.repeat(golden_input(spec)[np.newaxis], count, axis=0)
    return augment(batch, Augmentation(), np.random.default_rng(0))


def _largest(difference: FloatArray | NDArray[np.float64]) -> float:
    return float(np.abs(difference).max())
