"""References measured on validation images: scale of the maps, calibration of findings, drift."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lungwatch.comparison import (
    COMPONENTS,
    GATE_ACCEPTED,
    LEAST_VALUES,
    Distribution,
    DriftReference,
    figures_of,
)
from lungwatch.contract import CAM, CAM_PEAK, COVID, EMBEDDING, FINDINGS, INPUT, LOGITS, Finding
from lungwatch.errors import DatasetError, ModelError, Reason
from lungwatch.export.gate import ExportedGate, OnnxGate
from lungwatch.export.graph import run_onnx
from lungwatch.export.quantise import LOSS_LIMIT, val_samples
from lungwatch.preprocess import (
    PreprocessSpec,
    content_of,
    lung_area_of,
    lung_mask,
    preprocess,
    share_inside,
)
from lungwatch.training.data.dataset import (
    LabelMap,
    Sample,
    Split,
    dataset_name,
    load_dataset,
    of_split,
    select,
)
from lungwatch.training.data.pixels import (
    FloatArray,
    OnnxProto,
    decode_all,
    in_batches,
    read_image,
    read_pixels,
)
from lungwatch.training.data.splits import LearntImages
from lungwatch.training.evaluation.calibration import Rule, calibrate
from lungwatch.training.evaluation.evaluation import (
    Scored,
    evaluate_findings,
    evaluate_scored,
    finding_truth,
)
from lungwatch.training.evaluation.metrics import Bootstrap, roc_auc
from lungwatch.training.evaluation.scorers import OnnxScorer

REFERENCE_PERCENTILE = 95
"""Of the COVID map's peak over the validation images called COVID: drawn with the full colour.

The largest peak of all would make one odd image decide how all others look."""
_COVID = 1
_FLAT = "cam_peak_shape"
_BATCH = 64
_AT_ONCE = 16
_OWN_SPLITS: tuple[Split, ...] = ("val", "test")


def add_peak_output(model: bytes) -> bytes:
    """Give an exported graph the output `cam_peak`, if it has none.

    The graph scales each map by its largest value; that value becomes an output, and nothing
    that was there is changed: no node, no weight, no other output, no metadata.

    Parameters
    ----------
    model
        An ONNX file's bytes, as `lungwatch export` wrote them before there was `cam_peak`.

    Returns
    -------
    bytes
        The file with `cam_peak`, float32 (N, 2): the largest value of each map before it was
        scaled to 0..1, NEGATIVE and COVID; `model` itself where it has that output already.

    Raises
    ------
    ModelError
        If `model` is no ONNX file, or its maps are not scaled as `lungwatch.export.graph` does.
    """
    import onnx
    from onnx import TensorProto, helper

    try:
        proto = onnx.load_model_from_string(model)
    except Exception as error:  # protobuf's own, whose module has no types
        raise ModelError("the model is no ONNX file") from error
    graph = proto.graph
    if CAM_PEAK in {output.name for output in graph.output}:
        return model
    peaks = _peaks(proto)
    shape = helper.make_tensor(_FLAT, TensorProto.INT64, [2], [-1, len(peaks)])
    graph.initializer.append(shape)
    graph.node.extend(
        [
            # (N, 1, 1) each, side by side.
            helper.make_node("Concat", peaks, ["cam_peak_both"], "cam_peak_both", axis=1),
            helper.make_node("Reshape", ["cam_peak_both", _FLAT], [CAM_PEAK], CAM_PEAK),
        ]
    )
    graph.output.append(
        helper.make_tensor_value_info(CAM_PEAK, TensorProto.FLOAT, ["batch", len(peaks)])
    )
    onnx.checker.check_model(proto)
    data: bytes = proto.SerializeToString()
    return data


def _peaks(proto: OnnxProto) -> list[str]:
    """Names of the tensors (N, 1, 1) that hold each map's largest value, in the maps' order."""
    made_by = {name: node for node in proto.graph.node for name in node.output}

    def step(name: str, operation: str, which: int = 0) -> str:
        node = made_by.get(name)
        if node is None or node.op_type != operation or len(node.input) <= which:
            raise ModelError(
                "the graph does not scale its maps as lungwatch's export does: export it again"
            )
        return str(node.input[which])

    stack = made_by.get(CAM)
    if stack is None or stack.op_type != "Concat" or len(stack.input) != 2:
        raise ModelError("the graph's maps are not one for each of two classes: export it again")
    peaks = []
    for one in stack.input:
        quotient = step(one, "Unsqueeze")
        # map = raw / max(peak, tiny), and peak = the largest value of the same raw map.
        peak = step(step(quotient, "Div", 1), "Max")
        if step(peak, "ReduceMax") != step(quotient, "Div", 0):
            raise ModelError("the graph scales a map by another map's peak: export it again")
        peaks.append(peak)
    return peaks


def reference_of_data(
    scorer: OnnxScorer, data: Path, labels: LabelMap | None = None
) -> float | None:
    """Return `map_reference` of a data set's validation split; None if it has none.

    Raises
    ------
    DatasetError
        If an image cannot be read.
    """
    samples = [sample for sample in load_dataset(data, labels) if sample.split == "val"]
    if not samples:
        return None
    return map_reference(scorer, read_pixels(samples, scorer.judgement.preprocess))


def map_reference(scorer: OnnxScorer, pixels: FloatArray) -> float | None:
    """Return the evidence that is drawn with the full colour.

    Parameters
    ----------
    scorer
        A graph with `cam_peak`.
    pixels
        Preprocessed validation images, (N, S, S, 1), 0..1.

    Returns
    -------
    float or None
        The 95th percentile of the COVID map's peak over the images called COVID, in the units of
        `cam_peak`; None if none of them is, or their maps are all empty.
    """
    calibration, decision = scorer.judgement.calibration, scorer.judgement.decision
    labels = [decision.label(calibration.probability(float(z))) for z in scorer.logits(pixels)]
    called = [index for index, label in enumerate(labels) if label == "COVID"]
    if not called:
        return None
    peaks = scorer.peaks(pixels[called])[:, _COVID]
    found = float(np.percentile(peaks, REFERENCE_PERCENTILE))
    return found if found > 0 else None


def fit_findings(
    names: Sequence[str], logits: FloatArray, samples: Sequence[Sample], rule: Rule = "youden"
) -> tuple[Finding, ...]:
    """Fit calibration and threshold of each finding to validation images.

    Parameters
    ----------
    names
        Of the findings.
    logits
        float32, (N, F): theirs, before calibration.
    samples
        The images, in the order of the logits.
    rule
        Of the thresholds; see `lungwatch.training.evaluation.calibration.choose_decision`.

    Raises
    ------
    DatasetError
        If the labels do not tell a finding, or say the same of all images.
    """
    found = []
    for index, name in enumerate(names):
        truth = finding_truth(name, samples)
        if truth is None:
            raise DatasetError(
                f"the validation images are not labelled with and without '{name}': neither "
                "calibration nor threshold can be fitted"
            )
        calibration, decision = calibrate(truth, logits[:, index], abstain=0.0, rule=rule)
        found.append(Finding(name=name, calibration=calibration, threshold=decision.threshold))
    return tuple(found)


def findings_of_graph(
    graph: bytes,
    names: Sequence[str],
    data: Path,
    spec: PreprocessSpec,
    *,
    rule: Rule = "youden",
    labels: LabelMap | None = None,
) -> tuple[Finding, ...]:
    """Fit an exported graph's findings to the validation split of a data set.

    Parameters
    ----------
    graph
        An ONNX file's bytes, with the output `findings`; a contract is not needed.
    names
        Of the findings, in the order of that output.
    data, labels
        Data set of the training; see `load_dataset`.
    spec
        The network's preprocessing.
    rule
        Of the thresholds.

    Raises
    ------
    DatasetError
        If images cannot be read, or as `fit_findings`.
    """
    samples, pixels = _validation(data, labels, spec)
    return fit_findings(names, _logits(graph, pixels), samples, rule)


def int8_loss(
    plain: bytes,
    quantised: bytes,
    names: Sequence[str],
    data: Path,
    spec: PreprocessSpec,
    *,
    labels: LabelMap | None = None,
) -> dict[str, dict[str, float]]:
    """Return ROC-AUC of each finding on the validation split, by the float and the int8 graph.

    Parameters
    ----------
    plain, quantised
        The bytes of either ONNX file.
    names, data, spec, labels
        As of `findings_of_graph`.

    Raises
    ------
    ModelError
        If a finding loses 0.005 ROC-AUC or more.
    DatasetError
        If images cannot be read.
    """
    samples, pixels = _validation(data, labels, spec)
    pair = _logits(plain, pixels), _logits(quantised, pixels)
    found = {}
    for index, name in enumerate(names):
        truth = finding_truth(name, samples)
        if truth is None:
            continue
        before, after = (roc_auc(truth, logits[:, index]) for logits in pair)
        found[name] = {"roc_auc_float": round(before, 6), "roc_auc_int8": round(after, 6)}
        if not before - after < LOSS_LIMIT:  # a NaN must not pass
            raise ModelError(
                f"int8 costs '{name}' {before - after:.4f} ROC-AUC on validation, the limit is "
                f"{LOSS_LIMIT} ({before:.4f} to {after:.4f}); export without --int8"
            )
    return found


def _validation(
    data: Path, labels: LabelMap | None, spec: PreprocessSpec
) -> tuple[list[Sample], FloatArray]:
    samples = of_split(load_dataset(data, labels), "val", dataset_name(data))
    return samples, read_pixels(samples, spec)


def _logits(graph: bytes, pixels: FloatArray) -> FloatArray:
    return in_batches(lambda part: run_onnx(graph, part)[FINDINGS], pixels)


def with_references(
    findings: Sequence[Finding], scorer: OnnxScorer, data: Path, labels: LabelMap | None = None
) -> tuple[Finding, ...]:
    """Give each finding the evidence that is drawn with the full colour.

    Returns
    -------
    tuple of Finding
        With the 95th percentile of each map's peak over the validation images in which the
        finding is said to be present, as the map for COVID has it; None if there are none.
    """
    samples = [sample for sample in load_dataset(data, labels) if sample.split == "val"]
    if not samples or not findings:
        return tuple(findings)
    pixels = read_pixels(samples, scorer.judgement.preprocess)
    logits, peaks = scorer.finding_logits(pixels), scorer.finding_peaks(pixels)
    scaled = []
    for index, one in enumerate(findings):
        present = [one.is_present(one.calibration.probability(float(z))) for z in logits[:, index]]
        largest = peaks[np.array(present, dtype=bool), index]
        value = float(np.percentile(largest, REFERENCE_PERCENTILE)) if len(largest) else 0.0
        scaled.append(replace(one, map_reference=value if value > 0 else None))
    return tuple(scaled)


@dataclass(frozen=True, kw_only=True)
class _Picture:
    tensor: FloatArray
    gate_tensor: FloatArray | None
    shape: tuple[int, int]
    view: str


@dataclass(frozen=True, kw_only=True)
class _Measured:
    """One picture's figures; what follows `view` is None for a picture that the gate refuses."""

    gate_score: float | None
    lung_area: float | None
    reason: Reason | None
    view: str
    logit: float | None = None
    lung_share: float | None = None
    embedding: NDArray[np.float32] | None = None


def make_reference(
    scorer: OnnxScorer,
    gate: ExportedGate | None,
    data: Path,
    *,
    labels: LabelMap | None = None,
    progress: Callable[[int], None] | None = None,
) -> DriftReference | None:
    """Measure the population that a site's results are compared with.

    Parameters
    ----------
    scorer
        The graph of the bundle.
    gate
        Its content gate, if it has one.
    data
        Data set of the training: its validation split, which the network was not trained on;
        the test split of one without.
    labels
        What to do with labels that are none of lungwatch's.

    Returns
    -------
    DriftReference or None
        None where fewer than 20 pictures can be scored.

    Raises
    ------
    DatasetError
        If images are missing or cannot be read.
    """
    samples = load_dataset(data, labels)
    split: Split = "val" if any(sample.split == "val" for sample in samples) else "test"
    chosen = of_split(samples, split, dataset_name(data))
    asked = OnnxGate(gate.onnx, gate.contract) if gate else None
    measured = list(_measure(scorer, asked, chosen, progress))
    scored = [one.embedding for one in measured if one.embedding is not None]
    if len(scored) < LEAST_VALUES:
        return None
    centre, axes = principal_axes(np.stack(scored), COMPONENTS)
    empty = DriftReference(source="", centre=centre, axes=axes, values={})
    values: dict[str, list[float]] = defaultdict(list)
    for one in measured:
        for name, value in figures_of(
            logit=one.logit,
            gate_score=one.gate_score,
            lung_area=one.lung_area,
            lung_share=one.lung_share,
            components=None if one.embedding is None else empty.components(one.embedding),
        ).items():
            values[name].append(value)
    return DriftReference(
        source=f"{dataset_name(data)}/{split}",
        centre=centre,
        axes=axes,
        values={name: Distribution.of(found).reduced() for name, found in values.items()},
        tags=_tags(measured, is_gated=gate is not None),
    )


def principal_axes(embeddings: FloatArray, most: int) -> tuple[FloatArray, FloatArray]:
    """Return the mean of embeddings, (n,), and their principal axes, (k, n), for unit variance.

    Source: Pearson 1901, by singular values. Axes without variance are left out, and each has its
    largest element above 0, so that the same embeddings give the same axes.
    """
    centre = embeddings.mean(axis=0, dtype=np.float64)
    _, sizes, axes = np.linalg.svd(embeddings - centre, full_matrices=False)
    spread = sizes / np.sqrt(max(1, len(embeddings) - 1))
    kept = np.flatnonzero(spread > 1e-6 * max(float(spread[0]), 1e-12))[:most]
    chosen = axes[kept] / spread[kept, np.newaxis]
    largest = np.take_along_axis(chosen, np.abs(chosen).argmax(axis=1)[:, np.newaxis], axis=1)
    return centre.astype(np.float32), (chosen * np.sign(largest)).astype(np.float32)


def _measure(
    scorer: OnnxScorer,
    gate: OnnxGate | None,
    samples: Sequence[Sample],
    progress: Callable[[int], None] | None,
) -> Iterator[_Measured]:
    spec = scorer.contract.preprocess
    for start in range(0, len(samples), _AT_ONCE):
        batch = samples[start : start + _AT_ONCE]
        pictures = list(decode_all(lambda one: _read(one, scorer, gate), batch, progress=progress))
        logits, cams, embeddings = scorer.session.run(
            [LOGITS, CAM, EMBEDDING], {INPUT: np.stack([one.tensor for one in pictures])}
        )
        seen = [one.gate_tensor for one in pictures if one.gate_tensor is not None]
        answers = gate.run(np.stack(seen)) if gate else [None] * len(batch)
        for index, (picture, answer) in enumerate(zip(pictures, answers, strict=True)):
            area = share = score = reason = None
            if gate and answer:
                mask = lung_mask(answer.lungs, picture.shape, gate.contract.preprocess)
                cam = cams[index][scorer.contract.labels.index(COVID)]
                share = share_inside(content_of(cam, picture.shape, spec), mask.astype(np.float32))
                area, score = lung_area_of(mask), answer.verdict.score
                reason = answer.verdict.reason
            is_scored = reason is None
            yield _Measured(
                gate_score=score,
                lung_area=area,
                reason=reason,
                view=picture.view,
                logit=float(logits[index][1] - logits[index][0]) if is_scored else None,
                lung_share=share if is_scored else None,
                embedding=embeddings[index] if is_scored else None,
            )


def _read(sample: Sample, scorer: OnnxScorer, gate: OnnxGate | None) -> _Picture:
    found = read_image(sample.path)
    pixels = found.pixels
    return _Picture(
        tensor=preprocess(pixels, scorer.contract.preprocess),
        gate_tensor=preprocess(pixels, gate.contract.preprocess) if gate else None,
        shape=(pixels.shape[0], pixels.shape[1]),
        view=(found.meta.view_position or "").strip(),
    )


def _tags(measured: Sequence[_Measured], *, is_gated: bool) -> dict[str, dict[str, int]]:
    """Count attributes that most pictures have; training files have no typical size or depth."""
    tags = {}
    if is_gated:
        tags["gate"] = dict(Counter(str(one.reason or GATE_ACCEPTED) for one in measured))
    views = Counter(one.view for one in measured)
    if views[""] * 2 < len(measured):
        tags["view"] = dict(views)
    return tags


def evaluate_sets(
    scorer: OnnxScorer,
    data: Path | None,
    evaluate: Sequence[Path],
    progress: Callable[[int], None] | None = None,
    *,
    labels: LabelMap | None = None,
    learnt: LearntImages | None = None,
) -> dict[str, Any]:
    """Measure an exported graph for its contract.

    Parameters
    ----------
    scorer
        The graph.
    data
        Data set of the training: its validation and test splits, as far as there are any.
    evaluate
        Further data sets: their test splits.
    labels
        What labels mean that are no finding.
    learnt
        Images behind the network: those of the validation split that it learnt from are left out.
    """
    wanted: list[tuple[Path, Split]] = []
    if data:
        there = {s.split for s in load_dataset(data, labels)}
        wanted += [(data, split) for split in _OWN_SPLITS if split in there]
    wanted += [(path, "test") for path in evaluate]
    found = {}
    for path, split in wanted:
        samples, name = load_dataset(path, labels), dataset_name(path)
        if split == "val":
            chosen = val_samples(samples, name, learnt)
        else:
            chosen = select(samples, split, name)
        pixels = read_pixels(chosen, scorer.judgement.preprocess, progress=progress)
        scored = Scored(samples=chosen, judgement=scorer.judgement, logits=scorer.logits(pixels))
        assessed = evaluate_scored(scored, Bootstrap())
        # By source the card says nothing beyond the probes.
        found[f"{dataset_name(path)}/{split}"] = {
            name: value for name, value in assessed.items() if name != "sources"
        }
        if scorer.judgement.findings:
            found[f"{dataset_name(path)}/{split}"]["findings"] = evaluate_findings(
                scorer, chosen, pixels
            )
    return found
