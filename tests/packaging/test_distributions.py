"""Contents of the sdist and the wheel, built from a clean copy."""

import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def dist(tmp_path_factory) -> Path:
    """A folder with both, built of a copy: no build/ of an earlier day, none left behind."""
    scratch = tmp_path_factory.mktemp("dist")
    source = scratch / "source"
    source.mkdir()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    for folder in project["tool"]["setuptools"]["package-dir"].values():
        shutil.copytree(
            ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__")
        )
    for name in ("pyproject.toml", project["project"]["readme"]):
        shutil.copy(ROOT / name, source)
    for name in project["project"]["license-files"]:
        shutil.copy(ROOT / name, source)
    done = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", scratch, source],
        capture_output=True,
        text=True,
        cwd=scratch,
        timeout=540,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return scratch


@pytest.fixture(scope="module")
def wheel(dist) -> set[str]:
    (path,) = dist.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        return set(archive.namelist())


@pytest.fixture(scope="module")
def sdist(dist) -> set[str]:
    (path,) = dist.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        return {name.partition("/")[2] for name in archive.getnames()}


def sources(pattern: str) -> dict[str, str]:
    """Source path -> where the wheel has it."""
    folders = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    return {
        path.relative_to(ROOT).as_posix(): (
            Path(package.replace(".", "/")) / path.relative_to(ROOT / folder)
        ).as_posix()
        for package, folder in folders["package-dir"].items()
        for path in (ROOT / folder).rglob(pattern)
    }


def test_every_module_is_in_both(wheel, sdist):
    modules = sources("*.py")
    assert "db/migrations/env.py" in modules
    assert set(modules.values()) <= wheel
    assert set(modules) <= sdist


def test_the_type_marker_is_in_both(wheel, sdist):
    assert "lungwatch/py.typed" in wheel
    assert "core/py.typed" in sdist


def test_the_first_migration_is_in_the_wheel(wheel):
    assert any(name.startswith("lungwatch/db/migrations/versions/0001") for name in wheel)


def test_the_shipped_default_model_is_in_both_with_its_card_and_digests(wheel, sdist):
    from lungwatch.models import SHIPPED_DEFAULT

    for name in ("model.onnx", "gate.onnx", "bundle.json", "card.md"):
        assert f"lungwatch/models/{SHIPPED_DEFAULT}/{name}" in wheel
        assert f"models/{SHIPPED_DEFAULT}/{name}" in sdist


def test_every_file_of_every_bundle_is_in_the_wheel(wheel):
    bundled = {
        target
        for source, target in sources("*/*").items()
        if source.startswith("models/") and "__pycache__" not in source
    }
    assert bundled <= wheel


@pytest.mark.parametrize("pattern", ["*.j2", "*.toml"])
def test_every_template_and_table_is_in_both(wheel, sdist, pattern):
    packaged = sources(pattern)
    assert packaged
    assert set(packaged.values()) <= wheel
    assert set(packaged) <= sdist


def test_licence_and_notice_are_in_the_wheel(wheel):
    assert {name.rsplit("/", 1)[1] for name in wheel if "/licenses/" in name} == {
        "LICENSE",
        "NOTICE",
    }


def test_nothing_but_lungwatch_is_installed(wheel):
    tops = {name.partition("/")[0] for name in wheel}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"lungwatch"}


def test_no_test_and_no_image_is_installed(wheel):
    assert not [
        name
        for name in wheel
        if "test" in Path(name).name or name.endswith((".dcm", ".png", ".jpg", ".keras"))
    ]


def test_the_wheel_stays_small(dist):
    (path,) = dist.glob("*.whl")
    assert path.stat().st_size < 20 * 1024 * 1024


def test_the_base_install_asks_for_nothing_that_trains(dist):
    (path,) = dist.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        metadata = archive.read(name).decode()
    needed = [
        line.split()[1].lower()
        for line in metadata.splitlines()
        if line.startswith("Requires-Dist:") and "extra ==" not in line
    ]
    assert any(line.startswith("onnxruntime") for line in needed)
    for heavy in ("tensorflow", "keras", "tf2onnx", "onnx>", "matplotlib", "scikit-learn"):
        assert not [line for line in needed if line.startswith(heavy)]


def test_no_generic_name_is_installed_in_this_environment():
    """`import db` from the root works by accident; from anywhere else it must not."""
    folders = ("cli", "core", "daemon", "db", "export", "models", "training")
    code = f"from importlib.util import find_spec\nprint([n for n in {folders} if find_spec(n)])"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, cwd="/", check=True
    )
    assert done.stdout.strip() == "[]"
