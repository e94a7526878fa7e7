"""Data set check: faults that must be mended, and remarks."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lungwatch.imaging.lettering import BURNT_IN_LETTERS
from lungwatch.training.confounds import Confound, find_confounds, verdict
from lungwatch.training.duplicates import Pair, find_duplicates
from lungwatch.training.groups import patient_key, together
from lungwatch.training.look import Look
from lungwatch.training.samples import SPLITS, Sample
from lungwatch.training.scan import Unreadable
from lungwatch.training.splitting import manifest_rows

# Half of the picture without a picture.
_MOSTLY_BORDER = 0.5


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
    """The findings about one data set.

    Attributes
    ----------
    files
        Number of files listed.
    problems
        What must be mended, a line each with the name of what is at fault.
    duplicates
        Pairs of files.
    mostly_border, text_candidates
        Files to look at; both come from heuristics.
    confounds
        What tells the classes apart without the lungs.
    verdict
        The confounds in one sentence.
    """

    files: int
    problems: list[str]
    duplicates: list[Duplicate]
    mostly_border: list[Path]
    text_candidates: list[Path]
    confounds: list[Confound]
    verdict: str


def check_dataset(
    location: Path,
    samples: Sequence[Sample],
    looks: Sequence[Look],
    unreadable: Sequence[Unreadable],
    *,
    seed: int = 1,
) -> DatasetCheck:
    """Check a data set that has been scanned.

    Parameters
    ----------
    location
        The data set's folder or manifest.
    samples
        All its files.
    looks, unreadable
        What `scan` found of them.
    seed
        Of the cross-validation's folds.

    Raises
    ------
    MissingExtraError
        If scikit-learn is not installed.
    """
    pairs = find_duplicates(looks)
    duplicates = [_duplicate(looks, pair) for pair in pairs]
    confounds = find_confounds(
        looks, together(looks, pairs), adults=_adults(location, looks), seed=seed
    )
    problems = [f"unreadable: {bad.sample.path}: {bad.reason}" for bad in unreadable]
    problems += _empty_splits(location, samples)
    problems += _one_class(samples)
    problems += [
        f"leak: {pair.first} ({_split(looks, found.first)}) and {pair.second} "
        f"({_split(looks, found.second)}) show the same X-ray"
        for pair, found in zip(duplicates, pairs, strict=True)
        if pair.leak
    ]
    problems += [
        f"label conflict: {pair.first} ({looks[found.first].sample.finding}) and {pair.second} "
        f"({looks[found.second].sample.finding}) show the same X-ray"
        for pair, found in zip(duplicates, pairs, strict=True)
        if pair.conflict
    ]
    problems += _straddling_patients(looks)
    return DatasetCheck(
        files=len(samples),
        problems=problems,
        duplicates=duplicates,
        mostly_border=[look.sample.path for look in looks if look.border > _MOSTLY_BORDER],
        text_candidates=[look.sample.path for look in looks if look.text_marks >= BURNT_IN_LETTERS],
        confounds=confounds,
        verdict=verdict(confounds),
    )


def _adults(location: Path, looks: Sequence[Look]) -> list[bool] | None:
    rows = manifest_rows(location)
    said = [rows.get(look.sample.path, {}).get("pediatric") for look in looks]
    return [word == "0" for word in said] if any(said) else None


def _duplicate(looks: Sequence[Look], pair: Pair) -> Duplicate:
    first, second = looks[pair.first].sample, looks[pair.second].sample
    return Duplicate(
        first=first.path,
        second=second.path,
        identical=pair.identical,
        correlation=round(pair.correlation, 4),
        leak=first.split != second.split,
        conflict=first.finding != second.finding,
    )


def _split(looks: Sequence[Look], index: int) -> str:
    return looks[index].sample.split or "no split"


def _empty_splits(location: Path, samples: Sequence[Sample]) -> list[str]:
    counts = Counter(sample.split for sample in samples)
    # Whoever trains needs all three; a set for evaluation alone may be a test split alone.
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


def _straddling_patients(looks: Sequence[Look]) -> list[str]:
    first_of: dict[tuple[str, str], Look] = {}
    problems = []
    for look in looks:
        key = patient_key(look)
        if key is None:
            continue
        first = first_of.setdefault(key, look)
        if first.sample.split != look.sample.split:
            # The files name the patient well enough; a header's patient ID stays unsaid.
            problems.append(
                f"leak: {first.sample.path} ({first.sample.split}) and {look.sample.path} "
                f"({look.sample.split}) are of one patient"
            )
    return problems
