"""Output of commands: tables, fields, JSON, CSV."""

import csv
import dataclasses
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from lungwatch.errors import visible

_EMPTY = "-"

# A spreadsheet takes a cell that begins so for a formula, and file names and DICOM values
# come from outside (CWE-1236).
_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")


def print_table(headers: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print rows under headers, columns as wide as their content, nothing cut off."""
    from tabulate import tabulate

    cells = [[cell_text(value) for value in row] for row in rows]
    click.echo(tabulate(cells, headers=list(headers), tablefmt="simple", disable_numparse=True))


def print_fields(fields: Mapping[str, object]) -> None:
    """Print one thing's fields, a line each."""
    width = max(map(len, fields), default=0)
    for name, value in fields.items():
        click.echo(f"{name:<{width}}  {cell_text(value, precision='.6g')}")


def cell_text(value: object, precision: str = ".3f") -> str:
    """Return a value as people read it: local time, few decimals, no control characters."""
    match value:
        case None | "" | () | []:
            return _EMPTY
        case bool():
            return "yes" if value else "no"
        case float():
            return format(value, precision)
        case datetime():
            return value.astimezone().isoformat(sep=" ", timespec="seconds")
        case list() | tuple() | Mapping():
            items = value.items() if isinstance(value, Mapping) else ((None, v) for v in value)
            return ", ".join(_item_text(key, item, precision) for key, item in items)
        case _:
            # A file name must not steer the terminal.
            return visible(str(value))


def _item_text(key: str | None, value: object, precision: str) -> str:
    text = cell_text(value, precision)
    return text if key is None else f"{visible(key)} {text}"


def print_json(value: object) -> None:
    """Print a value as JSON; times are ISO 8601 with zone."""
    click.echo(to_json(value))


def to_json(value: object) -> str:
    """Return a value as JSON: dataclasses as objects, times as ISO 8601 with zone."""
    text = json.dumps(value, indent=2, ensure_ascii=False, default=_plain, allow_nan=False)
    if text.isprintable():
        return text
    # What steers a terminal, and what is no Unicode (a file name's stray bytes), stands in
    # strings only: between them there is ASCII and the line feed.
    return "".join(
        char if char == "\n" or char.isprintable() else json.dumps(char)[1:-1] for char in text
    )


def to_csv(headers: Sequence[str], rows: Iterable[Mapping[str, object]]) -> str:
    """Return rows as CSV: a header line, then a line for each row.

    A cell that might be taken for a formula begins with an apostrophe, and what is no plain
    text in it stands there as an escape (see `visible`); JSON keeps every value as it is.
    """
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
    writer.writerow(headers)
    for row in rows:
        writer.writerow([_csv_cell(row[header]) for header in headers])
    return file.getvalue()


def _csv_cell(value: object) -> object:
    match value:
        case None:
            return ""
        case datetime():
            return value.astimezone(UTC).isoformat()
        case list() | tuple():
            return _csv_cell(";".join(map(str, value)))
        case Mapping():
            return _csv_cell(json.dumps(dict(value), allow_nan=False))
        case str() | Path():
            text = str(value)
            return ("'" if text.startswith(_FORMULA_STARTS) else "") + visible(text)
        case _:
            return value


def _plain(value: Any) -> object:  # noqa: ANN401 - json's own signature
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        # Not `asdict`: it would descend into values that json can print by itself.
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")
