"""X-rays with whatever labels their folders have: what a backbone can be pretrained on."""

import csv
import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lungwatch.errors import DatasetError
from lungwatch.training.dataset import MANIFEST, dataset_name
from lungwatch.training.samples import SPLITS, Split

_HELD_OUT_PERCENT = 15


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """A file and what is known about it; as `lungwatch.training.samples.Sample`, any label.

    Attributes
    ----------
    path
        The image file: DICOM, PNG or JPEG.
    label
        The class, by whatever name.
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


def load_labelled(location: Path) -> list[Labelled]:
    """List a data set's images, in an order that depends on their names alone.

    Parameters
    ----------
    location
        As for `lungwatch.training.dataset.load_dataset`, with any classes. Of a data set that
        is not split, 15 % of the patients (of the images, where those are unknown) are held
        out for validation, always the same.

    Raises
    ------
    DatasetError
        If there is nothing there, or train or val are empty.
    """
    manifest = location if location.is_file() else location / MANIFEST
    if manifest.is_file():
        samples = _from_manifest(manifest, dataset_name(location))
    elif location.is_dir():
        samples = _from_folders(location)
    else:
        raise DatasetError(f"{location}: no such data set (neither a folder nor a manifest)")
    if samples and all(s.split is None for s in samples):
        samples = [_held_out(s) for s in samples]
    for split in SPLITS[:2]:
        if not any(s.split == split for s in samples):
            raise DatasetError(f"{location}: no images in the split '{split}'")
    return samples


def of(samples: Sequence[Labelled], split: Split) -> list[Labelled]:
    """Take one split."""
    return [s for s in samples if s.split == split]


def count(samples: Sequence[Labelled]) -> dict[str, int]:
    """Count images by source and label, as "source/label"."""
    return dict(sorted(Counter(f"{s.source}/{s.label}" for s in samples).items()))


def _from_manifest(manifest: Path, name: str) -> list[Labelled]:
    samples = []
    try:
        with manifest.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            if missing := {"file", "label"} - set(reader.fieldnames or ()):
                raise DatasetError(f"{manifest}: column missing: {', '.join(sorted(missing))}")
            for row in reader:
                split = row.get("split") or None
                where = f"{manifest}:{reader.line_num}"
                path = manifest.parent / (row["file"] or "")
                if not row["label"]:
                    raise DatasetError(f"{where}: no label")
                if split is not None and split not in SPLITS:
                    raise DatasetError(f"{where}: unknown split {split!r} ({', '.join(SPLITS)})")
                if not path.is_file():
                    raise DatasetError(f"{where}: no such file: {row['file']}")
                samples.append(
                    Labelled(
                        path=path,
                        label=row["label"],
                        source=row.get("source") or name,
                        patient=row.get("patient") or "",
                        split=split,
                    )
                )
    except (UnicodeDecodeError, csv.Error) as error:
        raise DatasetError(f"{manifest} is no manifest: not CSV in UTF-8") from error
    return samples


def _from_folders(location: Path) -> list[Labelled]:
    name = dataset_name(location)
    split_at = [split for split in SPLITS if (location / split).is_dir()]
    places: list[tuple[Path, Split | None]] = [(location / split, split) for split in split_at]
    return [
        Labelled(path=path, label=folder.name, source=name, split=split)
        for place, split in (places or [(location, None)])
        for folder in sorted(place.iterdir())
        if folder.is_dir() and not folder.name.startswith(".")
        for path in sorted(folder.iterdir())
        if path.is_file() and not path.name.startswith(".")
    ]


def _held_out(sample: Labelled) -> Labelled:
    key = f"{sample.source}/{sample.patient or sample.path.name}"
    percent = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") % 100
    split: Split = "val" if percent < _HELD_OUT_PERCENT else "train"
    return Labelled(
        path=sample.path,
        label=sample.label,
        source=sample.source,
        patient=sample.patient,
        split=split,
    )
