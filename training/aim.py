"""A threshold chosen on validation data for a stated aim."""

import re
from dataclasses import dataclass
from typing import Literal, Self, cast

import numpy as np
from numpy.typing import ArrayLike

from lungwatch.contract import Decision
from lungwatch.errors import ConfigError
from lungwatch.training.calibrate import RULES, choose_decision
from lungwatch.training.metrics import sigmoid

Kind = Literal["youden", "balanced", "sensitivity", "specificity"]


@dataclass(frozen=True, kw_only=True)
class Aim:
    """What a threshold shall reach.

    Attributes
    ----------
    kind
        "youden" for the largest sensitivity + specificity - 1; "balanced" for the largest
        smaller one of the two; or the figure that shall be at least `least`, the other one
        then being as large as it can.
    least
        0..1; without meaning for "youden" and "balanced".
    """

    kind: Kind
    least: float = 0.0

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read "youden", "balanced", "sensitivity=0.95" or "specificity=0.95".

        Raises
        ------
        ConfigError
            If it is none of these.
        """
        if text in RULES:
            return cls(kind=cast(Kind, text))
        found = re.fullmatch(r"(sensitivity|specificity)=(\d*\.?\d+)", text)
        if found is None or not 0 < float(found[2]) <= 1:
            raise ConfigError(
                f"threshold aim {text!r}: write youden, sensitivity=0.95 or specificity=0.95, "
                "or balanced"
            )
        return cls(kind=cast(Kind, found[1]), least=float(found[2]))

    def __str__(self) -> str:
        return self.kind if self.kind in RULES else f"{self.kind}={self.least:g}"


def choose_threshold(targets: ArrayLike, logits: ArrayLike, aim: Aim) -> Decision:
    """Fix a threshold on cases that are used for nothing else; abstention is switched off.

    Parameters
    ----------
    targets
        0 and 1, shape (N,), both occurring.
    logits
        Calibrated, shape (N,).
    aim
        What the threshold shall reach on these cases.

    Returns
    -------
    Decision
        The threshold, half-way in logit between the neighbouring cases.
    """
    y, z = np.asarray(targets, dtype=np.float64).ravel(), np.asarray(logits, np.float64).ravel()
    if aim.kind in RULES:
        return choose_decision(y, sigmoid(z), abstain=0.0, rule=aim.kind)
    values = np.unique(z)
    cuts = np.concatenate([[values[0] - 0.5], (values[1:] + values[:-1]) / 2, [values[-1] + 0.5]])
    positives, negatives = np.sort(z[y > 0.5]), np.sort(z[y <= 0.5])
    sensitivity = 1 - np.searchsorted(positives, cuts) / len(positives)
    specificity = np.searchsorted(negatives, cuts) / len(negatives)
    aimed, other = (
        (sensitivity, specificity) if aim.kind == "sensitivity" else (specificity, sensitivity)
    )
    # 0.95 of 20 cases is 19: decimal fractions must not fail by their last bit.
    reached = np.flatnonzero(aimed >= aim.least - 1e-9)
    best = max(reached, key=lambda i: (other[i], aimed[i]))
    edge = np.finfo(np.float64).eps / 2
    threshold = float(np.clip(sigmoid(cuts[best])[0], np.finfo(np.float64).tiny, 1 - edge))
    return Decision(threshold=threshold, uncertain_low=threshold, uncertain_high=threshold)
