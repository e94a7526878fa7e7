"""Calibration, threshold and map scale of the findings that a network scores beside COVID."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from lungwatch.contract import FINDINGS, Finding
from lungwatch.errors import DatasetError, ModelError
from lungwatch.export.fidelity import LOSS_LIMIT
from lungwatch.export.parity import run_onnx
from lungwatch.export.peaks import REFERENCE_PERCENTILE
from lungwatch.preprocess import PreprocessSpec
from lungwatch.training.calibrate import Rule, choose_decision, fit_calibration
from lungwatch.training.dataset import dataset_name, load_dataset, of_split
from lungwatch.training.evaluate import finding_truth
from lungwatch.training.label_map import LabelMap
from lungwatch.training.metrics import roc_auc, sigmoid
from lungwatch.training.pixels import FloatArray, read_pixels
from lungwatch.training.samples import Sample
from lungwatch.training.scorers import OnnxScorer

_BATCH = 64


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
        Of the thresholds; see `lungwatch.training.calibrate.choose_decision`.

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
        calibration = fit_calibration(truth, logits[:, index])
        probabilities = sigmoid(calibration.slope * logits[:, index] + calibration.intercept)
        decision = choose_decision(truth, probabilities, abstain=0.0, rule=rule)
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
    data
        Data set of the training.
    spec
        The network's preprocessing.
    rule
        Of the thresholds.
    labels
        What to do with labels that are none of lungwatch's.

    Raises
    ------
    DatasetError
        If images cannot be read, or as `fit_findings`.
    """
    samples = of_split(load_dataset(data, labels), "val", dataset_name(data))
    return fit_findings(names, _logits(graph, read_pixels(samples, spec)), samples, rule)


def int8_loss(
    plain: bytes,
    quantised: bytes,
    names: Sequence[str],
    data: Path,
    spec: PreprocessSpec,
    *,
    labels: LabelMap | None = None,
) -> dict[str, dict[str, float]]:
    """Return what quantising costs each finding on the validation split: ROC-AUC of both graphs.

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
    samples = of_split(load_dataset(data, labels), "val", dataset_name(data))
    pixels = read_pixels(samples, spec)
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


def _logits(graph: bytes, pixels: FloatArray) -> FloatArray:
    parts = [
        run_onnx(graph, pixels[start : start + _BATCH])[FINDINGS]
        for start in range(0, len(pixels), _BATCH)
    ]
    return np.concatenate(parts)


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
