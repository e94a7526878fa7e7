"""The list of packages in pyproject.toml is the folders that hold packages."""

import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def setuptools() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]


def test_every_folder_with_an_init_is_listed_and_no_other(setuptools):
    found = {
        ".".join([package, *init.parent.relative_to(ROOT / folder).parts])
        for package, folder in setuptools["package-dir"].items()
        for init in (ROOT / folder).rglob("__init__.py")
    }
    assert found == set(setuptools["packages"])


def test_every_folder_with_modules_has_an_init_but_those_that_alembic_loads_by_path(setuptools):
    folders = {
        path.parent
        for folder in setuptools["package-dir"].values()
        for path in (ROOT / folder).rglob("*.py")
    }
    bare = {folder for folder in folders if not (folder / "__init__.py").is_file()}
    migrations = ROOT / "db/migrations"
    assert bare == {migrations, migrations / "versions"}
    assert setuptools["package-data"]["lungwatch.db"] == [
        "migrations/*.py",
        "migrations/versions/*.py",
    ]


def test_no_folder_at_the_root_shadows_the_installed_package():
    assert not (ROOT / "lungwatch").exists()


def test_every_top_level_package_folder_is_mapped(setuptools):
    folders = {init.parent.name for init in ROOT.glob("*/__init__.py")}
    # `python -m chaos` is run from the repository, and never installed.
    assert folders - {"chaos"} == set(setuptools["package-dir"].values())
