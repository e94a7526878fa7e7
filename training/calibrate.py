"""From logits to a decision, on validation data: probability, threshold, abstention."""

import math
from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike

from lungwatch.contract import Calibration, Decision
from lungwatch.training.metrics import roc_curve, sigmoid

# "youden": sensitivity + specificity - 1 is largest; "balanced": the smaller of both is.
Rule = Literal["youden", "balanced"]
RULES: tuple[Rule, ...] = get_args(Rule)

# Keeps the decision inside the open interval that a contract allows.
_EDGE = 1e-6


def fit_calibration(targets: ArrayLike, logits: ArrayLike) -> Calibration:
    """Fit Platt scaling, p = sigmoid(slope * z + intercept), by maximum likelihood.

    Targets are smoothed as Platt does, so that a perfectly separated validation set gives
    finite numbers. Should the fitted slope not be positive, the score knows nothing, and the
    identity is returned: turning a score round is not calibration.

    Source: Platt 1999; Lin, Lin, Weng 2007 (Newton's method with step halving).
    """
    y = np.asarray(targets, dtype=np.float64).ravel()
    z = np.asarray(logits, dtype=np.float64).ravel()
    positives, negatives = y.sum(), len(y) - y.sum()
    t = np.where(y > 0.5, (positives + 1) / (positives + 2), 1 / (negatives + 2))
    design = np.stack([z, np.ones_like(z)], axis=1)

    def loss(w: np.ndarray) -> float:
        u = design @ w
        return float(np.sum(np.logaddexp(0.0, u) - t * u))

    weights = np.array([0.0, math.log((positives + 1) / (negatives + 1))])
    for _ in range(100):
        p = sigmoid(design @ weights)
        gradient = design.T @ (p - t)
        hessian = (design * (p * (1 - p))[:, np.newaxis]).T @ design + 1e-12 * np.eye(2)
        step = np.linalg.solve(hessian, gradient)
        size = 1.0
        while loss(weights - size * step) > loss(weights) and size > 1e-10:
            size /= 2
        weights = weights - size * step
        if float(np.abs(gradient).max()) < 1e-8:
            break
    slope, intercept = float(weights[0]), float(weights[1])
    if not slope > 0:
        return Calibration()
    return Calibration(slope=slope, intercept=intercept)


def choose_decision(
    targets: ArrayLike,
    probabilities: ArrayLike,
    abstain: float = 0.05,
    rule: Rule = "youden",
) -> Decision:
    """Fix the threshold and the band of abstention.

    Parameters
    ----------
    targets
        0 and 1, shape (N,).
    probabilities
        Calibrated, 0..1, shape (N,).
    abstain
        Fraction of these cases, those nearest to the threshold in logit, that shall be
        UNCERTAIN; 0 switches abstention off.
    rule
        What shall be largest: the sum of sensitivity and specificity ("youden"), or the
        smaller one of them ("balanced"), for an aim that is the same for both.

    Returns
    -------
    Decision
        The threshold by the rule, half-way (in logit) between the neighbouring cases.

    Source: Youden 1950.
    """
    p = np.clip(np.asarray(probabilities, dtype=np.float64).ravel(), _EDGE, 1 - _EDGE)
    z = np.log(p) - np.log1p(-p)
    fpr, tpr, thresholds = roc_curve(targets, z)
    value = tpr - fpr if rule == "youden" else np.minimum(tpr, 1.0 - fpr)
    ties = np.flatnonzero(value >= value.max() - 1e-12)
    best = int(ties[len(ties) // 2])
    upper = thresholds[max(best, 1)]
    below = z[z < upper]
    middle = (upper + below.max()) / 2 if len(below) else upper
    distances = np.sort(np.abs(z - middle))
    count = math.floor(abstain * len(z))
    half = (distances[count - 1] + distances[count]) / 2 if count else 0.0
    low, threshold, high = sigmoid([middle - half, middle, middle + half])
    return Decision(
        threshold=float(threshold), uncertain_low=float(low), uncertain_high=float(high)
    )
