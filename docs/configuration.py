"""Writes the table in configuration.md from the `Config` class: python docs/configuration.py."""

import inspect
import json
from dataclasses import fields
from pathlib import Path

from lungwatch.daemon import config
from lungwatch.daemon.config import Config

PAGE = Path(__file__).with_suffix(".md")
BEGIN = "<!-- The table is written by configuration.py from the Config class. -->\n"
END = "<!-- end of the table -->\n"


def rendered(page: str) -> str:
    """Return the page with its table as the code has it."""
    before, _, rest = page.partition(BEGIN)
    return before + BEGIN + table() + END + rest.partition(END)[2]


def table() -> str:
    """Return a Markdown table, one row for each entry of the class's docstring."""
    defaults = {field.name: field.default for field in fields(Config)}
    rows = ["| key | default | range | meaning |", "|---|---|---|---|"]
    for names, meaning in _entries():
        rows.append(
            f"| {', '.join(f'`{name}`' for name in names)} "
            f"| {_merged([_default(defaults[name]) for name in names])} "
            f"| {_merged([_range(name) for name in names])} | {meaning} |"
        )
    return "\n".join(rows) + "\n"


def _entries() -> list[tuple[list[str], str]]:
    text = inspect.cleandoc(Config.__doc__ or "").partition("----------\n")[2]
    entries: list[tuple[list[str], str]] = []
    for line in text.splitlines():
        if line.startswith(" "):
            names, meaning = entries[-1]
            entries[-1] = (names, f"{meaning} {line.strip()}".strip())
        elif line:
            entries.append((line.split(", "), ""))
    return entries


def _default(value: object) -> str:
    if value == "":
        return "none"
    if isinstance(value, tuple | bool):
        return f"`{json.dumps(value)}`"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def _range(name: str) -> str:
    limits = config._RANGES.get(name)  # noqa: SLF001 - its own page
    return f"{limits[0]} to {limits[1]}" if limits else ""


def _merged(values: list[str]) -> str:
    return values[0] if len(set(values)) == 1 else ", ".join(value or "any" for value in values)


if __name__ == "__main__":
    PAGE.write_text(rendered(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
