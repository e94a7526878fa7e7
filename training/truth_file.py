"""Truth file: CSV of a site's cases with what was really the matter."""

import csv
import difflib
import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from lungwatch.errors import LungwatchError

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


class TruthFileError(LungwatchError):
    """A truth file cannot be used."""


@dataclass(frozen=True, kw_only=True)
class Truths:
    """What a file says.

    Attributes
    ----------
    kind
        What its identifiers are: a key of `IDS`.
    covid
        Identifier to whether it was COVID, in the file's order.
    unknown_labels
        Words that are neither, each with how many lines have it.
    contradictory
        Identifiers with both truths; they are left out.
    """

    kind: str
    covid: dict[str, bool]
    unknown_labels: dict[str, int]
    contradictory: tuple[str, ...]


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
