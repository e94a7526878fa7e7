"""Site calibration from cases with known truth: probability, threshold, conformal band.

NumPy only: `lungwatch calibrate` runs in the base install.
"""

import math
from dataclasses import dataclass
from datetime import datetime

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lungwatch.contract import Calibration, Decision
from lungwatch.errors import LungwatchError
from lungwatch.sitecalibration import SiteCalibration
from lungwatch.training.calibrate import choose_decision, fit_calibration
from lungwatch.training.metrics import figures

LEAST_CASES = 30
"""Of each class: Platt's two numbers are not told from fewer."""
METHOD = (
    "probability: Platt scaling of the logit (Platt 1999); band: split conformal prediction, "
    "class-conditional (Vovk 2012), on the logit; threshold: Youden's, within the band"
)
_EDGE = 1e-9


class CannotCalibrateError(LungwatchError):
    """The cases do not carry a calibration."""


@dataclass(frozen=True, kw_only=True)
class Band:
    """Conformal bounds of the logit.

    Attributes
    ----------
    covid_from
        COVID is excluded below it.
    other_to
        Anything else is excluded above it.
    """

    covid_from: float
    other_to: float


def least_cases(error: float) -> int:
    """Return how many cases of each class an error asks for.

    The quantile of rank ceil((n + 1)(1 - error)) has to be one of n scores.
    """
    return max(LEAST_CASES, math.ceil(1 / error - 1 - _EDGE))


def conformal_band(targets: ArrayLike, logits: ArrayLike, error: float) -> Band:
    """Bound the logits so that each class is excluded wrongly with at most `error`.

    Parameters
    ----------
    targets
        0 and 1 (COVID), shape (N,); at least `least_cases` of each.
    logits
        Of COVID, shape (N,).
    error
        0..1: the chance, for a further case exchangeable with those of its class, that its
        true label is excluded. It holds within each class, whatever the scores' distribution.

    Source: Vovk 2012, Conditional validity of inductive conformal predictors; Lei et al. 2018.
    """
    y = np.asarray(targets).ravel() > 0.5
    z = np.asarray(logits, dtype=np.float64).ravel()
    covid, other = np.sort(z[y]), np.sort(z[~y])
    # Rank from the wrong end: floor(error (n + 1)) = n + 1 - ceil((n + 1)(1 - error)).
    low = covid[_rank(len(covid), error) - 1]
    high = other[len(other) - _rank(len(other), error)]
    return Band(covid_from=float(low), other_to=float(high))


def _rank(count: int, error: float) -> int:
    rank = math.floor(error * (count + 1) + _EDGE)
    if rank < 1:
        raise CannotCalibrateError(
            f"{count} cases of a class cannot carry an error of {error:g}: "
            f"{least_cases(error)} are needed"
        )
    return rank


def decide(targets: ArrayLike, logits: ArrayLike, error: float) -> tuple[Calibration, Decision]:
    """Fit probability, threshold and band.

    Returns
    -------
    Calibration, Decision
        Of each class at most `error` is given the other's label, whatever is UNCERTAIN.

    Raises
    ------
    CannotCalibrateError
        If the scores do not rise with the truth.
    """
    y = np.asarray(targets, dtype=np.float64).ravel()
    z = np.asarray(logits, dtype=np.float64).ravel()
    calibration = fit_calibration(y, z)
    if calibration == Calibration():
        raise CannotCalibrateError(
            "the model's scores do not rise with the truth in these cases: no threshold separates "
            "them here; check the labels, or use another model"
        )
    probabilities = probabilities_of(calibration, z)
    band = conformal_band(y, z, error)
    low = calibration.probability(band.covid_from)
    # The bounds of a label are half open: the excluded case itself is not above it.
    high = math.nextafter(calibration.probability(band.other_to), 2.0)
    # Where the classes are apart no case needs abstention; the threshold lies between the bounds.
    at = choose_decision(y, probabilities, abstain=0).threshold
    threshold = min(max(at, min(low, high)), max(low, high))
    threshold = min(max(threshold, _EDGE), 1 - _EDGE)
    if low >= high:
        return calibration, Decision(
            threshold=threshold, uncertain_low=threshold, uncertain_high=threshold
        )
    return calibration, Decision(
        threshold=threshold,
        uncertain_low=min(low, threshold),
        uncertain_high=min(max(high, threshold), 1.0),
    )


def probabilities_of(calibration: Calibration, logits: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return what `Calibration.probability` gives for each logit."""
    return np.array([calibration.probability(float(logit)) for logit in logits])


def calibrate_site(
    *,
    targets: ArrayLike,
    logits: ArrayLike,
    error: float,
    model: str,
    model_sha256: str,
    made_at: datetime,
    made_with: str,
) -> SiteCalibration:
    """Make a site's record of its cases.

    Parameters
    ----------
    targets, logits
        0 and 1 (COVID), and the recorded logit, shape (N,).
    error
        Share of each class that may be given the other one's label, above 0 and below 0.5.

    Raises
    ------
    CannotCalibrateError
        If there are too few cases of a class, or the scores do not rise with the truth.
    """
    y = np.asarray(targets, dtype=np.float64).ravel()
    z = np.asarray(logits, dtype=np.float64).ravel()
    covid, other = int(y.sum()), int(len(y) - y.sum())
    needed = least_cases(error)
    if min(covid, other) < needed:
        raise CannotCalibrateError(
            f"too few cases: {covid} with COVID and {other} others are known and scored, and an "
            f"error of {error:g} needs {needed} of each"
        )
    calibration, decision = decide(y, z, error)
    p = probabilities_of(calibration, z)
    abstains = (decision.uncertain_low <= p) & (p < decision.uncertain_high)
    measured = figures(y, p, threshold=decision.threshold)
    return SiteCalibration(
        model=model,
        model_sha256=model_sha256,
        made_at=made_at.replace(microsecond=0),
        made_with=made_with,
        covid_cases=covid,
        other_cases=other,
        error=error,
        abstention=float(abstains.mean()),
        covid_abstention=float(abstains[y > 0.5].mean()),
        other_abstention=float(abstains[y < 0.5].mean()),
        roc_auc=measured.roc_auc,
        ece=measured.ece,
        method=METHOD,
        calibration=calibration,
        decision=decision,
    )
