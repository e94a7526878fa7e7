"""Calibration, threshold and map scale of the findings that a network scores beside COVID."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from lungwatch.contract import FINDINGS, Finding
from lungwatch.errors import DatasetError
from lungwatch.export.parity import run_onnx
from lungwatch.export.peaks import REFERENCE_PERCENTILE
from lungwatch.preprocess import PreprocessSpec
from lungwatch.training.calibrate import Rule, choose_decision, fit_calibration
from lungwatch.training.dataset import dataset_name, load_dataset, of_split
from lungwatch.training.evaluate import finding_truth
from lungwatch.training.label_map import LabelMap
from lungwatch.training.metrics import sigmoid
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
    pixels = read_pixels(samples, spec)
    parts = [
        run_onnx(graph, pixels[start : start + _BATCH])[FINDINGS]
        for start in range(0, len(pixels), _BATCH)
    ]
    return fit_findings(names, np.concatenate(parts), samples, rule)


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
