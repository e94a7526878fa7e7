"""Static int8 quantisation of a graph, and its fidelity against the float graph."""

import contextlib
import io
import math
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from lungwatch.contract import CAM, INPUT, LOGITS
from lungwatch.errors import MissingExtraError, ModelError
from lungwatch.training.data.dataset import (
    LabelMap,
    Sample,
    dataset_name,
    load_dataset,
    of_split,
    select,
)
from lungwatch.training.data.pixels import FloatArray, OnnxProto, read_pixels, targets
from lungwatch.training.data.splits import LearntImages, learnt_from
from lungwatch.training.evaluation.calibration import Rule, apply_calibration, calibrate
from lungwatch.training.evaluation.metrics import roc_auc
from lungwatch.training.evaluation.scorers import Judgement, onnx_session
from lungwatch.training.networks.lungs import FINDER

LOSS_LIMIT = 0.005
CalibrationReader: TypeAlias = Any
IMAGES = 300
# Clip and Relu are absorbed into the convolution before them, so that all 256 steps lie where
# the activation lets something pass. By the extremes, a ReLU6 network loses 0.016 ROC-AUC
# without them and 0.0005 with them. The head and its maps hold no convolution and stay float, as
# does what finds the lungs (see `_in_float`).
_QUANTISED = ("Conv", "Clip", "Relu")
# Chosen by the validation logits' mean difference from the float network's (EfficientNet-Lite0):
# 0.151, against 0.158 at 99.999 %, 0.157 by entropy and 0.163 by the extremes.
_PERCENTILE = 99.99
# Feature maps are kept for a whole stride: 20 images of 160 px take about 500 MB.
_STRIDE = 20
_BATCH = 64


@dataclass(frozen=True, kw_only=True)
class GraphAnswers:
    """Answers of one graph for some images.

    Attributes
    ----------
    logits
        Binary logits, (N,).
    maps
        Grad-CAM of both classes, (N, 2, h, w), 0..1.
    judgement
        How the logits are read.
    """

    logits: FloatArray
    maps: FloatArray
    judgement: Judgement

    @property
    def probabilities(self) -> NDArray[np.float64]:
        """Calibrated, 0..1, (N,)."""
        return apply_calibration(self.judgement.calibration, self.logits)

    @property
    def labels(self) -> list[str]:
        """COVID, NEGATIVE or UNCERTAIN for each image."""
        return [self.judgement.decision.label(float(p)) for p in self.probabilities]


@dataclass(frozen=True, kw_only=True)
class Fidelity:
    """Float against int8 on one split.

    Attributes
    ----------
    images
        How many were compared.
    roc_auc_float, roc_auc_int8
        ROC-AUC of either graph.
    probability_largest, probability_mean
        Absolute difference of the calibrated probabilities, 0..1.
    decisions_changed
        Images that get another label, UNCERTAIN being one of the three.
    map_cosine, map_correlation
        Mean over the images of cosine and Pearson correlation of both classes' maps together;
        None where every map is flat.
    """

    images: int
    roc_auc_float: float
    roc_auc_int8: float
    probability_largest: float
    probability_mean: float
    decisions_changed: int
    map_cosine: float | None
    map_correlation: float | None

    @property
    def loss(self) -> float:
        """ROC-AUC that quantising costs; negative where it gained."""
        return self.roc_auc_float - self.roc_auc_int8

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, the loss among them, rounded."""
        values = {**asdict(self), "loss": self.loss}
        return {k: round(v, 6) if isinstance(v, float) else v for k, v in values.items()}


def compare_graphs(truth: FloatArray, plain: GraphAnswers, int8: GraphAnswers) -> Fidelity:
    """Compare the answers of both graphs on the same images.

    Parameters
    ----------
    truth
        1 for COVID and 0 for the rest, (N,).
    plain, int8
        The answers of the float and of the quantised graph.
    """
    difference = np.abs(plain.probabilities - int8.probabilities)
    changed = sum(a != b for a, b in zip(plain.labels, int8.labels, strict=True))
    a, b = (answers.maps.reshape(len(truth), -1).astype(np.float64) for answers in (plain, int8))
    return Fidelity(
        images=len(truth),
        roc_auc_float=roc_auc(truth, plain.logits),
        roc_auc_int8=roc_auc(truth, int8.logits),
        probability_largest=float(difference.max()),
        probability_mean=float(difference.mean()),
        decisions_changed=changed,
        map_cosine=_alignment(a, b),
        map_correlation=_alignment(
            a - a.mean(axis=1, keepdims=True), b - b.mean(axis=1, keepdims=True)
        ),
    )


def check_loss(found: Mapping[str, Fidelity], decisive: str) -> None:
    """Refuse a quantised graph that lost too much.

    Parameters
    ----------
    found
        By data set and split.
    decisive
        The key of the validation split.

    Raises
    ------
    ModelError
        If it costs 0.005 ROC-AUC or more there; with all figures.
    """
    loss = found[decisive].loss
    if not loss < LOSS_LIMIT:  # a NaN must not pass
        figures = "; ".join(
            f"{name} {f.roc_auc_float:.4f} to {f.roc_auc_int8:.4f}" for name, f in found.items()
        )
        raise ModelError(
            f"int8 costs {loss:.4f} ROC-AUC on validation, the limit is {LOSS_LIMIT} ({figures}); "
            "export without --int8"
        )


def check_size(size: int, max_mb: float) -> None:
    """Refuse a file of more than `max_mb` megabytes of 10^6 bytes.

    Raises
    ------
    ModelError
        With the sizes.
    """
    if size > max_mb * 1e6:
        raise ModelError(f"the int8 file has {size / 1e6:.1f} MB, more than {max_mb:g} (--max-mb)")


def _alignment(a: NDArray[np.float64], b: NDArray[np.float64]) -> float | None:
    lengths = np.stack([np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1)])
    # Two flat maps agree and show nothing; one flat map against another is a difference of 1.
    some = lengths.max(axis=0) > 0
    if not some.any():
        return None
    product = (a * b).sum(axis=1)[some]
    return float(np.mean(product / np.maximum(lengths[:, some].prod(axis=0), 1e-12)))


def spread(samples: Sequence[Sample], count: int = IMAGES) -> list[Sample]:
    """Take samples evenly from every source and finding, and evenly within each.

    A group too small for its share gives all it has, and the others share the rest.
    """
    groups: dict[tuple[str, str], list[Sample]] = {}
    for sample in samples:
        groups.setdefault((sample.source, sample.finding), []).append(sample)
    chosen: list[Sample] = []
    for index, name in enumerate(sorted(groups, key=lambda name: (len(groups[name]), name))):
        share = (count - len(chosen)) // (len(groups) - index)
        group = groups[name]
        places = np.linspace(0, len(group) - 1, min(share, len(group))).astype(int)
        chosen += [group[place] for place in places]
    return chosen


def quantise(
    proto: OnnxProto,
    pixels: FloatArray,
    *,
    symbolic_shapes: bool = True,
    narrow_weights: bool = False,
) -> OnnxProto:
    """Quantise the convolutions to int8.

    QDQ format; weights int8, symmetric, one scale an output channel (depthwise convolutions
    need that); activations uint8, which x86 has the fastest kernels for.

    Parameters
    ----------
    proto
        The float graph; left as it is.
    pixels
        Preprocessed images, (N, S, S, 1), 0..1, that show the activations' usual range.
    symbolic_shapes
        Whether onnxruntime follows the batch dimension through the graph, which it cannot do
        where feature maps are enlarged.
    narrow_weights
        Weights of 7 bits: processors without VNNI, whose 16-bit sums overflow with 8, then answer
        as the others do.

    Returns
    -------
    onnx.ModelProto
        The same inputs and outputs.

    Raises
    ------
    ModelError
        If onnxruntime cannot quantise this graph.
    MissingExtraError
        If onnx or sympy is not installed.

    Source: Jacob et al. 2018, arXiv:1712.05877.
    """
    try:
        import onnx
        from onnxruntime.quantization import (
            CalibrationMethod,
            QuantFormat,
            QuantType,
            quantize_static,
        )
        from onnxruntime.quantization.shape_inference import quant_pre_process
    except ImportError as error:
        raise MissingExtraError("quantising", "train") from error

    whole = pixels[: len(pixels) // _STRIDE * _STRIDE or None]
    with tempfile.TemporaryDirectory(prefix="lungwatch-int8-") as place:
        plain, ready, done = (Path(place) / f"{name}.onnx" for name in ("plain", "ready", "done"))
        onnx.save(proto, plain)
        try:
            # onnxruntime reports its progress on stdout, which is kept for results, and what it
            # fails at in files of the working directory.
            with contextlib.redirect_stdout(io.StringIO()), contextlib.chdir(place):
                quant_pre_process(plain, ready, skip_symbolic_shape=not symbolic_shapes)
                quantize_static(
                    ready,
                    done,
                    _reader(whole),
                    quant_format=QuantFormat.QDQ,
                    op_types_to_quantize=list(_QUANTISED),
                    nodes_to_exclude=_in_float(onnx.load(ready)),
                    per_channel=True,
                    reduce_range=narrow_weights,
                    activation_type=QuantType.QUInt8,
                    weight_type=QuantType.QInt8,
                    calibrate_method=CalibrationMethod.Percentile,
                    extra_options={
                        "WeightSymmetric": True,
                        "CalibPercentile": _PERCENTILE,
                        "CalibStridedMinMax": min(_STRIDE, len(whole)),
                    },
                )
        except Exception as error:  # onnxruntime's own errors share no base class
            raise ModelError(f"onnxruntime cannot quantise this graph: {error}") from error
        return onnx.load(done)


def describe_quantisation(
    images: Sequence[Sample], *, narrow_weights: bool = False
) -> dict[str, Any]:
    """Describe the method and images of `quantise`, for the contract's provenance."""
    import onnxruntime

    counts: dict[str, int] = {}
    for sample in images:
        name = f"{sample.source or 'unknown'}/{sample.finding}"
        counts[name] = counts.get(name, 0) + 1
    return {
        "format": "QDQ",
        "operators": list(_QUANTISED),
        "weights": f"int{7 if narrow_weights else 8}, symmetric, per channel",
        "activations": "uint8",
        "calibration": f"percentile {_PERCENTILE:g}",
        "images": dict(sorted(counts.items())),
        "onnxruntime": onnxruntime.__version__,
    }


def _in_float(proto: OnnxProto) -> list[str]:
    """Name the nodes that find the lungs: cheap, and a box that is off moves all that is seen."""
    return [
        node.name
        for node in proto.graph.node
        if any(f"/{FINDER}" in name for name in (*node.input, *node.output))
    ]


def _reader(pixels: FloatArray) -> CalibrationReader:
    from onnxruntime.quantization import CalibrationDataReader

    class Images(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime has no types
        """One image at a time, within the range that the calibrator sets."""

        def __init__(self) -> None:
            self.set_range(0, len(pixels))

        def __len__(self) -> int:
            return len(pixels)

        def set_range(self, start_index: int, end_index: int) -> None:
            self._left = iter(range(start_index, end_index))

        def get_next(self) -> dict[str, FloatArray] | None:
            index = next(self._left, None)
            return None if index is None else {INPUT: pixels[index : index + 1]}

    return Images()


@dataclass(frozen=True, kw_only=True)
class Int8Graph:
    """A quantised graph and how to read it.

    Attributes
    ----------
    proto
        The graph, without a contract yet.
    judgement
        Calibration and threshold fitted to this graph's own logits on validation.
    fidelity
        Against the float graph, by data set and split; validation first.
    about
        All of it for the contract's provenance: plain JSON values.
    """

    proto: OnnxProto
    judgement: Judgement
    fidelity: dict[str, Fidelity]
    about: dict[str, Any]


def make_int8(
    proto: OnnxProto,
    judgement: Judgement,
    data: Path,
    *,
    rule: Rule = "youden",
    labels: LabelMap | None = None,
    learnt: LearntImages | None = None,
    progress: Callable[[int], None] | None = None,
) -> Int8Graph:
    """Quantise a float graph and measure the loss.

    Parameters
    ----------
    proto
        The float graph.
    judgement
        Of the float graph.
    data
        Data set of the training. Its training split shows the activations' range, its
        validation split fits calibration and threshold, and, with the test split if there is
        one, tells what was lost.
    rule
        Of the threshold; see `lungwatch.training.evaluation.calibration.choose_decision`.
    labels
        What labels mean that are no finding.
    learnt
        Images behind the network: those of the validation split that it learnt from fit nothing.

    Raises
    ------
    DatasetError
        If the training or validation split is empty, or an image cannot be read.
    ModelError
        If the graph cannot be quantised, or loses 0.005 ROC-AUC or more on validation.
    MissingExtraError
        If onnx or sympy is not installed.
    """
    samples, name, spec = load_dataset(data, labels), dataset_name(data), judgement.preprocess
    shown = spread(of_split(samples, "train", name))
    parts = {"val": val_samples(samples, name, learnt)}
    if any(sample.split == "test" for sample in samples):
        parts["test"] = select(samples, "test", name)

    # A network that finds the lungs enlarges its masks, and shapes cannot be followed by symbols
    # through what enlarges a batch of unknown size.
    enlarges = any(node.op_type == "Resize" for node in proto.graph.node)
    made = quantise(
        proto, read_pixels(shown, spec, progress=progress), symbolic_shapes=not enlarges
    )
    plain, quantised = proto.SerializeToString(), made.SerializeToString()
    fidelity: dict[str, Fidelity] = {}
    own = judgement
    for split, chosen in parts.items():
        truth, pixels = targets(chosen), read_pixels(chosen, spec, progress=progress)
        logits, maps = _run(quantised, pixels)
        if split == "val":
            own = recalibrate(judgement, truth, logits, rule)
        float_logits, float_maps = _run(plain, pixels)
        fidelity[f"{name}/{split}"] = compare_graphs(
            truth,
            GraphAnswers(logits=float_logits, maps=float_maps, judgement=judgement),
            GraphAnswers(logits=logits, maps=maps, judgement=own),
        )
    check_loss(fidelity, f"{name}/val")
    about = {
        **describe_quantisation(shown),
        "convolutions": count_quantised(made.graph.node),
        "bytes_float": len(plain),
        "bytes_int8": len(quantised),
        "fidelity": {key: found.to_dict() for key, found in fidelity.items()},
    }
    return Int8Graph(proto=made, judgement=own, fidelity=fidelity, about=about)


def val_samples(samples: Sequence[Sample], name: str, learnt: LearntImages | None) -> list[Sample]:
    """Return the validation split without what a retrained network has learnt from.

    Raises
    ------
    DatasetError
        If it is empty or of one class only.
    """
    chosen = select(samples, "val", name)
    if learnt is None:
        return chosen
    known = learnt_from(chosen, learnt)
    rest = [sample for sample, is_known in zip(chosen, known, strict=True) if not is_known]
    return select(rest, None, f"{name}: what of split 'val' the network did not learn from")


def recalibrate(
    judgement: Judgement, truth: FloatArray, logits: FloatArray, rule: Rule = "youden"
) -> Judgement:
    """Fit calibration and threshold to binary logits, (N,), of the validation split."""
    calibration, decision = calibrate(truth, logits, rule=rule)
    return replace(judgement, calibration=calibration, decision=decision)


def _run(data: bytes, pixels: FloatArray) -> tuple[FloatArray, FloatArray]:
    session = onnx_session(data, "the exported graph")
    batches = np.array_split(pixels, max(1, math.ceil(len(pixels) / _BATCH)))
    found = [session.run([LOGITS, CAM], {INPUT: batch}) for batch in batches]
    pairs, maps = (np.concatenate(part) for part in zip(*found, strict=True))
    return np.asarray(pairs[:, 1] - pairs[:, 0]), maps


def count_quantised(nodes: Iterable[Any]) -> int:
    """Count the convolutions of a graph whose input is int8."""
    given = {name: node.op_type for node in nodes for name in node.output}
    return sum(
        node.op_type == "Conv" and given.get(node.input[0]) == "DequantizeLinear" for node in nodes
    )
