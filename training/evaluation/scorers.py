"""Scorers: Keras networks and exported graphs under one interface, and a cache of their scores.

A network that lungwatch did not make is declared: a .keras file states the shapes of its input and
output, but not the meaning of the numbers. Guessing has given wrong figures without a sign, so the
declaration is required, and checked against what the file does state.
"""

import hashlib
import io
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal, Protocol, Self, cast, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from lungwatch.contract import (
    CAM,
    CAM_PEAK,
    EMBEDDING,
    FINDING_PEAKS,
    FINDINGS,
    INPUT,
    LOGITS,
    METADATA_KEY,
    Calibration,
    Decision,
    Finding,
    ModelContract,
)
from lungwatch.errors import ConfigError, ModelError, NotFoundError
from lungwatch.files import make_dirs, write_atomic
from lungwatch.preprocess import PreprocessSpec
from lungwatch.training.data.dataset import Sample
from lungwatch.training.data.pixels import FloatArray, KerasModel, OnnxSession, in_batches
from lungwatch.training.fitting.run import RunFolder
from lungwatch.training.networks.heads import (
    FEATURES,
    HIDDEN,
    LOGIT,
    POOLED,
    further_findings,
    gradcam,
    output_of,
)
from lungwatch.training.networks.weights import load_keras

OutputKind = Literal["sigmoid", "logit", "softmax"]
DECLARE = (
    "declare it: --output sigmoid|logit|softmax:INDEX (of COVID), "
    "--input-range 0..1|0..255|-1..1|MEAN/STD, --channels 1|3"
)
_RANGES = {"0..1": (1.0, 0.0), "0..255": (255.0, 0.0), "-1..1": (2.0, -1.0)}
_ACTIVATIONS: dict[str, OutputKind] = {
    "sigmoid": "sigmoid",
    "softmax": "softmax",
    "linear": "logit",
}
_BATCH = 64
# Far enough out for every float32: the next one below 1 is 6e-8 away, the least above 0 is 1.4e-45.
_ALMOST_0, _ALMOST_1 = 1e-46, 1 - 1e-8
_SUM_ERROR = 1e-3
ONNX_FILE = "model.onnx"
_EMBED_BATCH = 64
_MODEL_FILES = ("model.onnx", "model.keras", "config.json", "metrics.json")


@dataclass(frozen=True, kw_only=True)
class Declaration:
    """Meaning of the input and output values of a foreign network.

    Attributes
    ----------
    output
        "sigmoid": one output, the probability of COVID; "logit": one output, its logit;
        "softmax": probabilities of several classes.
    index
        Which of several classes is COVID, from 0; 0 for one output.
    input_range
        As declared, for the record.
    scale, offset
        The network's input is `scale * pixels + offset` of grey values within 0..1, one number
        for all channels or one for each.
    channels
        1, or 3 equal ones.
    """

    output: OutputKind
    index: int
    input_range: str
    scale: tuple[float, ...]
    offset: tuple[float, ...]
    channels: int

    @classmethod
    def parse(
        cls, output: str | None, input_range: str | None, channels: int | None
    ) -> Self | None:
        """Read the three options; None if none is given.

        Raises
        ------
        ConfigError
            If one is missing or cannot be read.
        """
        given = {"--output": output, "--input-range": input_range, "--channels": channels}
        missing = [name for name, value in given.items() if value is None]
        if len(missing) == len(given):
            return None
        if output is None or input_range is None or channels is None:
            raise ConfigError(f"{', '.join(missing)} missing: a network is declared with all three")
        kind, index = _parse_output(output)
        scale, offset = _parse_range(input_range)
        if channels not in (1, 3):
            raise ConfigError(f"--channels {channels}: 1 or 3")
        if len(scale) not in (1, channels):
            raise ConfigError(
                f"--input-range {input_range!r} has {len(scale)} channels, --channels {channels}"
            )
        return cls(
            output=kind,
            index=index,
            input_range=input_range,
            scale=scale,
            offset=offset,
            channels=channels,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return what was declared, as plain values."""
        output = f"{self.output}:{self.index}" if self.output == "softmax" else self.output
        return {"output": output, "input_range": self.input_range, "channels": self.channels}

    def check(self, model: KerasModel, name: str) -> int:
        """Check the declaration against the network's own layers and shapes.

        Returns
        -------
        int
            Side of its square input, pixels.

        Raises
        ------
        ModelError
            If the network has another kind of input or output than can be declared.
        ConfigError
            If the declaration contradicts it.
        """
        if len(model.inputs) != 1 or len(model.outputs) != 1:
            raise ModelError(f"{name} has several inputs or outputs: one of each is needed")
        taken, given = tuple(model.inputs[0].shape), tuple(model.outputs[0].shape)
        if len(taken) != 4 or taken[1] is None or taken[1] != taken[2]:
            raise ModelError(f"{name} takes {taken}: square images of a fixed size are needed")
        if taken[3] != self.channels:
            raise ConfigError(f"--channels {self.channels}: {name} takes {taken[3]}")
        if len(given) != 2:
            raise ModelError(f"{name} gives {given}: one row of numbers an image is needed")
        self._check_output(int(given[1]), name)
        said = _ACTIVATIONS.get(_last_activation(model))
        if said is not None and said != self.output:
            raise ConfigError(f"--output {self.output}: the last layer of {name} gives a {said}")
        self._check_range(model, name)
        return int(taken[1])

    def _check_output(self, count: int, name: str) -> None:
        if self.output != "softmax" and count != 1:
            raise ConfigError(
                f"--output {self.output}: {name} has {count} outputs; give softmax:INDEX"
            )
        if self.output == "softmax" and not (count > 1 and self.index < count):
            raise ConfigError(
                f"--output softmax:{self.index}: {name} has {count} outputs, "
                f"{'index 0 to ' + str(count - 1) if count > 1 else 'so no softmax'}"
            )

    def _check_range(self, model: KerasModel, name: str) -> None:
        widest = max(abs(s) + abs(o) for s, o in zip(self.scale, self.offset, strict=True))
        for layer in model.layers:
            if type(layer).__name__ != "Rescaling":
                continue
            factor = float(np.max(np.abs(np.asarray(layer.scale, np.float64))))
            if factor < 1 / 64 and widest < 64:  # 1/255 or 1/127.5
                raise ConfigError(
                    f"--input-range {self.input_range}: {name} begins with a rescaling by "
                    f"{factor:.4g}, so it takes 0..255"
                )
            return

    def prepare(self, pixels: FloatArray) -> FloatArray:
        """Turn grey values, (N, S, S, 1), 0..1, into the network's input, (N, S, S, C)."""
        scale, offset = np.array(self.scale, np.float32), np.array(self.offset, np.float32)
        wide = np.repeat(pixels, self.channels, axis=3)
        return np.asarray(wide * scale + offset, dtype=np.float32)

    def logits(self, outputs: NDArray[Any], name: str) -> NDArray[np.float64]:
        """Turn a network's outputs, (N, K), into binary logits, float64 (N,).

        Probabilities keep their order, ties included, and come back to within 1e-8.

        Raises
        ------
        ModelError
            If the outputs are not what was declared.
        """
        found = np.asarray(outputs, dtype=np.float64)
        if not np.isfinite(found).all():
            raise ModelError(f"{name} answers with what is no finite number")
        if self.output == "logit":
            return np.asarray(found[:, 0])
        if found.min() < 0 or found.max() > 1 + _SUM_ERROR:
            raise ModelError(
                f"{name} answers {found.min():.4g} to {found.max():.4g}: no probabilities; "
                "declare --output logit if it has one output"
            )
        if self.output == "softmax" and np.abs(found.sum(axis=1) - 1).max() > _SUM_ERROR:
            raise ModelError(f"{name} gives probabilities that do not add up to 1: no softmax")
        p = np.clip(found[:, self.index], _ALMOST_0, _ALMOST_1)
        return np.asarray(np.log(p) - np.log1p(-p))


def foreign_outputs(
    model: KerasModel, declared: Declaration, pixels: FloatArray
) -> NDArray[np.floating]:
    """Return a foreign network's own predictions, (N, K), for pixels (N, S, S, 1), 0..1."""
    return in_batches(
        lambda part: np.asarray(model(declared.prepare(part), training=False)), pixels
    )


def has_own_head(model: KerasModel) -> bool:
    """Return whether a network maps pixels (N, S, S, 1) to a logit (N, 1) for each finding."""
    if len(model.inputs) != 1 or len(model.outputs) != 1 + len(further_findings(model)):
        return False
    names = {layer.name for layer in model.layers}
    return (
        {FEATURES, HIDDEN, LOGIT} <= names
        and len(model.inputs[0].shape) == 4
        and model.inputs[0].shape[-1] == 1
        and all(tuple(output.shape[1:]) == (1,) for output in model.outputs)
        and model.get_layer(LOGIT).activation.__name__ == "linear"
    )


def last_layer(model: KerasModel) -> Any:  # noqa: ANN401 - a Keras layer
    """Return the layer that gives a network's output."""
    return model.outputs[0]._keras_history.operation  # noqa: SLF001 - Keras has no other name


def _last_activation(model: KerasModel) -> str:
    activation = getattr(last_layer(model), "activation", None)
    if activation is None and type(last_layer(model)).__name__ == "Softmax":
        return "softmax"
    return str(getattr(activation, "__name__", ""))


def _parse_output(text: str) -> tuple[OutputKind, int]:
    if text in ("sigmoid", "logit"):
        return text, 0  # type: ignore[return-value]  # one of both, as just compared
    if found := re.fullmatch(r"softmax:(\d{1,6})", text):
        return "softmax", int(found[1])
    raise ConfigError(
        f"--output {text!r}: sigmoid, logit or softmax:INDEX, INDEX being the output of COVID"
    )


def _parse_range(text: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    if text in _RANGES:
        scale, offset = _RANGES[text]
        return (scale,), (offset,)
    try:
        means, stds = (
            [float(word) for word in part.split(",")] for part in text.split("/", maxsplit=1)
        )
    except ValueError:
        means, stds = [], []
    right = len(means) == len(stds) > 0 and all(s > 0 for s in stds)
    if not (right and all(map(math.isfinite, [*means, *stds]))):
        raise ConfigError(
            f"--input-range {text!r}: {', '.join(_RANGES)}, or MEAN/STD of grey values within "
            "0..1, as 0.5/0.25 or 0.485,0.456,0.406/0.229,0.224,0.225"
        )
    return tuple(1 / s for s in stds), tuple(-m / s for m, s in zip(means, stds, strict=True))


def predict_logits(model: KerasModel, pixels: FloatArray, batch_size: int = 64) -> FloatArray:
    """Return a Keras network's binary logits, float32 (N,), for (N, S, S, 1) in 0..1."""
    answers = in_batches(lambda part: np.asarray(model(part, training=False)), pixels, batch_size)
    return answers[:, 0].astype(np.float32)


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """Preprocessing, calibration and decision of a network; see `lungwatch.contract`."""

    name: str
    preprocess: PreprocessSpec
    calibration: Calibration
    decision: Decision
    findings: tuple[Finding, ...] = ()


class Scorer(Protocol):
    """A model that gives binary logits."""

    @property
    def judgement(self) -> Judgement:
        """Preprocessing, calibration and decision."""

    def logits(self, pixels: FloatArray) -> FloatArray:
        """Return binary logits, (N,), for preprocessed images, (N, S, S, 1), 0..1."""

    def finding_logits(self, pixels: FloatArray) -> FloatArray:
        """Return the logits of the findings beside COVID, (N, F), in the judgement's order."""

    def maps(self, pixels: FloatArray) -> FloatArray:
        """Return Grad-CAM of NEGATIVE and COVID, (N, 2, h, w), 0..1, for such images.

        Raises
        ------
        ModelError
            If the network has no feature map to explain.
        """


class KerasScorer:
    """A run folder's network, or a bare .keras file, which is neither calibrated nor cut.

    Parameters
    ----------
    path
        The folder or the file.
    declared
        What the numbers of a network mean that lungwatch did not make.

    Attributes
    ----------
    foreign
        The declaration of such a network; None for lungwatch's own.

    Raises
    ------
    ConfigError
        If a foreign network is not declared, one of lungwatch's own is, or the declaration
        contradicts the network.
    """

    def __init__(self, path: Path, declared: Declaration | None = None) -> None:
        folder = RunFolder(root=path if path.is_dir() else path.parent)
        file = folder.model if path.is_dir() else path
        self.network = load_keras(file)
        metrics, config = _judged(folder) if file == folder.model else ({}, {})
        judged = bool(metrics)
        name = file.stem if not path.is_dir() else path.name
        own = judged or has_own_head(self.network)
        if own and declared:
            raise ConfigError(
                f"{path} is lungwatch's own network: what goes in and comes out is known; leave "
                "--output, --input-range and --channels away"
            )
        if not own and declared is None:
            raise ConfigError(
                f"{path} is no network of lungwatch, and what it takes and gives is not known: "
                f"{DECLARE}"
            )
        self.foreign = declared
        self.model = self.network if declared else output_of(self.network)
        self.further = [] if declared else further_findings(self.network)
        if declared:
            size = declared.check(self.model, name)
            spec = {"size_px": size, "intensity": "as_is"}
        else:
            spec = config.get("preprocess", {"size_px": int(self.model.input_shape[1])})
        even = {"threshold": 0.5, "uncertain_low": 0.5, "uncertain_high": 0.5}
        self.calibrated = judged
        self.config = config
        self.metrics = metrics
        self.environment = folder.read("environment.json") if judged else {}
        self.judgement = Judgement(
            name=name,
            preprocess=PreprocessSpec.from_dict(spec),
            calibration=Calibration(**metrics.get("calibration", {})),
            decision=Decision(**metrics.get("decision", even)),
            findings=tuple(map(Finding.from_dict, metrics.get("findings", ()))),
        )

    def logits(self, pixels: FloatArray) -> FloatArray:
        """See `Scorer`."""
        if self.foreign:
            found = foreign_outputs(self.model, self.foreign, pixels)
            # As float64: rounded to float32 two probabilities that differ could become equal.
            return cast("FloatArray", self.foreign.logits(found, self.judgement.name))
        return predict_logits(self.model, pixels)

    def finding_logits(self, pixels: FloatArray) -> FloatArray:
        """See `Scorer`; in the network's own order where no judgement tells one."""
        names = [one.name for one in self.judgement.findings] or self.further
        if unknown := set(names) - set(self.further):
            raise ModelError(f"{self.judgement.name} has no head for {', '.join(sorted(unknown))}")
        columns = [predict_logits(output_of(self.network, name), pixels) for name in names]
        return np.stack(columns, axis=1) if columns else np.empty((len(pixels), 0), np.float32)

    def maps(self, pixels: FloatArray) -> FloatArray:
        """See `Scorer`."""
        if self.foreign:
            raise ModelError(f"{self.judgement.name} is a foreign network: export it for its maps")
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
            findings=self.contract.findings,
        )

    def logits(self, pixels: FloatArray) -> FloatArray:
        """See `Scorer`."""
        pair = self.output(LOGITS, pixels)
        return pair[:, 1] - pair[:, 0]

    def finding_logits(self, pixels: FloatArray) -> FloatArray:
        """See `Scorer`."""
        if not self.judgement.findings:
            return np.empty((len(pixels), 0), np.float32)
        return self.output(FINDINGS, pixels)

    def maps(self, pixels: FloatArray) -> FloatArray:
        """See `Scorer`."""
        return np.asarray(self.session.run([CAM], {INPUT: pixels})[0], dtype=np.float32)

    def peaks(self, pixels: FloatArray) -> FloatArray:
        """Return the largest value of each map before scaling, (N, 2); raises as `output`."""
        return self.output(CAM_PEAK, pixels)

    def finding_peaks(self, pixels: FloatArray) -> FloatArray:
        """Return what each of those maps was divided by, (N, F); raises as `output`."""
        return self.output(FINDING_PEAKS, pixels)

    def output(self, name: str, pixels: FloatArray) -> FloatArray:
        """Return one output of the graph, float32, for such images, in batches.

        Raises
        ------
        ModelError
            If the graph has no such output.
        """
        if name not in {output.name for output in self.session.get_outputs()}:
            raise ModelError(f"{self.judgement.name} has no output {name!r}: export it again")
        batches = np.array_split(pixels, max(1, math.ceil(len(pixels) / 64)))
        found = [self.session.run([name], {INPUT: batch})[0] for batch in batches]
        return np.concatenate(found).astype(np.float32)


def place_of(path: Path) -> Path:
    """Return where a model is: the path itself, or, if nothing is there, a shipped bundle's."""
    shipped = Path(str(resources.files("lungwatch.models"))) / path
    return shipped if not path.exists() and (shipped / ONNX_FILE).is_file() else path


def load_scorer(path: Path, declared: Declaration | None = None) -> Scorer:
    """Open a run folder, a .keras file, a bundle folder, an .onnx file, or a shipped bundle.

    Parameters
    ----------
    path
        Where it is; or, if nothing is there, the name of a shipped bundle.
    declared
        What the numbers of a .keras file mean that lungwatch did not make.

    Raises
    ------
    NotFoundError
        If there is no model at `path`.
    ModelError
        If it is damaged or carries no contract.
    ConfigError
        If a foreign network is not declared, or another one is.
    MissingExtraError
        If it is a Keras model and TensorFlow is not installed.
    """
    path = place_of(path)
    if path.is_dir() and (path / ONNX_FILE).is_file():
        path = path / ONNX_FILE
    if path.is_file() and path.suffix == ".onnx":
        if declared:
            raise ConfigError(
                f"{path} carries a contract: leave --output, --input-range and --channels away"
            )
        return OnnxScorer(path.read_bytes(), str(path))
    if (path.is_dir() and RunFolder(root=path).model.is_file()) or path.suffix == ".keras":
        return KerasScorer(path, declared)
    raise NotFoundError(f"{path}: no model (a bundle, .onnx, a finished run or .keras)")


def _judged(folder: RunFolder) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read metrics and configuration of a finished run of a classifier; empty for another."""
    try:
        metrics, config = folder.read("metrics.json"), folder.read("config.json")
    except (NotFoundError, ValueError):
        return {}, {}
    if {"calibration", "decision"} <= metrics.keys() and "preprocess" in config:
        return metrics, config
    return {}, {}


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


@runtime_checkable
class Embedder(Protocol):
    """A scorer that gives embeddings by itself."""

    def embeddings(self, pixels: FloatArray) -> FloatArray:
        """Return the embedding, float32 (N, E), of preprocessed images (N, S, S, 1)."""


def embed(scorer: Scorer, pixels: FloatArray) -> FloatArray:
    """Return the embedding of each image.

    Parameters
    ----------
    scorer
        A run's network, an exported graph, or an `Embedder`.
    pixels
        float32, shape (N, S, S, 1), 0..1, preprocessed.

    Returns
    -------
    numpy.ndarray
        float32, shape (N, E).

    Raises
    ------
    ModelError
        If the network has no layer that pools its last feature map.
    """
    if isinstance(scorer, OnnxScorer):
        return scorer.output(EMBEDDING, pixels)
    if isinstance(scorer, KerasScorer):
        return _of_keras(scorer, pixels)
    if isinstance(scorer, Embedder):
        return scorer.embeddings(pixels)
    raise ModelError(f"{scorer.judgement.name} gives no embedding")


def _of_keras(scorer: KerasScorer, pixels: FloatArray) -> FloatArray:
    import keras

    model = scorer.model
    if POOLED not in {layer.name for layer in model.layers}:
        raise ModelError(f"{scorer.judgement.name} has no layer named {POOLED!r}: no embedding")
    pooled = keras.Model(model.input, model.get_layer(POOLED).output)
    return np.asarray(pooled.predict(pixels, batch_size=_EMBED_BATCH, verbose=0), np.float32)


@dataclass(frozen=True, kw_only=True)
class ScoreCache:
    """Logits by model, preprocessing and files.

    Attributes
    ----------
    folder
        Where they are kept.
    digest
        Of the model; see `model_digest`.
    """

    folder: Path
    digest: str

    def read(self, samples: Sequence[Sample], spec: PreprocessSpec) -> FloatArray | None:
        """Return the logits of these files, (N,), if none has changed since; or None."""
        try:
            logits = np.load(self._file(samples, spec), allow_pickle=False)
        except (OSError, ValueError, EOFError):
            return None
        return np.asarray(logits) if logits.shape == (len(samples),) else None

    def write(self, samples: Sequence[Sample], spec: PreprocessSpec, logits: FloatArray) -> None:
        """Keep logits, float32, shape (N,), in the order of `samples`."""
        make_dirs(self.folder)
        data = io.BytesIO()
        np.save(data, logits)
        write_atomic(self._file(samples, spec), data.getvalue())

    def _file(self, samples: Sequence[Sample], spec: PreprocessSpec) -> Path:
        files = []
        for sample in samples:
            state = sample.path.stat()
            files.append([str(sample.path.absolute()), state.st_size, state.st_mtime_ns])
        key = json.dumps([self.digest, spec.to_dict(), files])
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.npy"


def model_digest(path: Path) -> str:
    """Return the SHA-256 of what `load_scorer` would open for `path`."""
    shipped = Path(str(resources.files("lungwatch.models"))) / path
    place = path if path.exists() else shipped
    files = [place / name for name in _MODEL_FILES] if place.is_dir() else [place]
    digest = hashlib.sha256()
    for file in files:
        if file.is_file():
            digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()
