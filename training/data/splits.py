"""Splits of a data set, its manifest, and the record of the images that a network learnt from.

`data.csv` in a run folder has a row for each file, so that a resumed run detects changed data.
`learnt.json` is copied into the bundle, so that an evaluation finds out which of its images the
network was trained on; it holds the first 8 bytes of their SHA-256 and nothing else.
"""

import base64
import csv
import hashlib
import io
import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass, field, fields, replace
from pathlib import Path
from typing import Self

import numpy as np

from lungwatch.bundle import ABOUT_FILE, LEARNT_FILE, read_bundle
from lungwatch.errors import ConfigError, DatasetError, ModelError
from lungwatch.files import write_atomic
from lungwatch.training.data.dataset import (
    SPLITS,
    LabelledImage,
    Sample,
    Split,
    manifest_rows,
    relative_name,
)
from lungwatch.training.data.scan import ScannedImage

COLUMNS = (
    *("file", "label", "split", "source", "patient", "patient_known", "view", "pediatric"),
    *("finding", "licence", "url", "w", "h"),
)
Stratum = tuple[str, ...]
DATA_FILE = "data.csv"
# 8 bytes: among a million images two have equal ones with a chance of 3e-8.
_BYTES = 8
_NAMED = 3


def split_groups(
    scans: Sequence[ScannedImage], groups: Sequence[int], *, val: float, test: float, seed: int
) -> list[Split]:
    """Give every image a split, whole groups at a time, strata alike as far as groups allow.

    Each group, the largest first, goes where it brings the counts of its strata (label, and
    label within source) closest to what they should be (Sechidis et al. 2011's idea,
    doi:10.1007/978-3-642-23808-6_10, by squared error).

    Parameters
    ----------
    scans
        The images.
    groups
        For each image its group.
    val, test
        Shares of the images, together below 1.
    seed
        Of the order among groups of one size.

    Raises
    ------
    DatasetError
        If the shares leave no training set, there is one class only, or a split stays empty
        or without one of the classes.
    """
    if not (val > 0 and test > 0 and val + test < 1):
        raise DatasetError("the shares for val and test must be above 0 and together below 1")
    positives = [item.sample.positive for item in scans]
    if len(set(positives)) < 2:
        only = ", ".join(sorted({item.sample.finding for item in scans}))
        raise DatasetError(f"the data set holds one class only ({only}); nothing to stratify")
    members: dict[int, list[int]] = defaultdict(list)
    for index, group in enumerate(groups):
        members[group].append(index)
    order = list(members)
    np.random.default_rng(seed).shuffle(order)
    order.sort(key=lambda group: -len(members[group]))

    totals = Counter(stratum for item in scans for stratum in _strata(item))
    shares: dict[Split, float] = {"train": 1 - val - test, "val": val, "test": test}
    placed: dict[Split, Counter[Stratum]] = {split: Counter() for split in SPLITS}
    chosen: list[Split] = ["train"] * len(scans)
    for group in order:
        adds = Counter(stratum for index in members[group] for stratum in _strata(scans[index]))
        costs = {
            split: _cost(placed[split], adds, totals, share) for split, share in shares.items()
        }
        best = min(SPLITS, key=costs.__getitem__)
        placed[best] += adds
        for index in members[group]:
            chosen[index] = best
    for split in SPLITS:
        kinds = {p for p, where in zip(positives, chosen, strict=True) if where == split}
        if len(kinds) < 2:
            fault = "holds one class only" if kinds else "is empty"
            raise DatasetError(
                f"split '{split}' {fault}: too few patients or distinct X-rays for these shares"
            )
    return chosen


def write_manifest(
    target: Path, location: Path, scans: Sequence[ScannedImage], splits: Sequence[Split]
) -> None:
    """Write a manifest with paths relative to it; columns of an older manifest are kept.

    Parameters
    ----------
    target
        The file to write, over an older one; its folder must be there.
    location
        The data set as it was given.
    scans, splits
        The images and their splits.

    Raises
    ------
    DatasetError
        If `target` cannot be written.
    """
    known = manifest_rows(location)
    pseudonyms: dict[str, str] = {}
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    base = target.absolute().parent
    for item, split in zip(scans, splits, strict=True):
        sample = item.sample
        old = known.get(sample.path, {})
        patient = sample.patient
        if not patient and item.patient_id:
            # A manifest is passed around; the header's patient ID must not be in it.
            number = len(pseudonyms) + 1
            patient = pseudonyms.setdefault(item.patient_id, f"dicom-{number:04d}")
        mine = {
            "file": Path(os.path.relpath(sample.path.absolute(), base)).as_posix(),
            "label": sample.finding,
            "split": split,
            "source": sample.source,
            "patient": patient,
            "patient_known": old.get("patient_known") or str(int(bool(patient))),
            "licence": sample.licence,
            "w": item.columns,
            "h": item.rows,
        }
        writer.writerow({**dict.fromkeys(COLUMNS, ""), **old, **mine})
    try:
        write_atomic(target, text.getvalue().encode())
    except OSError as error:
        raise DatasetError(f"{target} cannot be written: {error.strerror}") from error


def _strata(item: ScannedImage) -> tuple[Stratum, ...]:
    finding = item.sample.finding
    return (finding,), (finding, item.sample.source)


def _cost(
    placed: Counter[Stratum], adds: Counter[Stratum], totals: Counter[Stratum], share: float
) -> float:
    """Return the change of the squared distance of the strata from their targets."""
    return sum(
        ((placed[key] + more - share * totals[key]) ** 2 - (placed[key] - share * totals[key]) ** 2)
        / totals[key]
        for key, more in adds.items()
    )


@dataclass(frozen=True, kw_only=True)
class SplitRow:
    """Numbers of images of one class and source in each split."""

    label: str
    source: str
    train: int
    val: int
    test: int


@dataclass(frozen=True, kw_only=True)
class SplitTable:
    """Numbers of images in each split.

    Attributes
    ----------
    images
        In all.
    groups
        Of one patient or X-ray, each in one split alone.
    strata
        By class and source.
    all
        Their sum.
    """

    images: int
    groups: int
    strata: list[SplitRow]
    all: SplitRow


def split_table(
    scans: Sequence[ScannedImage], groups: Sequence[int], splits: Sequence[Split]
) -> SplitTable:
    """Count; `groups` and `splits` are one an image."""
    kinds = [(item.sample.finding, item.sample.source) for item in scans]
    counts = Counter(zip(kinds, splits, strict=True))
    return SplitTable(
        images=len(scans),
        groups=len(set(groups)),
        strata=[
            SplitRow(label=kind[0], source=kind[1], **{part: counts[kind, part] for part in SPLITS})
            for kind in sorted(set(kinds))
        ],
        all=SplitRow(label="all", source="", **{part: splits.count(part) for part in SPLITS}),
    )


@dataclass(frozen=True, kw_only=True)
class LearntImages:
    """Images that a network was trained on, by the first bytes of their SHA-256.

    Attributes
    ----------
    train
        Its weights were fitted to them.
    val
        They selected weights, stopped the training, or calibrated.
    """

    train: frozenset[bytes] = frozenset()
    val: frozenset[bytes] = frozenset()

    def __or__(self, other: "LearntImages") -> "LearntImages":
        return LearntImages(train=self.train | other.train, val=self.val | other.val)

    def to_json(self) -> str:
        """Return it as JSON: sorted, joined, in base64."""
        parts = {"train": self.train, "val": self.val}
        return json.dumps(
            {
                "digest": f"first {_BYTES} bytes of SHA-256",
                **{
                    name: base64.b64encode(b"".join(sorted(part))).decode("ascii")
                    for name, part in parts.items()
                },
            }
        )

    @classmethod
    def from_json(cls, data: bytes, name: str) -> Self:
        """Read it.

        Raises
        ------
        ModelError
            If it is damaged; `name` is what the message calls it.
        """
        try:
            values = json.loads(data)
            parts = [base64.b64decode(values[part], validate=True) for part in ("train", "val")]
        except (ValueError, KeyError, TypeError) as error:
            raise ModelError(f"{name} is damaged") from error
        sets = [
            frozenset(part[at : at + _BYTES] for at in range(0, len(part), _BYTES))
            for part in parts
        ]
        return cls(train=sets[0], val=sets[1])


@dataclass(frozen=True, kw_only=True)
class DataRow:
    """One file of a data set.

    Attributes
    ----------
    file
        Path relative to the data set's folder.
    sha256
        Of its bytes, hexadecimal.
    label, split
        As the run took them; "" where the data set is not split.
    patient
        Digest of source and patient, hexadecimal; "" if unknown.
    """

    file: str
    sha256: str
    label: str
    split: str
    patient: str


@dataclass(frozen=True, kw_only=True)
class DataRecord:
    """All files of a run's data, and what the network learnt from.

    Attributes
    ----------
    rows
        By file.
    learnt
        Images of this run and of those that it builds on.
    """

    rows: Mapping[str, DataRow]
    learnt: LearntImages = field(default_factory=LearntImages)

    @classmethod
    def of(
        cls, samples: Sequence[Sample | LabelledImage], labels: Sequence[str], folder: Path
    ) -> Self:
        """Record files with their labels, named relative to a folder.

        Raises
        ------
        DatasetError
            If one cannot be read.
        """
        rows = {}
        digests = sha256_of([sample.path for sample in samples])
        for sample, label, sha256 in zip(samples, labels, digests, strict=True):
            name = relative_name(sample.path, folder)
            known = f"{sample.source}\0{sample.patient}".encode() if sample.patient else b""
            rows[name] = DataRow(
                file=name,
                sha256=sha256,
                label=label,
                split=sample.split or "",
                patient=hashlib.sha256(known).hexdigest()[:16] if known else "",
            )
        return cls(rows=rows)

    @classmethod
    def of_files(cls, folder: Path) -> Self:
        """Record all files below a folder, whose names alone say what they are.

        Raises
        ------
        DatasetError
            If one cannot be read.
        """
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        rows = {
            relative_name(path, folder): DataRow(
                file=relative_name(path, folder), sha256=sha256, label="", split="", patient=""
            )
            for path, sha256 in zip(paths, sha256_of(paths), strict=True)
        }
        return cls(rows=rows)

    def under(self, name: str) -> "DataRecord":
        """Return the record with a name before each file's: of one of several data sets."""
        rows = {
            f"{name}/{file}": replace(row, file=f"{name}/{file}") for file, row in self.rows.items()
        }
        return replace(self, rows=rows)

    def __or__(self, other: "DataRecord") -> "DataRecord":
        return DataRecord(rows={**self.rows, **other.rows}, learnt=self.learnt | other.learnt)

    def by_split(self) -> "DataRecord":
        """Return the record of a network that learnt from the whole of its splits."""
        parts = {
            split: prefixes(row.sha256 for row in self.rows.values() if row.split == split)
            for split in ("train", "val")
        }
        return replace(self, learnt=LearntImages(**parts))

    def row(self, path: Path, folder: Path) -> DataRow:
        """Return a file's row."""
        return self.rows[relative_name(path, folder)]

    def check(self, root: Path) -> None:
        """Refuse to resume a run whose data have changed.

        Raises
        ------
        ConfigError
            If they have: it counts what is new, gone and changed, and names some.
        """
        before = _read(root / DATA_FILE)
        if before is None:
            return
        added = sorted(self.rows.keys() - before.keys())
        removed = sorted(before.keys() - self.rows.keys())
        changed = {
            name: [
                column.name
                for column in fields(DataRow)
                if getattr(self.rows[name], column.name) != getattr(row, column.name)
            ]
            for name, row in before.items()
            if name in self.rows and self.rows[name] != row
        }
        if not (added or removed or changed):
            return
        told = [
            f"{len(names)} {what} ({_some(names)})"
            for what, names in (
                ("added", added),
                ("removed", removed),
                ("changed", [f"{n}: {', '.join(of)}" for n, of in sorted(changed.items())]),
            )
            if names
        ]
        raise ConfigError(
            f"{root}: the data are not those that the run began with: {'; '.join(told)}. Restore "
            "them or begin a new run"
        )

    def write(self, root: Path) -> None:
        """Write `data.csv` and `learnt.json` into a run folder."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow([column.name for column in fields(DataRow)])
        writer.writerows(astuple(self.rows[name]) for name in sorted(self.rows))
        write_atomic(root / DATA_FILE, text.getvalue().encode("utf-8", "surrogateescape"))
        write_atomic(root / LEARNT_FILE, self.learnt.to_json().encode())


def learnt_of(place: Path) -> LearntImages | None:
    """Return the images that a run's or a bundle's network learnt from.

    None if there is no record of them, or nothing there.

    Raises
    ------
    ModelError
        If the record is damaged, or of another bundle.
    """
    if not place.exists():
        return None
    folder = place if place.is_dir() else place.parent
    if (folder / ABOUT_FILE).is_file():
        files = read_bundle(folder)
        files.check_digests()
        data = files.learnt
    else:
        data = (folder / LEARNT_FILE).read_bytes() if (folder / LEARNT_FILE).is_file() else None
    return None if data is None else LearntImages.from_json(data, str(folder / LEARNT_FILE))


def learnt_from(samples: Sequence[Sample | LabelledImage], learnt: LearntImages) -> list[bool]:
    """Return for each image whether a network was trained on a file of the same bytes."""
    digests = sha256_of([sample.path for sample in samples])
    return [prefix(digest) in learnt.train for digest in digests]


def sha256_of(paths: Sequence[Path], workers: int = 2) -> list[str]:
    """Return the SHA-256 of files' bytes, hexadecimal, in their order.

    Raises
    ------
    DatasetError
        If one cannot be read.
    """

    def digest(path: Path) -> str:
        try:
            return hashlib.sha256(path.read_bytes()).hexdigest()
        except OSError as error:
            raise DatasetError(f"{path}: {error.strerror}") from error

    with ThreadPoolExecutor(workers, thread_name_prefix="digest") as pool:
        return list(pool.map(digest, paths))


def prefixes(digests: Iterable[str]) -> frozenset[bytes]:
    """Return what `LearntImages` keeps of SHA-256 digests, hexadecimal."""
    return frozenset(prefix(digest) for digest in digests)


def prefix(digest: str) -> bytes:
    """Return what `LearntImages` keeps of a SHA-256 digest, hexadecimal."""
    return bytes.fromhex(digest[: 2 * _BYTES])


def _read(file: Path) -> dict[str, DataRow] | None:
    try:
        with file.open(newline="", encoding="utf-8", errors="surrogateescape") as text:
            return {row["file"]: DataRow(**row) for row in csv.DictReader(text)}
    except FileNotFoundError:
        return None
    except (TypeError, KeyError, csv.Error) as error:
        raise ConfigError(f"{file} is damaged") from error


def _some(names: Sequence[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")
