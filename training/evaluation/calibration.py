"""Calibration: Platt scaling, threshold, conformal band, and the truth file of a site's cases.

NumPy only: `lungwatch calibrate` runs in the base install.
"""

import csv
import difflib
import io
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal, Self, cast, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lungwatch.bundle import SiteCalibration
from lungwatch.contract import Calibration, Decision
from lungwatch.errors import ConfigError, LungwatchError
from lungwatch.training.evaluation.metrics import figures, roc_curve, sigmoid

# "youden": sensitivity + specificity - 1 is largest; "balanced": the smaller of both is.
Rule = Literal["youden", "balanced"]
RULES: tuple[Rule, ...] = get_args(Rule)
Kind = Literal["youden", "balanced", "sensitivity", "specificity"]
LEAST_CASES = 30
"""Of each class: Platt's two numbers cannot be told from fewer."""
METHOD = (
    "probability: Platt scaling of the logit (Platt 1999); band: split conformal prediction, "
    "class-conditional (Vovk 2012), on the logit; threshold: Youden's, within the band"
)
IDS: Mapping[str, tuple[str, ...]] = {
    "sha256": ("sha256", "sha-256", "sha"),
    "sop_uid": ("sop_uid", "sop_instance_uid", "sopinstanceuid"),
    "id": ("id", "result", "result_id"),
    "accession": ("accession", "accession_number", "accessionnumber"),
}
"""Names that a column of identifiers may have; the first kind that a file has is used."""
TRUTHS = ("truth", "ground_truth", "true_label", "diagnosis", "finding", "pcr", "covid")
COVID_WORDS = frozenset(
    {"covid", "covid-19", "covid19", "sars-cov-2", "positive", "pos", "1", "yes", "true"}
)
OTHER_WORDS = frozenset(
    {"other", "negative", "neg", "normal", "no finding", "non-covid", "noncovid", "no covid"}
    | {"not covid", "non covid", "0", "no", "false"}
)
_MAX_BYTES = 64 << 20
_NAMED = 5
# Keeps the decision inside the open interval that a contract allows.
_PROBABILITY_EDGE = 1e-6
_EDGE = 1e-9


class TruthFileError(LungwatchError):
    """A truth file cannot be used."""


@dataclass(frozen=True, kw_only=True)
class Truths:
    """Truths read from a truth file.

    Attributes
    ----------
    kind
        What its identifiers are: a key of `IDS`.
    covid
        Identifier to whether it was COVID, in the file's order.
    unknown_labels
        Words that are neither, each with the number of its lines.
    contradictory
        Identifiers with both truths; they are left out.
    """

    kind: str
    covid: dict[str, bool]
    unknown_labels: dict[str, int]
    contradictory: tuple[str, ...]


class CannotCalibrateError(LungwatchError):
    """The cases are too few, or do not support a calibration."""


@dataclass(frozen=True, kw_only=True)
class Aim:
    """Target of a threshold.

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


def apply_calibration(calibration: Calibration, logits: ArrayLike) -> NDArray[np.float64]:
    """Apply Platt scaling to binary logits, shape (N,): probabilities, 0..1, shape (N,)."""
    return sigmoid(calibration.slope * np.asarray(logits) + calibration.intercept)


def calibrate(
    targets: ArrayLike, logits: ArrayLike, *, abstain: float = 0.05, rule: Rule = "youden"
) -> tuple[Calibration, Decision]:
    """Fit Platt scaling, and choose the decision on the probabilities that it gives.

    The parameters are those of `fit_calibration` and `choose_decision`.
    """
    calibration = fit_calibration(targets, logits)
    found = apply_calibration(calibration, logits)
    return calibration, choose_decision(targets, found, abstain, rule)


def fit_calibration(targets: ArrayLike, logits: ArrayLike) -> Calibration:
    """Fit Platt scaling, p = sigmoid(slope * z + intercept), by maximum likelihood.

    Targets are smoothed as Platt does, so that a perfectly separated validation set gives
    finite numbers. If the fitted slope is not positive, the score carries no information, and the
    identity is returned: reversing a score is not calibration.

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
    p = np.clip(
        np.asarray(probabilities, dtype=np.float64).ravel(),
        _PROBABILITY_EDGE,
        1 - _PROBABILITY_EDGE,
    )
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


def least_cases(error: float) -> int:
    """Return how many cases of each class an error requires.

    The quantile of rank ceil((n + 1)(1 - error)) has to be one of n scores.
    """
    return max(LEAST_CASES, math.ceil(1 / error - 1 - _EDGE))


def conformal_band(targets: ArrayLike, logits: ArrayLike, error: float) -> tuple[float, float]:
    """Return the logits below which COVID, and above which anything else, is excluded.

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
    return float(low), float(high)


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
    covid_from, other_to = conformal_band(y, z, error)
    low = calibration.probability(covid_from)
    # The bounds of a label are half open: the excluded case itself is not above it.
    high = math.nextafter(calibration.probability(other_to), 2.0)
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


def read_truths(path: Path) -> Truths:
    """Read a truth file.

    Parameters
    ----------
    path
        CSV with a header, separated by commas, semicolons or tabs: a column of identifiers
        (`IDS`) and one of truths (`TRUTHS`, or `label` where the file has no `probability`).

    Raises
    ------
    TruthFileError
        If it cannot be read or lacks a column, or no line has a truth that is understood.
    """
    header, *lines = _lines(path)
    names = [name.strip().lstrip("'").casefold().replace(" ", "_") for name in header]
    kind, column = _id_column(path, names)
    truth = _truth_column(path, names)
    covid: dict[str, bool] = {}
    unknown: dict[str, int] = {}
    contradictory: dict[str, None] = {}
    for cells in lines:
        if max(column, truth) >= len(cells):
            continue
        # A spreadsheet's guard against formulas, as `results export` writes it.
        name = cells[column].strip().lstrip("'").strip()
        word = " ".join(cells[truth].strip().lstrip("'").casefold().replace("_", " ").split())
        if not name or not word:
            continue
        name = name.lower() if kind == "sha256" else name
        if word not in COVID_WORDS and word not in OTHER_WORDS:
            unknown[word] = unknown.get(word, 0) + 1
            continue
        if covid.setdefault(name, word in COVID_WORDS) != (word in COVID_WORDS):
            contradictory[name] = None
    if not covid:
        spelt = f": {named(unknown)}" if unknown else ""
        raise TruthFileError(f"{path} has no truth that is understood{spelt}; write COVID or other")
    for name in contradictory:
        del covid[name]
    return Truths(
        kind=kind, covid=covid, unknown_labels=unknown, contradictory=tuple(contradictory)
    )


def nearest(wanted: Mapping[str, bool], known: Mapping[str, object]) -> str:
    """Return a clause that names known identifiers like the first of the unknown ones."""
    first = next(iter(wanted), "")
    near = difflib.get_close_matches(first, list(known)[:20000], n=3, cutoff=0.3)
    return f"; the nearest to {first!r}: {', '.join(near)}" if near else ""


def named(items: Mapping[str, object] | tuple[str, ...] | list[str]) -> str:
    """Return the first few of them, and how many more there are."""
    names = list(items)
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(repr(name) for name in names[:_NAMED]) + more


def _lines(path: Path) -> Iterator[list[str]]:
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise TruthFileError(f"{path} is larger than {_MAX_BYTES >> 20} MiB")
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise TruthFileError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise TruthFileError(f"{path} is not UTF-8; save it as CSV in UTF-8") from error
    first = text.partition("\n")[0]
    delimiter = max(",;\t", key=first.count)
    try:
        rows = [row for row in csv.reader(io.StringIO(text), delimiter=delimiter) if row]
    except csv.Error as error:
        raise TruthFileError(f"{path} is no CSV file: {error}") from error
    if not rows:
        raise TruthFileError(f"{path} is empty; its first line names the columns")
    yield from rows


def _id_column(path: Path, names: list[str]) -> tuple[str, int]:
    for kind, spellings in IDS.items():
        for spelling in spellings:
            if spelling in names:
                return kind, names.index(spelling)
    raise TruthFileError(
        f"{path} has no column of identifiers ({', '.join(IDS)}); its columns are {named(names)}"
    )


def _truth_column(path: Path, names: list[str]) -> int:
    # An export's own `label` is the model's answer, and no truth.
    spellings = TRUTHS if "probability" in names else (*TRUTHS, "label")
    for spelling in spellings:
        if spelling in names:
            return names.index(spelling)
    told = " ('label' beside 'probability' is the model's own answer)" if "label" in names else ""
    raise TruthFileError(f"{path} has no column 'truth'; its columns are {named(names)}{told}")
