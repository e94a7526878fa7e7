"""Measure whether the classes can be told apart without looking at the lungs.

A logistic regression sees only the image's size, its margin or its histogram. What it
achieves, a network can achieve the same way (Zech et al. 2018, doi:10.1371/journal.pmed.1002683).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from lungwatch.errors import MissingExtraError
from lungwatch.training.look import Look
from lungwatch.training.pixels import FloatArray

_FOLDS = 5
_THUMBNAIL_PX = 32
_BORDER_PX = 3


@dataclass(frozen=True, kw_only=True)
class Confound:
    """How well one thing that is not the lungs tells COVID from others.

    Attributes
    ----------
    among
        "all images", "adults", or "source NAME".
    against
        The findings COVID is compared with.
    feature
        "size", "border", "histogram" or "all".
    roc_auc, fold_std
        Mean and standard deviation over the folds of a cross-validation.
    """

    among: str
    against: str
    feature: str
    roc_auc: float
    fold_std: float


def find_confounds(
    looks: Sequence[Look],
    groups: Sequence[int],
    *,
    adults: Sequence[bool] | None = None,
    seed: int = 1,
) -> list[Confound]:
    """Measure each feature against all other findings together and each alone.

    Among all images; among adults, since children are small, and mostly of one class; and
    within each source that has both classes, where the source itself can give nothing away.

    Parameters
    ----------
    looks
        The images.
    groups
        For each image the group that must not be on both sides of a fold.
    adults
        For each image whether it is known to be of an adult; None if nothing is known of any.
    seed
        Of the folds.

    Returns
    -------
    list of Confound
        Without those where a class has too few groups for a cross-validation.

    Raises
    ------
    MissingExtraError
        If scikit-learn is not installed.
    """
    features = features_of(looks) if looks else {}
    findings = np.array([look.sample.finding for look in looks], dtype=np.str_)
    sources = np.array([look.sample.source for look in looks], dtype=np.str_)
    among = {"all images": np.ones(len(looks), dtype=np.bool_)}
    if adults is not None and any(adults) and not all(adults):
        among["adults"] = np.asarray(adults, dtype=np.bool_)
    if len(names := sorted(set(sources.tolist()))) > 1:
        among |= {f"source {name}": sources == name for name in names if name}
    members = np.asarray(groups)
    found = []
    for part, inside in among.items():
        for against, versus in _comparisons(findings[inside]).items():
            chosen = np.flatnonzero(inside)[versus]
            positive = findings[chosen] == "COVID"
            for feature, columns in features.items():
                areas = cross_validate(columns[chosen], positive, members[chosen], seed)
                if areas:
                    found.append(
                        Confound(
                            among=part,
                            against=against,
                            feature=feature,
                            roc_auc=float(np.mean(areas)),
                            fold_std=float(np.std(areas)),
                        )
                    )
    return found


def _comparisons(findings: NDArray[np.str_]) -> dict[str, NDArray[np.bool_]]:
    """Name what COVID is compared with -> which images take part, shape (N,)."""
    positive = findings == "COVID"
    comparisons = {"all others": np.ones(len(findings), dtype=np.bool_)}
    others = sorted(set(findings[~positive].tolist()))
    if len(others) > 1:
        comparisons |= {other: positive | (findings == other) for other in others}
    return comparisons


def verdict(confounds: Sequence[Confound]) -> str:
    """Say in one sentence what the figures mean."""
    if not confounds:
        return "Too few images of each class to tell whether size, border or histogram betray it."
    # The largest of many figures from few images says little: the whole set decides.
    whole = [found for found in confounds if found.among == "all images"]
    worst = max(whole or confounds, key=lambda found: found.roc_auc)
    what = f"{worst.feature} (ROC-AUC {worst.roc_auc:.2f} for COVID against {worst.against})"
    if worst.feature == "all":
        what = what.replace("all", "size, border and histogram together", 1)
    if worst.roc_auc < 0.6:
        return f"Size, border and histogram hardly betray the class; best is {what}."
    if worst.roc_auc < 0.75:
        return f"The class can partly be guessed without the lungs, best from {what}."
    return (
        f"The class can be told without looking at the lungs, best from {what}: a network that "
        "does no better may have learnt the source, so test it on sources it never saw."
    )


def features_of(looks: Sequence[Look]) -> dict[str, FloatArray]:
    """Return size, border, histogram and all of them of each image, float32 (N, columns)."""
    size = (_THUMBNAIL_PX, _THUMBNAIL_PX)
    inner = slice(_BORDER_PX, -_BORDER_PX)
    border = np.ones(size, dtype=bool)
    border[inner, inner] = False
    thumbs = [cv2.resize(look.thumbnail, size, interpolation=cv2.INTER_AREA) for look in looks]
    features = {
        "size": np.array(
            [[look.columns, look.rows, look.columns / look.rows] for look in looks],
            dtype=np.float32,
        ),
        "border": np.array([thumb[border] for thumb in thumbs], dtype=np.float32),
        "histogram": np.array([look.histogram for look in looks], dtype=np.float32),
    }
    return features | {"all": np.concatenate(list(features.values()), axis=1)}


def cross_validate(
    columns: FloatArray, positive: NDArray[np.bool_], groups: NDArray[np.int_], seed: int
) -> list[float]:
    """Return the ROC-AUC of a logistic regression on each fold that was held back.

    Parameters
    ----------
    columns
        float32, shape (N, columns).
    positive
        bool, shape (N,): what is told from them.
    groups
        Shape (N,): none of them is on both sides of a fold.
    seed
        Of the folds.

    Returns
    -------
    list of float
        Empty where a class has too few groups.

    Raises
    ------
    MissingExtraError
        If scikit-learn is not installed.
    """
    try:
        from sklearn.linear_model import LogisticRegression
        from sklearn.metrics import roc_auc_score
        from sklearn.model_selection import StratifiedGroupKFold
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
        from threadpoolctl import threadpool_limits  # a dependency of scikit-learn
    except ImportError as error:
        raise MissingExtraError("the check for confounds", "train") from error

    smaller = min(len(set(groups[positive].tolist())), len(set(groups[~positive].tolist())))
    if smaller < 2:
        return []
    folds = StratifiedGroupKFold(min(_FOLDS, smaller), shuffle=True, random_state=seed)
    areas = []
    for train, test in folds.split(columns, positive, groups):
        # Groups can be so uneven that a fold gets one class only.
        if len(set(positive[train].tolist())) < 2 or len(set(positive[test].tolist())) < 2:
            continue
        logistic = LogisticRegression(C=0.1, max_iter=2000, tol=1e-3)
        model = make_pipeline(StandardScaler(), logistic)
        # Threads cost more than they save on so few rows.
        with threadpool_limits(1):
            model.fit(columns[train], positive[train])
        areas.append(float(roc_auc_score(positive[test], model.decision_function(columns[test]))))
    return areas
