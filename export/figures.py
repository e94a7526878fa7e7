"""Figures measured elsewhere, for instance with a source left out: read, kept, shown."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

from lungwatch.errors import ConfigError

# The key in a contract's metrics, beside the data sets, whose names all hold a "/".
FIGURES = "figures"

# Title of a table -> row -> column -> number.
Figures: TypeAlias = dict[str, dict[str, dict[str, float]]]


def read_figures(file: Path) -> Figures:
    """Read tables from JSON: {"title": {"row": {"column": number}}}.

    Raises
    ------
    ConfigError
        If it is unreadable, or not of that form.
    """
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{file} is not JSON in UTF-8") from error
    return check_figures(values, str(file))


def check_figures(values: object, where: str) -> Figures:
    """Make sure that values are tables of numbers.

    Raises
    ------
    ConfigError
        If they are not; the message names the place within `where`.
    """
    return {
        title: {
            row: {column: _number(cell, at) for column, cell, at in _items(cells, in_row)}
            for row, cells, in_row in _items(rows, in_table)
        }
        for title, rows, in_table in _items(values, where)
    }


def of_data_sets(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return what was measured on data sets at the export, without what comes from elsewhere."""
    # The names of data sets hold a "/"; tables and the release gate have one of their own.
    return {name: found for name, found in metrics.items() if "/" in name}


def figures_markdown(figures: Figures) -> str:
    """Draw the tables in Markdown, each under its title."""
    return "\n\n".join(f"### {title}\n\n{_table(rows)}" for title, rows in figures.items())


def _table(rows: Mapping[str, Mapping[str, float]]) -> str:
    columns = list(dict.fromkeys(column for cells in rows.values() for column in cells))
    lines = [["", *map(_escaped, columns)], ["---"] * (len(columns) + 1)]
    lines += [
        [_escaped(row), *(_shown(cells.get(c)) for c in columns)] for row, cells in rows.items()
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _items(values: object, where: str) -> list[tuple[str, Any, str]]:
    if not isinstance(values, dict) or not values:
        raise ConfigError(
            f'{where} holds no tables of the form {{"title": {{"row": {{"column": number}}}}}}'
        )
    for name in values:
        if not name.strip() or not name.isprintable():
            raise ConfigError(f"{where}: {name!r} is no name for a table, row or column")
    return [(name, value, f"{where}: {name}") for name, value in values.items()]


def _number(value: object, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ConfigError(f"{where} is {value!r}, not a number")
    return value


def _shown(value: float | None) -> str:
    if value is None:
        return ""
    return str(value) if isinstance(value, int) else f"{value:.3f}"


def _escaped(text: str) -> str:
    return text.replace("|", r"\|")
