"""The int8 graph that may ship: quantised, calibrated anew, and held against the float graph."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lungwatch.contract import CAM, INPUT, LOGITS
from lungwatch.export.fidelity import Answers, Fidelity, check_loss, compare_graphs
from lungwatch.export.quantise import describe_quantisation, quantise, spread
from lungwatch.training.calibrate import Rule, choose_decision, fit_calibration
from lungwatch.training.data_record import LearntImages, learnt_from
from lungwatch.training.dataset import dataset_name, load_dataset, of_split, select
from lungwatch.training.foreign import OnnxProto
from lungwatch.training.label_map import LabelMap
from lungwatch.training.metrics import sigmoid
from lungwatch.training.pixels import FloatArray, read_pixels, targets
from lungwatch.training.samples import Sample
from lungwatch.training.scorers import Judgement, onnx_session

_BATCH = 64


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
    """Quantise a float graph and prove what it costs.

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
        Of the threshold; see `lungwatch.training.calibrate.choose_decision`.
    labels
        What labels mean that are no finding.
    learnt
        Images behind the network: those of the validation split that it learnt from fit nothing.
    progress
        Called with 1 for every image read.

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
        before = Answers(**_named(_run(plain, pixels)), judgement=judgement)
        after = Answers(logits=logits, maps=maps, judgement=own)
        fidelity[f"{name}/{split}"] = compare_graphs(truth, before, after)
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
    calibration = fit_calibration(truth, logits)
    probabilities = sigmoid(calibration.slope * logits + calibration.intercept)
    decision = choose_decision(truth, probabilities, rule=rule)
    return replace(judgement, calibration=calibration, decision=decision)


def _run(data: bytes, pixels: FloatArray) -> tuple[FloatArray, FloatArray]:
    session = onnx_session(data, "the exported graph")
    batches = np.array_split(pixels, max(1, math.ceil(len(pixels) / _BATCH)))
    found = [session.run([LOGITS, CAM], {INPUT: batch}) for batch in batches]
    pairs, maps = (np.concatenate(part) for part in zip(*found, strict=True))
    return np.asarray(pairs[:, 1] - pairs[:, 0]), maps


def _named(found: tuple[FloatArray, FloatArray]) -> dict[str, FloatArray]:
    return {"logits": found[0], "maps": found[1]}


def count_quantised(nodes: Iterable[Any]) -> int:
    """Count the convolutions of a graph whose input is int8."""
    given = {name: node.op_type for node in nodes for name in node.output}
    return sum(
        node.op_type == "Conv" and given.get(node.input[0]) == "DequantizeLinear" for node in nodes
    )
