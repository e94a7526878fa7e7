"""Proof that the exported graph says what the Keras network says, and shows why."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lungwatch.contract import CAM, FINDING_CAMS, FINDINGS, INPUT, PROBABILITY
from lungwatch.errors import ModelError
from lungwatch.export.graph import build_graph
from lungwatch.golden import golden_input
from lungwatch.preprocess import PreprocessSpec
from lungwatch.training.augment import Augmentation, augment
from lungwatch.training.fit import predict_logits
from lungwatch.training.foreign import KerasModel
from lungwatch.training.gradcam import gradcam
from lungwatch.training.head import answer_of, further_findings
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
        ONNX against the Keras network, of every finding; at most 1e-5.
    cam
        ONNX maps, of every finding, against the same graph in TensorFlow; at most 1e-3.
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
    session = onnx_session(data, "the exported graph")
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {INPUT: pixels}), strict=True))


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
    closed = {name: value.numpy() for name, value in graph(pixels).items()}
    main = answer_of(model)
    probabilities = [found[PROBABILITY] - sigmoid(predict_logits(main, pixels))]
    maps = [found[CAM] - closed[CAM]]
    gradients = [closed[CAM] - gradcam(main, pixels)]
    for index, name in enumerate(further_findings(model)):
        one = answer_of(model, name)
        exported = sigmoid(found[FINDINGS][:, index])
        probabilities.append(exported - sigmoid(predict_logits(one, pixels)))
        maps.append(found[FINDING_CAMS][:, index] - closed[FINDING_CAMS][:, index])
        gradients.append(closed[FINDING_CAMS][:, index] - gradcam(one, pixels)[:, 1])
    return Parity(
        images=len(pixels),
        kind=kind,
        probability=_largest(*probabilities),
        cam=_largest(*maps),
        gradient=_largest(*gradients),
    )


def synthetic_images(spec: PreprocessSpec, count: int = 16) -> FloatArray:
    """Golden pictures, moved about, for parity where no real images are at hand."""
    batch = np.repeat(golden_input(spec)[np.newaxis], count, axis=0)
    return augment(batch, Augmentation(), np.random.default_rng(0))


def _largest(*differences: FloatArray | NDArray[np.float64]) -> float:
    # A NaN must stay one: Python's max would lose it.
    return float(np.max([np.abs(difference).max() for difference in differences]))
