"""Markers of tests, derived from folder, fixtures and source.

Nobody has to remember them: a test that asks for TensorFlow with `pytest.importorskip`, for
PostgreSQL by its fixture or for DCMTK by the program's name is marked so. `slow` may also be
set by hand.
"""

import inspect
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

_BY_FIXTURE = {
    "postgres": "postgres",
    "empty_postgres": "postgres",
    "machine": "root",
    "shared_data": "shared_data",
}
_BY_SOURCE = {
    "tensorflow": re.compile(r"importorskip\(\"(?:tensorflow|keras)"),
    "root": re.compile(r"os\.gete?uid\(\) != 0"),
    "peers": re.compile(
        r"\b(?:StoreScp|Orthanc|program)\(|which\(\"(?:storescu|dciodvfy|dsrdump|dsr2html|promtool)\""
    ),
    "postgres": re.compile(r"\bfind_programs\(\)"),
    "network": re.compile(
        r"\b(?:free_port|HTTPConnection|create_connection|create_server|StoreScp|Orthanc)\b"
    ),
}
# What a module says before its first test or fixture holds for all of it.
_PREAMBLE_END = re.compile(r"^(?:@|def |class )", re.MULTILINE)


def of_module(path: Path) -> set[str]:
    """Return the markers that all tests of a module have, without importing it."""
    source = path.read_text()
    end = _PREAMBLE_END.search(source)
    marks = _told_by(source[: end.start()] if end else source)
    if path.parent.name == "acceptance":
        marks.add("slow")
    return marks


def of_test(item: pytest.Function) -> set[str]:
    """Return the markers of a collected test."""
    fixtures = {
        definition.func
        for name in item.fixturenames
        for definition in item._fixtureinfo.name2fixturedefs.get(name, ())
        if Path(inspect.getfile(definition.func)) == item.path
    }
    marks = of_module(item.path)
    marks |= {mark for name, mark in _BY_FIXTURE.items() if name in item.fixturenames}
    for function in (item.function, *fixtures):
        marks |= _told_by(inspect.getsource(function))
    # Tests on either database get it by the fixture's parameter.
    if re.search(r"[\[-]postgresql[\]-]", item.name):
        marks.add("postgres")
    return marks


def _told_by(source: str) -> set[str]:
    return {mark for mark, pattern in _BY_SOURCE.items() if pattern.search(source)}


def apply(items: Iterable[pytest.Item]) -> None:
    """Mark the collected tests."""
    for item in items:
        if isinstance(item, pytest.Function):
            for mark in of_test(item):
                item.add_marker(mark)


def is_left_out(path: Path, expression: str) -> bool:
    """Whether `-m` leaves out a whole module, which then need not be imported.

    Parameters
    ----------
    path
        Of a test module.
    expression
        Of `-m`; only its parts ``not MARK`` are looked at, where no part is an alternative.
    """
    if " or " in expression or not path.name.startswith("test_"):
        return False
    return bool(of_module(path) & set(_excluded(expression)))


def _excluded(expression: str) -> Iterator[str]:
    yield from re.findall(r"\bnot (\w+)", expression)
