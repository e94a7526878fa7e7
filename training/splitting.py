"""Divide a data set so that no patient and no X-ray stands on two sides."""

import csv
import io
import os
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from lungwatch.atomicfile import write_atomic
from lungwatch.errors import DatasetError
from lungwatch.training.dataset import MANIFEST
from lungwatch.training.look import Look
from lungwatch.training.samples import SPLITS, Split

COLUMNS = (
    *("file", "label", "split", "source", "patient", "patient_known", "view", "pediatric"),
    *("finding", "licence", "url", "w", "h"),
)
Stratum = tuple[str, ...]


def split_groups(
    looks: Sequence[Look], groups: Sequence[int], *, val: float, test: float, seed: int
) -> list[Split]:
    """Give every image a split, whole groups at a time, strata alike as far as groups allow.

    Each group, the largest first, goes where it brings the counts of its strata (label, and
    label within source) closest to what they should be (Sechidis et al. 2011's idea,
    doi:10.1007/978-3-642-23808-6_10, by squared error).

    Parameters
    ----------
    looks
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
    positives = [look.sample.positive for look in looks]
    if len(set(positives)) < 2:
        only = ", ".join(sorted({look.sample.finding for look in looks}))
        raise DatasetError(f"the data set holds one class only ({only}); nothing to stratify")
    members: dict[int, list[int]] = defaultdict(list)
    for index, group in enumerate(groups):
        members[group].append(index)
    order = list(members)
    np.random.default_rng(seed).shuffle(order)
    order.sort(key=lambda group: -len(members[group]))

    totals = Counter(stratum for look in looks for stratum in _strata(look))
    shares: dict[Split, float] = {"train": 1 - val - test, "val": val, "test": test}
    placed: dict[Split, Counter[Stratum]] = {split: Counter() for split in SPLITS}
    chosen: list[Split] = ["train"] * len(looks)
    for group in order:
        adds = Counter(stratum for index in members[group] for stratum in _strata(looks[index]))
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
    target: Path, location: Path, looks: Sequence[Look], splits: Sequence[Split]
) -> None:
    """Write a manifest with paths relative to it; what an older manifest said is kept.

    Parameters
    ----------
    target
        The file to write, over an older one; its folder must be there.
    location
        The data set as it was given.
    looks, splits
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
    for look, split in zip(looks, splits, strict=True):
        sample = look.sample
        old = known.get(sample.path, {})
        patient = sample.patient
        if not patient and look.patient_id:
            # A manifest is passed around; the header's patient ID must not be in it.
            number = len(pseudonyms) + 1
            patient = pseudonyms.setdefault(look.patient_id, f"dicom-{number:04d}")
        mine = {
            "file": Path(os.path.relpath(sample.path.absolute(), base)).as_posix(),
            "label": sample.finding,
            "split": split,
            "source": sample.source,
            "patient": patient,
            "patient_known": old.get("patient_known") or str(int(bool(patient))),
            "licence": sample.licence,
            "w": look.columns,
            "h": look.rows,
        }
        writer.writerow({**dict.fromkeys(COLUMNS, ""), **old, **mine})
    try:
        write_atomic(target, text.getvalue().encode())
    except OSError as error:
        raise DatasetError(f"{target} cannot be written: {error.strerror}") from error


def _strata(look: Look) -> tuple[Stratum, ...]:
    finding = look.sample.finding
    return (finding,), (finding, look.sample.source)


def _cost(
    placed: Counter[Stratum], adds: Counter[Stratum], totals: Counter[Stratum], share: float
) -> float:
    """How much adding a group moves the strata away from their aims; below 0 brings nearer."""
    return sum(
        ((placed[key] + more - share * totals[key]) ** 2 - (placed[key] - share * totals[key]) ** 2)
        / totals[key]
        for key, more in adds.items()
    )


def manifest_rows(location: Path) -> dict[Path, Mapping[str, str]]:
    """Return what a data set's manifest says of each file, all columns; {} without one."""
    manifest = location if location.is_file() else location / MANIFEST
    if not manifest.is_file():
        return {}
    with manifest.open(newline="", encoding="utf-8") as file:
        return {manifest.parent / row["file"]: row for row in csv.DictReader(file)}
