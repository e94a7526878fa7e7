"""Find the labelled X-rays of a data set: folders by class, by split and class, or a manifest."""

import csv
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from lungwatch.errors import DatasetError
from lungwatch.training.samples import FINDINGS, SPLITS, Sample, Split

MANIFEST = "manifest.csv"


def load_dataset(location: Path) -> list[Sample]:
    """List a data set's samples, in an order that depends on their names alone.

    Parameters
    ----------
    location
        A manifest CSV with the columns `file` (relative to it), `label`, and optionally
        `split`, `source`, `patient`, `licence`; a folder with a `manifest.csv`; or a folder
        `CLASS/` or `SPLIT/CLASS/` with the classes COVID, NORMAL and OTHER_PNEUMONIA and the
        splits train, val and test.

    Raises
    ------
    DatasetError
        If there is nothing there, a label or split is unknown, or a listed file is missing.
    """
    if location.is_file():
        return _from_manifest(location)
    if not location.is_dir():
        raise DatasetError(f"{location}: no such data set (neither a folder nor a manifest)")
    if (location / MANIFEST).is_file():
        return _from_manifest(location / MANIFEST)
    samples = _from_classes(location, None)
    for split in SPLITS:
        samples += _from_classes(location / split, split)
    if not samples:
        raise DatasetError(
            f"{location}: no images found; expected {MANIFEST}, CLASS/ or SPLIT/CLASS/ folders "
            f"with the classes {', '.join(FINDINGS)}"
        )
    return samples


def select(
    samples: Iterable[Sample], split: Split | None, what: str = "the data set"
) -> list[Sample]:
    """Take the samples of one split (all of them for None), making sure both classes occur.

    A data set that is not split at all is its own test split: that is what people have who
    only want to evaluate.

    Raises
    ------
    DatasetError
        If the split is empty or holds one class only.
    """
    chosen = of_split(samples, split, what)
    if len({s.positive for s in chosen}) < 2:
        only = ", ".join(sorted({s.finding for s in chosen}))
        name = f"{what}: split '{split}'" if split else what
        raise DatasetError(f"{name} holds one class only ({only}); COVID and others are needed")
    return chosen


def of_split(
    samples: Iterable[Sample], split: Split | None, what: str = "the data set"
) -> list[Sample]:
    """Take the samples of one split (all of them for None), whatever classes occur.

    Raises
    ------
    DatasetError
        If the split is empty.
    """
    samples = list(samples)
    whole = split is None or (split == "test" and all(s.split is None for s in samples))
    chosen = [s for s in samples if whole or s.split == split]
    name = f"{what}: split '{split}'" if split else what
    if not chosen:
        there = sorted({s.split for s in samples if s.split})
        raise DatasetError(f"{name} is empty (splits found: {', '.join(there) or 'none'})")
    return chosen


def dataset_name(location: Path) -> str:
    """Name a data set by its folder, or by its manifest where that has a name of its own."""
    place = location.resolve()
    if place.suffix != ".csv":
        return place.name
    return place.parent.name if place.name == MANIFEST else place.stem


def describe(samples: Sequence[Sample]) -> dict[str, int]:
    """Count samples by source and finding, as "source/FINDING"."""
    counts = Counter(f"{s.source or 'unknown'}/{s.finding}" for s in samples)
    return dict(sorted(counts.items()))


def licences(samples: Sequence[Sample]) -> dict[str, int]:
    """Count samples by the terms they were published under."""
    counts = Counter(s.licence.strip() or "not stated" for s in samples)
    return dict(sorted(counts.items(), key=lambda item: -item[1]))


def _from_manifest(manifest: Path) -> list[Sample]:
    try:
        with manifest.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            if missing := {"file", "label"} - set(reader.fieldnames or ()):
                raise DatasetError(f"{manifest}: column missing: {', '.join(sorted(missing))}")
            samples = [_from_row(manifest, reader.line_num, row) for row in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise DatasetError(f"{manifest} is no manifest: not CSV in UTF-8") from error
    if not samples:
        raise DatasetError(f"{manifest}: no images listed")
    return samples


def _from_row(manifest: Path, line: int, row: dict[str, str]) -> Sample:
    label, split = row["label"], row.get("split") or None
    if label not in FINDINGS:
        raise DatasetError(f"{manifest}:{line}: unknown label {label!r} ({', '.join(FINDINGS)})")
    if split is not None and split not in SPLITS:
        raise DatasetError(f"{manifest}:{line}: unknown split {split!r} ({', '.join(SPLITS)})")
    path = manifest.parent / (row["file"] or "")
    if not path.is_file():
        raise DatasetError(f"{manifest}:{line}: no such file: {row['file']}")
    return Sample(
        path=path,
        finding=label,
        split=split,
        source=row.get("source") or "",
        patient=row.get("patient") or "",
        licence=row.get("licence") or "",
    )


def _from_classes(folder: Path, split: Split | None) -> list[Sample]:
    return [
        Sample(path=path, finding=finding, split=split)
        for finding in FINDINGS
        if (folder / finding).is_dir()
        for path in sorted((folder / finding).iterdir())
        if path.is_file() and not path.name.startswith(".")
    ]
