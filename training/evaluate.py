"""Measure a network on data sets, and within each source, where the source gives no hint."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lungwatch.contract import OPACITY
from lungwatch.training.dataset import dataset_name, load_dataset, select
from lungwatch.training.metrics import figures, roc_auc, sigmoid
from lungwatch.training.pixels import FloatArray, read_pixels, targets
from lungwatch.training.samples import Finding, Sample, Split
from lungwatch.training.scorers import Judgement, Scorer

# Which finding should score higher than which; all of it by the score for COVID.
_PROBES: tuple[tuple[Finding, Finding], ...] = (
    ("COVID", "OTHER_PNEUMONIA"),
    ("COVID", "NORMAL"),
    ("OTHER_PNEUMONIA", "NORMAL"),
)
# An area under the curve of fewer images than this on one side says nothing.
_FEWEST = 5


def evaluate(
    scorer: Scorer,
    location: Path,
    split: Split | None = "test",
    *,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Measure a network on one split of a data set (all of it for None).

    Returns
    -------
    dict
        The fields of `Figures`, the share that is `uncertain`, and `probes`: ROC-AUC of one
        finding against another, over all sources and within each.

    Raises
    ------
    DatasetError
        If the split is empty, holds one class only, or a file is unreadable.
    """
    samples = select(load_dataset(location), split, dataset_name(location))
    pixels = read_pixels(samples, scorer.judgement.preprocess, progress=progress)
    return measure(scorer, samples, pixels)


def measure(scorer: Scorer, samples: Sequence[Sample], pixels: FloatArray) -> dict[str, Any]:
    """Measure a network on samples already read; see `evaluate`.

    Each finding beside COVID that the labels tell is measured too, under `findings`.
    """
    found = summarise(scorer.judgement, samples, scorer.logits(pixels))
    if scorer.judgement.findings:
        found["findings"] = measure_findings(scorer, samples, pixels)
    return found


def measure_findings(
    scorer: Scorer, samples: Sequence[Sample], pixels: FloatArray
) -> dict[str, Any]:
    """Measure each finding beside COVID that the labels tell, by name; see `evaluate`."""
    logits, found = scorer.finding_logits(pixels), {}
    for index, one in enumerate(scorer.judgement.findings):
        truth = finding_truth(one.name, samples)
        if truth is None:
            continue
        calibration = one.calibration
        probabilities = sigmoid(calibration.slope * logits[:, index] + calibration.intercept)
        found[one.name] = figures(truth, probabilities, one.threshold).to_dict()
    return found


def finding_truth(name: str, samples: Sequence[Sample]) -> FloatArray | None:
    """Return which images show a finding beside COVID, 0 and 1, (N,).

    An opacity is what is labelled COVID, OTHER_PNEUMONIA or OPACITY. None where the labels do
    not tell a finding, or say the same of all images.
    """
    if name != OPACITY:
        return None
    truth = np.array([sample.opaque for sample in samples], dtype=np.float32)
    return truth if 0 < truth.sum() < len(truth) else None


def summarise(
    judgement: Judgement, samples: Sequence[Sample], logits: FloatArray
) -> dict[str, Any]:
    """Measure binary logits, shape (N,), of samples in their order; see `evaluate`."""
    calibration, decision = judgement.calibration, judgement.decision
    probabilities = sigmoid(calibration.slope * logits + calibration.intercept)
    uncertain = (probabilities >= decision.uncertain_low) & (
        probabilities < decision.uncertain_high
    )
    return {
        **figures(targets(samples), probabilities, decision.threshold).to_dict(),
        "uncertain": round(float(uncertain.mean()), 6),
        "probes": {
            name: {
                "roc_auc": round(roc_auc(is_high, logits[chosen]), 6),
                "positives": int(is_high.sum()),
                "negatives": int((~is_high).sum()),
            }
            for name, (chosen, is_high) in probes(samples).items()
        },
    }


def probes(samples: Sequence[Sample]) -> dict[str, tuple[list[int], NDArray[np.bool_]]]:
    """List what is compared: one finding against another, over all sources and within each.

    Returns
    -------
    dict
        Name -> the indices of the samples, and for each whether it should score higher.
    """
    found = {}
    sources = sorted({s.source for s in samples if s.source})
    for source in [None, *sources]:
        for high, low in _PROBES:
            chosen = [
                i
                for i, s in enumerate(samples)
                if s.finding in (high, low) and source in (None, s.source)
            ]
            is_high = np.array([samples[i].finding == high for i in chosen], dtype=bool)
            if min(is_high.sum(), (~is_high).sum()) < _FEWEST:
                continue
            name = f"{high} vs {low}" + (f" within {source}" if source else "")
            found[name] = (chosen, is_high)
    return found
