"""Data set check: problems that must be fixed, and confounds.

A logistic regression sees only the image's size, its margin or its histogram. What it
achieves, a network can achieve the same way (Zech et al. 2018, doi:10.1371/journal.pmed.1002683).
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from lungwatch.errors import MissingExtraError
from lungwatch.preprocess import BURNT_IN_LETTERS
from lungwatch.training.data.dataset import SPLITS, LabelCount, Sample, manifest_rows
from lungwatch.training.data.duplicates import DuplicatePair, find_duplicates, patient_key, together
from lungwatch.training.data.pixels import FloatArray
from lungwatch.training.data.scan import ScannedImage, Unreadable

_FOLDS = 5
_THUMBNAIL_PX = 32
_BORDER_PX = 3
# Share of the area that is blank margin.
_MOSTLY_BORDER = 0.5


@dataclass(frozen=True, kw_only=True)
class Confound:
    """Power of one feature other than the lungs to separate COVID from other classes.

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
    scans: Sequence[ScannedImage],
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
    scans
        The images.
    groups
        For each image the group that must not be on both sides of a fold.
    adults
        For each image whether it is known to be of an adult; None if nothing is known of any.

    Returns
    -------
    list of Confound
        Without those where a class has too few groups for a cross-validation.

    Raises
    ------
    MissingExtraError
        If scikit-learn is not installed.
    """
    features = features_of(scans) if scans else {}
    findings = np.array([item.sample.finding for item in scans], dtype=np.str_)
    sources = np.array([item.sample.source for item in scans], dtype=np.str_)
    among = {"all images": np.ones(len(scans), dtype=np.bool_)}
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
    """Summarise the figures in one sentence."""
    if not confounds:
        return "Too few images of each class to measure confounding by size, border or histogram."
    # The largest of many figures from few images says little: the whole set decides.
    whole = [found for found in confounds if found.among == "all images"]
    worst = max(whole or confounds, key=lambda found: found.roc_auc)
    what = f"{worst.feature} (ROC-AUC {worst.roc_auc:.2f} for COVID against {worst.against})"
    if worst.feature == "all":
        what = what.replace("all", "size, border and histogram together", 1)
    if worst.roc_auc < 0.6:
        return f"Size, border and histogram hardly predict the class; the best is {what}."
    if worst.roc_auc < 0.75:
        return f"The class can partly be predicted without the lungs, best from {what}."
    return (
        f"The class can be predicted without the lungs, best from {what}: a network that "
        "does no better may have learnt the source, so test it on sources it never saw."
    )


def features_of(scans: Sequence[ScannedImage]) -> dict[str, FloatArray]:
    """Return size, border, histogram and all of them of each image, float32 (N, columns)."""
    size = (_THUMBNAIL_PX, _THUMBNAIL_PX)
    inner = slice(_BORDER_PX, -_BORDER_PX)
    border = np.ones(size, dtype=bool)
    border[inner, inner] = False
    thumbs = [cv2.resize(item.thumbnail, size, interpolation=cv2.INTER_AREA) for item in scans]
    features = {
        "size": np.array(
            [[item.columns, item.rows, item.columns / item.rows] for item in scans],
            dtype=np.float32,
        ),
        "border": np.array([thumb[border] for thumb in thumbs], dtype=np.float32),
        "histogram": np.array([item.histogram for item in scans], dtype=np.float32),
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
        bool, shape (N,): the class that is predicted from them.
    groups
        Shape (N,): none of them is on both sides of a fold.

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


@dataclass(frozen=True, kw_only=True)
class Duplicate:
    """Two files that show the same X-ray.

    Attributes
    ----------
    first, second
        The files.
    identical
        Whether their bytes are the same.
    correlation
        Of their thumbnails' details, at most 1.
    leak
        Whether they lie in different splits.
    conflict
        Whether they are labelled differently.
    """

    first: Path
    second: Path
    identical: bool
    correlation: float
    leak: bool
    conflict: bool


@dataclass(frozen=True, kw_only=True)
class DatasetCheck:
    """Result of the check of one data set.

    Attributes
    ----------
    files
        Number of files listed.
    problems
        Problems that must be fixed, one line each, naming the file or split.
    duplicates
        Pairs of files.
    mostly_border, text_candidates
        Files to look at; both come from heuristics.
    confounds
        Features that separate the classes without the lungs.
    verdict
        The confounds in one sentence.
    left_out
        Labels that are left out because they are mapped so, a line each.
    """

    files: int
    problems: list[str]
    duplicates: list[Duplicate]
    mostly_border: list[Path]
    text_candidates: list[Path]
    confounds: list[Confound]
    verdict: str
    left_out: list[str] = field(default_factory=list)


def check_dataset(
    location: Path,
    samples: Sequence[Sample],
    scans: Sequence[ScannedImage],
    unreadable: Sequence[Unreadable],
    *,
    labels: LabelCount | None = None,
    seed: int = 1,
) -> DatasetCheck:
    """Check a data set that has been scanned.

    Parameters
    ----------
    location
        The data set's folder or manifest.
    samples
        All its files.
    scans, unreadable
        What `scan` found of them.
    labels
        The labels behind the samples, and those that are not used; by default all are.

    Raises
    ------
    MissingExtraError
        If scikit-learn is not installed.
    """
    pairs = find_duplicates(scans)
    duplicates = [_duplicate(scans, pair) for pair in pairs]
    confounds = find_confounds(
        scans, together(scans, pairs), adults=_adults(location, scans), seed=seed
    )
    problems = [f"unused: {line}" for line in labels.unknown_lines()] if labels else []
    problems += [f"unreadable: {bad.sample.path}: {bad.reason}" for bad in unreadable]
    problems += _empty_splits(location, samples)
    problems += _one_class(samples)
    problems += [
        f"leak: {pair.first} ({_split(scans, found.first)}) and {pair.second} "
        f"({_split(scans, found.second)}) show the same X-ray"
        for pair, found in zip(duplicates, pairs, strict=True)
        if pair.leak
    ]
    problems += [
        f"label conflict: {pair.first} ({scans[found.first].sample.finding}) and {pair.second} "
        f"({scans[found.second].sample.finding}) show the same X-ray"
        for pair, found in zip(duplicates, pairs, strict=True)
        if pair.conflict
    ]
    problems += _straddling_patients(scans)
    return DatasetCheck(
        files=len(samples),
        problems=problems,
        duplicates=duplicates,
        mostly_border=[item.sample.path for item in scans if item.border > _MOSTLY_BORDER],
        text_candidates=[item.sample.path for item in scans if item.text_marks >= BURNT_IN_LETTERS],
        confounds=confounds,
        verdict=verdict(confounds),
        left_out=labels.ignored_lines() if labels else [],
    )


def _adults(location: Path, scans: Sequence[ScannedImage]) -> list[bool] | None:
    rows = manifest_rows(location)
    said = [rows.get(item.sample.path, {}).get("pediatric") for item in scans]
    return [word == "0" for word in said] if any(said) else None


def _duplicate(scans: Sequence[ScannedImage], pair: DuplicatePair) -> Duplicate:
    first, second = scans[pair.first].sample, scans[pair.second].sample
    return Duplicate(
        first=first.path,
        second=second.path,
        identical=pair.identical,
        correlation=round(pair.correlation, 4),
        leak=first.split != second.split,
        conflict=first.finding != second.finding,
    )


def _split(scans: Sequence[ScannedImage], index: int) -> str:
    return scans[index].sample.split or "no split"


def _empty_splits(location: Path, samples: Sequence[Sample]) -> list[str]:
    counts = Counter(sample.split for sample in samples)
    # Training needs all three; a set for evaluation alone may be a test split alone.
    return [
        f"empty split: {location}: split '{split}' holds no images"
        for split in SPLITS
        if not counts[split] and (counts["train"] or (location / split).is_dir())
    ]


def _one_class(samples: Sequence[Sample]) -> list[str]:
    findings = defaultdict(set)
    for sample in samples:
        findings[f"split '{sample.split}'" if sample.split else "the data set"].add(sample)
    problems = []
    for part, members in findings.items():
        if len({member.positive for member in members}) < 2:
            only = ", ".join(sorted({member.finding for member in members}))
            problems.append(f"one class only: {part} holds {only} alone; COVID and others needed")
    return problems


def _straddling_patients(scans: Sequence[ScannedImage]) -> list[str]:
    first_of: dict[tuple[str, str], ScannedImage] = {}
    problems = []
    for item in scans:
        key = patient_key(item)
        if key is None:
            continue
        first = first_of.setdefault(key, item)
        if first.sample.split != item.sample.split:
            # The files name the patient well enough; a header's patient ID stays unsaid.
            problems.append(
                f"leak: {first.sample.path} ({first.sample.split}) and {item.sample.path} "
                f"({item.sample.split}) are of one patient"
            )
    return problems
