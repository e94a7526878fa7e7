"""Find the labelled X-rays of a data set: folders by class, by split and class, or a manifest."""

import csv
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lungwatch.errors import DatasetError
from lungwatch.training.label_map import OPTION, LabelCount, LabelMap
from lungwatch.training.samples import FINDINGS, SPLITS, Sample, Split

MANIFEST = "manifest.csv"
_IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".dcm", ".dicom")


@dataclass(frozen=True, kw_only=True)
class Listing:
    """The images of a data set and what is known of their labels.

    Attributes
    ----------
    samples
        Images with a finding, in an order that depends on their names alone.
    labels
        The labels behind them, and those of the images that are not among the samples.
    """

    samples: list[Sample]
    labels: LabelCount


def load_dataset(location: Path, labels: LabelMap | None = None) -> list[Sample]:
    """List a data set's samples, in an order that depends on their names alone.

    Parameters
    ----------
    location
        A manifest CSV with the columns `file` (relative to it), `label`, and optionally
        `split`, `source`, `patient`, `licence`; a folder with a `manifest.csv`; or a folder
        `CLASS/` or `SPLIT/CLASS/` with the classes COVID, NORMAL and OTHER_PNEUMONIA and the
        splits train, val and test.
    labels
        What other labels and class folders mean.

    Raises
    ------
    DatasetError
        If there is nothing there, a label or class folder is neither a finding nor mapped, a
        split is unknown, or a listed file is missing.
    """
    listing = list_dataset(location, labels)
    listing.labels.require_known(str(location))
    return listing.samples


def list_dataset(location: Path, labels: LabelMap | None = None) -> Listing:
    """List a data set's samples, and name and count the labels that are not used.

    Parameters
    ----------
    location, labels
        As for `load_dataset`.

    Raises
    ------
    DatasetError
        As `load_dataset`, but for unknown labels; and if no image has a known one.
    """
    labels = labels or LabelMap()
    manifest = location if location.is_file() else location / MANIFEST
    if manifest.is_file():
        found = _from_manifest(manifest, labels)
    elif location.is_dir():
        found = _from_folders(location, labels)
    else:
        raise DatasetError(f"{location}: no such data set (neither a folder nor a manifest)")
    listing = Listing(
        samples=[sample for _, sample in found if sample is not None],
        labels=LabelCount.of([label for label, _ in found], labels),
    )
    if not listing.samples:
        listing.labels.require_known(str(location))
        if found:
            raise DatasetError(f"{location}: {OPTION} leaves out all {len(found)} images")
        raise DatasetError(
            f"{location}: no images found; expected {MANIFEST}, CLASS/ or SPLIT/CLASS/ folders "
            f"with the classes {', '.join(FINDINGS)}"
        )
    return listing


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


# An image's label, and the sample; None for one that is not used.
_Labelled = tuple[str, Sample | None]


def _from_manifest(manifest: Path, labels: LabelMap) -> list[_Labelled]:
    try:
        with manifest.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            if missing := {"file", "label"} - set(reader.fieldnames or ()):
                raise DatasetError(f"{manifest}: column missing: {', '.join(sorted(missing))}")
            found = [_from_row(manifest, reader.line_num, row, labels) for row in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise DatasetError(f"{manifest} is no manifest: not CSV in UTF-8") from error
    if not found:
        raise DatasetError(f"{manifest}: no images listed")
    return found


def _from_row(manifest: Path, line: int, row: dict[str, str], labels: LabelMap) -> _Labelled:
    label, split = row["label"] or "", row.get("split") or None
    finding = labels.finding(label) if labels.knows(label) else None
    if finding is None:
        return label, None
    if split is not None and split not in SPLITS:
        raise DatasetError(f"{manifest}:{line}: unknown split {split!r} ({', '.join(SPLITS)})")
    path = manifest.parent / (row["file"] or "")
    if not path.is_file():
        raise DatasetError(f"{manifest}:{line}: no such file: {row['file']}")
    return label, Sample(
        path=path,
        finding=finding,
        split=split,
        source=row.get("source") or "",
        patient=row.get("patient") or "",
        licence=row.get("licence") or "",
    )


def _from_folders(location: Path, labels: LabelMap) -> list[_Labelled]:
    found = _from_classes(location, None, labels)
    for split in SPLITS:
        if (location / split).is_dir():
            found += _from_classes(location / split, split, labels)
    return found


def _from_classes(root: Path, split: Split | None, labels: LabelMap) -> list[_Labelled]:
    """List the images of all folders below a root, each labelled by its folder's path."""
    found: dict[str, list[_Labelled]] = {}
    visited: set[tuple[int, int]] = set()
    for place, folders, names in os.walk(root, followlinks=True):
        here = Path(place).relative_to(root).as_posix()
        state = Path(place).stat()
        if (state.st_dev, state.st_ino) in visited:  # a link to a folder above it
            folders.clear()
            continue
        visited.add((state.st_dev, state.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if here == ".":
            if split is None:
                folders[:] = [name for name in folders if name not in SPLITS]
            continue
        known = labels.knows(here)
        finding = labels.finding(here) if known else None
        for name in sorted(names):
            # Notes and tables beside the images are no images without a label.
            if name.startswith(".") or not (known or _looks_like_image(Path(place, name))):
                continue
            sample = (
                Sample(path=Path(place, name), finding=finding, split=split) if finding else None
            )
            found.setdefault(here, []).append((here, sample))
    order: dict[str, int] = {finding: number for number, finding in enumerate(FINDINGS)}
    return [
        one
        for here in sorted(found, key=lambda h: (order.get(h, len(order)), h))
        for one in found[here]
    ]


def _looks_like_image(path: Path) -> bool:
    if path.suffix:
        return path.name.lower().endswith(_IMAGE_ENDINGS)
    # DICOM files often have no ending; their prefix is at byte 128 (PS3.10, section 7.1).
    try:
        with path.open("rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False
