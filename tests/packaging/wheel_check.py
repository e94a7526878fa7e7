"""Check of the built wheel in an environment without TensorFlow.

Run by `make wheel-check` with the interpreter of an environment that has the wheel and
`pydicom-data` and nothing else; no test runner, no repository. Prints a line a guarantee and
stops at the first that does not hold.
"""

import importlib
import json
import os
import pkgutil
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib.metadata import files
from importlib.util import find_spec
from pathlib import Path

COMMAND = str(Path(sys.executable).with_name("lungwatch"))
HEAVY = ("tensorflow", "keras", "onnx", "tf2onnx", "matplotlib", "sklearn")
# These need an extra to be imported.
NOT_IMPORTED = (
    "lungwatch.training",
    "lungwatch.export",
    # What answers associations is built on a library of the extra `pacs`.
    "lungwatch.daemon.pacs.listener",
    "lungwatch.daemon.pacs.connections",
    "lungwatch.daemon.pacs.reception",
)
# The folder that is not the repository, so that nothing is imported from there by accident.
SCRATCH = Path(tempfile.mkdtemp(prefix="lungwatch-wheel-"))


def no_heavy_package_is_installed() -> None:
    present = [name for name in HEAVY if find_spec(name) is not None]
    assert not present, present


def only_lungwatch_is_installed_at_the_top() -> None:
    top = {file.parts[0] for file in files("lungwatch") or []}
    stray = {name for name in top if name != ".." and not name.startswith("lungwatch")}
    assert not stray, stray


def it_carries_what_is_no_module() -> None:
    found = [str(file) for file in files("lungwatch") or []]
    for ending in (
        "lungwatch/py.typed",
        "lungwatch/db/migrations/env.py",
        "/model.onnx",
        "/bundle.json",
        "/card.md",
        "export/templates/card.md.j2",
        "evaluation/release_criteria.toml",
        "evaluation/templates/evaluation.html.j2",
        "licenses/LICENSE",
        "licenses/NOTICE",
    ):
        assert any(name.endswith(ending) for name in found), f"no {ending}"
    assert any("migrations/versions/0001" in name for name in found), "no first migration"


def every_module_imports() -> None:
    import lungwatch

    assert Path(lungwatch.__file__).is_relative_to(sys.prefix), lungwatch.__file__
    names = [module.name for module in pkgutil.walk_packages(lungwatch.__path__, "lungwatch.")]
    parts = {name.split(".")[1] for name in names}
    assert {"cli", "daemon", "db", "export", "imaging", "models", "training"} <= parts, parts
    for name in names:
        if not name.startswith(NOT_IMPORTED):
            importlib.import_module(name)
    loaded = sorted(set(HEAVY) & set(sys.modules))
    assert not loaded, loaded


def every_command_has_help() -> None:
    from lungwatch.cli.main import COMMANDS

    for words in ([], *([name] for name in COMMANDS)):
        assert "Usage:" in _lungwatch(*words, "--help").stdout, words
    for words in (["train", "baseline"], ["results", "list"], ["model", "verify"]):
        assert "Usage:" in _lungwatch(*words, "--help").stdout, words


def training_names_the_extra_that_it_lacks() -> None:
    for split in ("train", "val"):
        for label in ("COVID", "NORMAL"):
            (SCRATCH / "data" / split / label).mkdir(parents=True)
            shutil.copy(_chest(), SCRATCH / "data" / split / label)
    done = _lungwatch(
        "train", "baseline", str(SCRATCH / "data"), "--out", str(SCRATCH / "run"), check=False
    )
    assert done.returncode == 1, done
    assert "lungwatch[train]" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr, done.stderr


def the_shipped_model_is_what_it_says() -> None:
    _lungwatch("model", "verify")


def a_chest_radiograph_is_screened() -> None:
    home = SCRATCH / "home"
    (home / "incoming").mkdir(parents=True)
    shutil.copy(_chest(), home / "incoming")
    _lungwatch("run", "--once", "--home", str(home))
    (row,) = json.loads(_lungwatch("results", "list", "--json", "--home", str(home)).stdout)
    assert row["status"] == "done", row
    assert 0 <= row["probability"] <= 1, row
    assert Path(row["overlay"]).is_file(), row


def guarantees() -> Iterator[Callable[[], None]]:
    yield no_heavy_package_is_installed
    yield only_lungwatch_is_installed_at_the_top
    yield it_carries_what_is_no_module
    yield every_module_imports
    yield every_command_has_help
    yield training_names_the_extra_that_it_lacks
    yield the_shipped_model_is_what_it_says
    yield a_chest_radiograph_is_screened


def _chest() -> str:
    from pydicom.data import get_testdata_file

    return str(get_testdata_file("RG1_UNCR.dcm", download=False))


def _lungwatch(*words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("LUNGWATCH_")}
    done = subprocess.run(
        [COMMAND, *words],
        capture_output=True,
        text=True,
        cwd=SCRATCH,
        env=environment,
        check=False,
    )
    assert not check or done.returncode == 0, f"lungwatch {' '.join(words)}: {done.stderr}"
    return done


def main() -> int:
    try:
        for guarantee in guarantees():
            label = guarantee.__name__.replace("_", " ")
            try:
                guarantee()
            except AssertionError as error:
                print(f"FAILED  {label}: {error}")
                return 1
            print(f"ok      {label}", flush=True)
    finally:
        shutil.rmtree(SCRATCH)
    return 0


if __name__ == "__main__":
    sys.exit(main())
