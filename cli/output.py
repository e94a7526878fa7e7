"""Output of commands: tables, fields, JSON and CSV on stdout, progress bars on stderr."""

import csv
import dataclasses
import io
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import click

from lungwatch.errors import visible

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

_EMPTY = "-"

# A spreadsheet reads a cell that begins with one of these as a formula, and file names and DICOM
# values come from outside (CWE-1236).
_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")

_COLUMN_GAP = "  "
# Narrower than this on average, folded columns are harder to read than wrapped lines.
_FOLDED_COLUMN_WIDTH = 10

_PLAIN_PROGRESS_S = 30.0


def print_table(headers: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print rows under headers, one line a row; on a terminal too narrow for that, folded."""
    cells = [[cell_text(value) for value in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(headers, *cells, strict=True)]
    terminal_width = shutil.get_terminal_size().columns
    needed = sum(widths) + len(_COLUMN_GAP) * (len(widths) - 1)
    if sys.stdout.isatty() and needed > terminal_width >= _FOLDED_COLUMN_WIDTH * len(widths):
        _print_folded(headers, cells)
        return
    for line in (headers, ["-" * width for width in widths], *cells):
        padded = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        click.echo(_COLUMN_GAP.join(padded).rstrip())


def _print_folded(headers: Sequence[str], cells: Sequence[Sequence[str]]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    # Text, not str: rich reads markup such as [red] in a str.
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for header in headers:
        table.add_column(Text(header), overflow="fold")
    for row in cells:
        table.add_row(*map(Text, row))
    Console().print(table)


class ProgressBar:
    """Progress of one task on stderr: a bar on a terminal, elsewhere a line now and then.

    Parameters
    ----------
    label
        What is being done.
    total
        Number of steps; None if it is not known.
    """

    def __init__(self, label: str, total: int | None = None) -> None:
        self._label = label
        self._total = total
        self._done = 0
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._last_line_s = time.monotonic()

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

            self._bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                console=Console(stderr=True),
                # Results on stdout must not pass through the console, which writes to stderr.
                redirect_stdout=False,
            )
            self._task = self._bar.add_task(self._label, total=self._total)
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def start(self, total: int) -> Callable[[int], None]:
        """Set the number of steps; the function returned reports steps done."""
        self.update(0, total)
        return self.advance

    def advance(self, steps: int = 1) -> None:
        """Report further steps done."""
        self.update(self._done + steps, self._total)

    def update(self, done: int, total: int | None, label: str | None = None) -> None:
        """Report how many steps are done, and of how many."""
        self._done, self._total, self._label = done, total, label or self._label
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, total=total, description=self._label)
        elif time.monotonic() - self._last_line_s >= _PLAIN_PROGRESS_S:
            of_total = "" if total is None else f" of {total}"
            self.print_line(f"{self._label}: {done}{of_total}")

    def print_line(self, line: str) -> None:
        """Print a line on stderr, above the bar if there is one."""
        self._last_line_s = time.monotonic()
        if self._bar is None:
            click.echo(visible(line), err=True)
            return
        from rich.text import Text

        self._bar.console.print(Text(visible(line)), soft_wrap=True)


def print_fields(fields: Mapping[str, object]) -> None:
    """Print names and values, one line a field."""
    width = max(map(len, fields), default=0)
    for name, value in fields.items():
        click.echo(f"{name:<{width}}  {cell_text(value, precision='.6g')}")


def cell_text(value: object, precision: str = ".3f") -> str:
    """Return a value for people: local time, few decimals, no control characters."""
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
            # A file name may hold terminal escape sequences.
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
    # Control characters and lone surrogates (a file name's bytes that are no UTF-8) occur only
    # within strings: all between them is ASCII and line feeds.
    return "".join(
        char if char == "\n" or char.isprintable() else json.dumps(char)[1:-1] for char in text
    )


def to_csv(headers: Sequence[str], rows: Iterable[Mapping[str, object]]) -> str:
    """Return rows as CSV: a header line, then a line for each row.

    A cell that a spreadsheet would read as a formula begins with an apostrophe, and control
    characters are escaped (see `visible`); JSON keeps every value as it is.
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
