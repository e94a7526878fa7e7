"""The packages stay a house that a newcomer reads in a day; `make structure` has the figures."""

import shutil

import pytest

from tests.packaging.structure import ROOT, Structure, measure

MOST_MODULES = 150
LONGEST_FUNCTION = 90
LEAST_MEDIAN = 150


@pytest.fixture(scope="module")
def structure() -> Structure:
    return measure()


def test_there_are_at_most_150_modules_of_at_least_150_lines_in_the_middle(structure):
    # An `__init__` marks a folder and holds nothing.
    assert structure.total.files - structure.markers <= MOST_MODULES
    assert structure.total.median >= LEAST_MEDIAN


def test_no_function_is_longer_than_90_lines(structure):
    assert structure.long_functions == {}
    assert structure.total.longest_function[1] <= LONGEST_FUNCTION


def test_no_modules_import_one_another(structure):
    assert structure.cycles == []
    assert structure.lazy_cycles == []


def test_no_module_is_so_small_that_it_belongs_into_its_only_importer(structure):
    assert structure.small_with_one_importer == []


def test_a_cycle_a_long_function_and_a_small_module_would_be_found(tmp_path):
    for folder in ("core", "db", "daemon", "cli", "training", "export"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "__init__.py").touch()
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "core/a.py").write_text("import lungwatch.b\n")
    (tmp_path / "core/b.py").write_text("def f():\n    from lungwatch import a\n" + "    a\n" * 90)
    found = measure(tmp_path)
    assert found.cycles == []
    assert found.lazy_cycles == [["lungwatch.a", "lungwatch.b"]]
    assert found.long_functions == {"lungwatch.b.f": 92}
    assert found.small_with_one_importer == ["lungwatch.a"]
    assert found.total.files == 8
