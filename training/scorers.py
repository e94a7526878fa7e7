"""A trained network behind one face, whether it is Keras or ONNX."""

import math
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Protocol

import numpy as np

from lungwatch.contract import (
    CAM,
    CAM_PEAK,
    INPUT,
    LOGITS,
    METADATA_KEY,
    Calibration,
    Decision,
    ModelContract,
)
from lungwatch.errors import ModelError, NotFoundError
from lungwatch.preprocess import PreprocessSpec
from lungwatch.training.fit import predict_logits
from lungwatch.training.foreign import KerasModel, OnnxSession
from lungwatch.training.gradcam import gradcam
from lungwatch.training.head import FEATURES
from lungwatch.training.pixels import FloatArray
from lungwatch.training.run import RunFolder
from lungwatch.training.runtime import prepare_tensorflow

ONNX_FILE = "model.onnx"


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """How a network's input is made and its answer read; see `lungwatch.contract`."""

    name: str
    preprocess: PreprocessSpec
    calibration: Calibration
    decision: Decision


class Scorer(Protocol):
    """Anything that gives binary logits."""

    @property
    def judgement(self) -> Judgement:
        """How to read the answers."""

    def logits(self, pixels: FloatArray) -> FloatArray:
        """Return binary logits, (N,), for preprocessed images, (N, S, S, 1), 0..1."""

    def maps(self, pixels: FloatArray) -> FloatArray:
        """Return Grad-CAM of NEGATIVE and COVID, (N, 2, h, w), 0..1, for such images.

        Raises
        ------
        ModelError
            If the network has no feature map to explain.
        """


class KerasScorer:
    """A run folder's network, or a bare .keras file, which is neither calibrated nor cut."""

    def __init__(self, path: Path) -> None:
        folder = RunFolder(root=path if path.is_dir() else path.parent)
        file = folder.model if path.is_dir() else path
        self.model = load_keras(file)
        judged = file == folder.model and (folder.root / "metrics.json").is_file()
        metrics = folder.read("metrics.json") if judged else {}
        config = folder.read("config.json") if judged else {}
        spec = config.get("preprocess", {"size_px": int(self.model.input_shape[1])})
        even = {"threshold": 0.5, "uncertain_low": 0.5, "uncertain_high": 0.5}
        self.calibrated = judged
        self.config = config
        self.metrics = metrics
        self.environment = folder.read("environment.json") if judged else {}
        self.judgement = Judgement(
            name=file.stem if not path.is_dir() else path.name,
            preprocess=PreprocessSpec.from_dict(spec),
            calibration=Calibration(**metrics.get("calibration", {})),
            decision=Decision(**metrics.get("decision", even)),
        )

    def logits(self, pixels: FloatArray) -> FloatArray:
        """See `Scorer`."""
        return predict_logits(self.model, pixels)

    def maps(self, pixels: FloatArray) -> FloatArray:
        """See `Scorer`."""
        if FEATURES not in {layer.name for layer in self.model.layers}:
            raise ModelError(f"{self.judgement.name} has no layer named {FEATURES!r} to explain")
        return gradcam(self.model, pixels)


class OnnxScorer:
    """An exported graph with its contract."""

    def __init__(self, data: bytes, name: str = "the exported graph") -> None:
        self.data = data
        self.session = onnx_session(data, name)
        text = self.session.get_modelmeta().custom_metadata_map.get(METADATA_KEY)
        if text is None:
            raise ModelError(f"{name} carries no contract; export it with `lungwatch export`")
        self.contract = ModelContract.from_json(text)
        self.judgement = Judgement(
            name=self.contract.id,
            preprocess=self.contract.preprocess,
            calibration=self.contract.calibration,
            decision=self.contract.decision,
        )

    def logits(self, pixels: FloatArray) -> FloatArray:
        """See `Scorer`."""
        batches = np.array_split(pixels, max(1, math.ceil(len(pixels) / 64)))
        pairs = [self.session.run([LOGITS], {INPUT: batch})[0] for batch in batches]
        pair = np.concatenate(pairs)
        return np.asarray(pair[:, 1] - pair[:, 0], dtype=np.float32)

    def maps(self, pixels: FloatArray) -> FloatArray:
        """See `Scorer`."""
        return np.asarray(self.session.run([CAM], {INPUT: pixels})[0], dtype=np.float32)

    def peaks(self, pixels: FloatArray) -> FloatArray:
        """Return the largest value of each map before scaling, (N, 2), for such images.

        Raises
        ------
        ModelError
            If the graph has no output `cam_peak`.
        """
        if CAM_PEAK not in {output.name for output in self.session.get_outputs()}:
            raise ModelError(f"{self.judgement.name} has no output {CAM_PEAK!r}: export it again")
        batches = np.array_split(pixels, max(1, math.ceil(len(pixels) / 64)))
        found = [self.session.run([CAM_PEAK], {INPUT: batch})[0] for batch in batches]
        return np.concatenate(found).astype(np.float32)


def load_scorer(path: Path) -> Scorer:
    """Open a run folder, a .keras file, a bundle folder, an .onnx file, or a shipped bundle.

    Parameters
    ----------
    path
        Where it is; or, if nothing is there, the name of a shipped bundle.

    Raises
    ------
    NotFoundError
        If there is no model at `path`.
    ModelError
        If it is damaged or carries no contract.
    MissingExtraError
        If it is a Keras model and TensorFlow is not installed.
    """
    shipped = Path(str(resources.files("lungwatch.models"))) / path
    if not path.exists() and (shipped / ONNX_FILE).is_file():
        path = shipped
    if path.is_dir() and (path / ONNX_FILE).is_file():
        path = path / ONNX_FILE
    if path.is_file() and path.suffix == ".onnx":
        return OnnxScorer(path.read_bytes(), str(path))
    if (path.is_dir() and RunFolder(root=path).model.is_file()) or path.suffix == ".keras":
        return KerasScorer(path)
    raise NotFoundError(f"{path}: no model (a bundle, .onnx, a finished run or .keras)")


def onnx_session(data: bytes, name: str) -> OnnxSession:
    """Open an ONNX file's bytes in onnxruntime, on the processor.

    Raises
    ------
    ModelError
        If it cannot be run; `name` is what the message calls it.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(
            data, sess_options=options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # onnxruntime's own errors share no base class
        raise ModelError(f"{name} is not an ONNX model that can be run") from error


def load_keras(file: Path) -> KerasModel:
    """Load a Keras network.

    Raises
    ------
    NotFoundError
        If the file is missing.
    ModelError
        If it is damaged.
    MissingExtraError
        If TensorFlow is not installed.
    """
    if not file.is_file():
        raise NotFoundError(f"{file}: no such model")
    prepare_tensorflow()
    import keras

    try:
        # Safe mode, Keras's default, refuses files that carry code.
        return keras.models.load_model(file)
    except (ValueError, OSError, TypeError, KeyError) as error:
        raise ModelError(f"{file} is not a Keras model that can be read") from error
