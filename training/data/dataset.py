"""Labelled images of a data set: samples, label map, folders and manifests."""

import csv
import difflib
import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, Self, cast, get_args

from lungwatch.errors import ConfigError, DatasetError
from lungwatch.files import FileKind, file_kind

ImageClass = Literal["COVID", "NORMAL", "OTHER_PNEUMONIA"]
Split = Literal["train", "val", "test"]
CLASSES: tuple[ImageClass, ...] = get_args(ImageClass)
SPLITS: tuple[Split, ...] = get_args(Split)
MANIFEST = "manifest.csv"
IGNORE = "ignore"
OPTION = "--label-map"
_OPAQUE = frozenset({"COVID", "OTHER_PNEUMONIA", "OPACITY"})
_IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".dcm", ".dicom")
_NAMED = 10
_HELD_OUT_PERCENT = 15


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One labelled image file of a data set.

    Attributes
    ----------
    path
        The image file: DICOM, PNG or JPEG.
    finding
        Class of the X-ray. The network learns COVID against all the rest.
    split
        The part of the data set it belongs to; None where the data set is not split.
    source
        The collection it comes from; "" if unknown. A network that can tell sources apart
        needs no lungs, so figures are given within sources too.
    patient
        The patient's pseudonym within the source; "" if unknown.
    licence
        The terms it was published under; "" if unknown.
    """

    path: Path
    finding: ImageClass
    split: Split | None = None
    source: str = ""
    patient: str = ""
    licence: str = ""

    @property
    def positive(self) -> bool:
        """True if the X-ray is labelled COVID."""
        return self.finding == "COVID"

    @property
    def opaque(self) -> bool:
        """True if the label implies an opacity of the lungs, of COVID or another cause."""
        return self.finding in _OPAQUE


@dataclass(frozen=True, kw_only=True)
class LabelMap:
    """Meaning of labels that are not the name of a class.

    Attributes
    ----------
    meanings
        Label -> finding; None where images with the label are left out. A label of a manifest's
        row, or the path of a class folder relative to the data set or to its split, as
        "PNEUMONIA" or "COVID/images". Findings may be mapped, too.
    """

    meanings: Mapping[str, ImageClass | None] = field(default_factory=dict)

    @classmethod
    def parse(cls, texts: Iterable[str]) -> Self:
        """Read "LABEL=FINDING" and "LABEL=ignore".

        Raises
        ------
        ConfigError
            If one is neither, or a label has two meanings.
        """
        meanings: dict[str, ImageClass | None] = {}
        for text in texts:
            label, equals, meaning = text.rpartition("=")
            if not equals or meaning not in (*CLASSES, IGNORE):
                raise ConfigError(
                    f"{OPTION} {text!r} is neither LABEL={'|'.join(CLASSES)} nor LABEL={IGNORE}"
                )
            found = None if meaning == IGNORE else cast("ImageClass", meaning)
            if meanings.setdefault(label, found) != found:
                raise ConfigError(f"{OPTION}: {label!r} has two meanings")
        return cls(meanings=meanings)

    def knows(self, label: str) -> bool:
        """Return whether the label is a class or is mapped."""
        return label in self.meanings or label in CLASSES

    def finding(self, label: str) -> ImageClass | None:
        """Return what a known label means; None for one whose images are left out."""
        if label in self.meanings:
            return self.meanings[label]
        return cast("ImageClass", label)

    def to_dict(self) -> dict[str, str]:
        """Return label -> finding or "ignore", sorted."""
        return {label: meaning or IGNORE for label, meaning in sorted(self.meanings.items())}


@dataclass(frozen=True, kw_only=True)
class LabelCount:
    """Numbers of images by label, for labels that are mapped, ignored or unknown.

    Attributes
    ----------
    mapped
        Images by label, of labels that the map gives a finding.
    ignored
        Images by label, of labels that the map leaves out.
    unknown
        Images by label, of labels that are no finding and are not mapped.
    """

    mapped: Mapping[str, int]
    ignored: Mapping[str, int]
    unknown: Mapping[str, int]

    @classmethod
    def of(cls, labels: Sequence[str], label_map: LabelMap) -> Self:
        """Count the labels of a data set's images."""
        mapped, ignored, unknown = Counter[str](), Counter[str](), Counter[str]()
        for label in labels:
            if not label_map.knows(label):
                unknown[label] += 1
            elif label_map.finding(label) is None:
                ignored[label] += 1
            elif label in label_map.meanings:
                mapped[label] += 1
        return cls(mapped=dict(mapped), ignored=dict(ignored), unknown=dict(unknown))

    def lines(self) -> list[str]:
        """Name and count the labels that are not used, a line each; empty if there are none."""
        return [*self.unknown_lines(), *self.ignored_lines()]

    def unknown_lines(self) -> list[str]:
        """Name and count the labels that are no finding and not mapped."""
        return [
            f"label {label!r}: {n} images not used: no finding and not in {OPTION}"
            for label, n in sorted(self.unknown.items())
        ]

    def ignored_lines(self) -> list[str]:
        """Name and count the labels that the map leaves out."""
        return [
            f"label {label!r}: {n} images left out, as {OPTION} says"
            for label, n in sorted(self.ignored.items())
        ]

    def require_known(self, what: str) -> None:
        """Refuse unknown labels: only the user can say what they mean.

        Raises
        ------
        DatasetError
            If there are any; they are named and counted.
        """
        if not self.unknown:
            return
        unknown = sorted(self.unknown.items())
        named = ", ".join(f"{label!r} ({n} images)" for label, n in unknown[:_NAMED])
        if len(unknown) > _NAMED:
            named += f" and {len(unknown) - _NAMED} more"
        first = unknown[0][0]
        near = difflib.get_close_matches(first.upper(), CLASSES, n=1, cutoff=0.5)
        raise DatasetError(
            f"{what}: unknown label {named}: not one of {', '.join(CLASSES)}; say what it is, "
            f"with {OPTION} '{first}={near[0] if near else 'OTHER_PNEUMONIA'}' or "
            f"'{first}={IGNORE}'"
        )


@dataclass(frozen=True, kw_only=True)
class Listing:
    """Images of a data set and their labels.

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
            f"with the classes {', '.join(CLASSES)}"
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
    """Take the samples of one split (all of them for None), of any classes.

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


def relative_name(path: Path, location: Path) -> str:
    """Name a file relative to its data set's folder; by its whole path if it is elsewhere."""
    root = location.parent if location.is_file() else location
    return (path.relative_to(root) if path.is_relative_to(root) else path).as_posix()


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


def manifest_rows(location: Path) -> dict[Path, Mapping[str, str]]:
    """Return the manifest's row of each file, all columns; {} without a manifest."""
    manifest = location if location.is_file() else location / MANIFEST
    if not manifest.is_file():
        return {}
    return {manifest.parent / row["file"]: row for _, row in _read_manifest(manifest)}


def _read_manifest(manifest: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Read the rows of a manifest, each with its place for messages."""
    try:
        with manifest.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            if missing := {"file", "label"} - set(reader.fieldnames or ()):
                raise DatasetError(f"{manifest}: column missing: {', '.join(sorted(missing))}")
            for row in reader:
                yield f"{manifest}:{reader.line_num}", row
    except (UnicodeDecodeError, csv.Error) as error:
        raise DatasetError(f"{manifest} is no manifest: not CSV in UTF-8") from error


def _split_and_path(
    manifest: Path, where: str, row: Mapping[str, str]
) -> tuple[Split | None, Path]:
    split = row.get("split") or None
    if split is not None and split not in SPLITS:
        raise DatasetError(f"{where}: unknown split {split!r} ({', '.join(SPLITS)})")
    path = manifest.parent / (row["file"] or "")
    if not path.is_file():
        raise DatasetError(f"{where}: no such file: {row['file']}")
    return split, path


def _from_manifest(manifest: Path, labels: LabelMap) -> list[_Labelled]:
    found: list[_Labelled] = []
    for where, row in _read_manifest(manifest):
        label = row["label"] or ""
        finding = labels.finding(label) if labels.knows(label) else None
        if finding is None:
            found.append((label, None))
            continue
        split, path = _split_and_path(manifest, where, row)
        sample = Sample(
            path=path,
            finding=finding,
            split=split,
            source=row.get("source") or "",
            patient=row.get("patient") or "",
            licence=row.get("licence") or "",
        )
        found.append((label, sample))
    if not found:
        raise DatasetError(f"{manifest}: no images listed")
    return found


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
    order: dict[str, int] = {finding: number for number, finding in enumerate(CLASSES)}
    return [
        one
        for here in sorted(found, key=lambda h: (order.get(h, len(order)), h))
        for one in found[here]
    ]


def _looks_like_image(path: Path) -> bool:
    if path.suffix:
        return path.name.lower().endswith(_IMAGE_ENDINGS)
    # DICOM files often have no ending.
    try:
        return file_kind(path) is FileKind.DICOM
    except OSError:
        return False


@dataclass(frozen=True, kw_only=True)
class LabelledImage:
    """One image file with any label, for pretraining; otherwise as `Sample`.

    Attributes
    ----------
    path
        The image file: DICOM, PNG or JPEG.
    label
        The class, by any name.
    source
        The collection it comes from; the data set's name if unknown.
    patient
        The patient's pseudonym within the source; "" if unknown.
    split
        The part of the data set it belongs to.
    """

    path: Path
    label: str
    source: str
    patient: str = ""
    split: Split | None = None


def load_labelled(location: Path) -> list[LabelledImage]:
    """List a data set's images with any labels, in the order of their names.

    Parameters
    ----------
    location
        As for `load_dataset`, with any classes. Of a data set that is not split, 15 % of the
        patients (of the images, where those are unknown) are held out for validation, always
        the same.

    Raises
    ------
    DatasetError
        If there is nothing there, or train or val are empty.
    """
    manifest = location if location.is_file() else location / MANIFEST
    if manifest.is_file():
        samples = list(_labelled_manifest(manifest, dataset_name(location)))
    elif location.is_dir():
        samples = _labelled_folders(location)
    else:
        raise DatasetError(f"{location}: no such data set (neither a folder nor a manifest)")
    if samples and all(s.split is None for s in samples):
        samples = [replace(s, split=_held_out(s)) for s in samples]
    for split in SPLITS[:2]:
        if not any(s.split == split for s in samples):
            raise DatasetError(f"{location}: no images in the split '{split}'")
    return samples


def labelled_split(samples: Sequence[LabelledImage], split: Split) -> list[LabelledImage]:
    """Take one split."""
    return [s for s in samples if s.split == split]


def count_labels(samples: Sequence[LabelledImage]) -> dict[str, int]:
    """Count images by source and label, as "source/label"."""
    return dict(sorted(Counter(f"{s.source}/{s.label}" for s in samples).items()))


def _labelled_manifest(manifest: Path, name: str) -> Iterator[LabelledImage]:
    for where, row in _read_manifest(manifest):
        if not row["label"]:
            raise DatasetError(f"{where}: no label")
        split, path = _split_and_path(manifest, where, row)
        yield LabelledImage(
            path=path,
            label=row["label"],
            source=row.get("source") or name,
            patient=row.get("patient") or "",
            split=split,
        )


def _labelled_folders(location: Path) -> list[LabelledImage]:
    name = dataset_name(location)
    places: list[tuple[Path, Split | None]] = [
        (location / split, split) for split in SPLITS if (location / split).is_dir()
    ]
    return [
        LabelledImage(path=path, label=folder.name, source=name, split=split)
        for place, split in (places or [(location, None)])
        for folder in sorted(place.iterdir())
        if folder.is_dir() and not folder.name.startswith(".")
        for path in sorted(folder.iterdir())
        if path.is_file() and not path.name.startswith(".")
    ]


def _held_out(sample: LabelledImage) -> Split:
    key = f"{sample.source}/{sample.patient or sample.path.name}"
    percent = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") % 100
    return "val" if percent < _HELD_OUT_PERCENT else "train"
