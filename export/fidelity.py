"""Fidelity of a quantised graph against the float graph."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lungwatch.errors import ModelError
from lungwatch.training.metrics import roc_auc, sigmoid
from lungwatch.training.pixels import FloatArray
from lungwatch.training.scorers import Judgement

LOSS_LIMIT = 0.005


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What one graph says about some images.

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
        calibration = self.judgement.calibration
        return sigmoid(calibration.slope * self.logits + calibration.intercept)

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


def compare_graphs(truth: FloatArray, plain: Answers, int8: Answers) -> Fidelity:
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
