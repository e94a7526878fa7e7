"""Imports run one way, and the daemon stays free of everything that trains."""

import ast
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PARTS = ("cli", "daemon", "db", "export", "models", "training")
CORE = "core"
# What each part may import besides itself. The command line may import everything, when used.
ALLOWED = {
    CORE: set(),
    "models": {CORE},
    "db": {CORE},
    "daemon": {CORE, "db", "models"},
    "training": {CORE},
    "export": {CORE, "training"},
    "cli": {CORE, "daemon", "db", "export", "models", "training"},
}
AT_THE_TOP_OF_CLI = {CORE, "cli"}
# Packages that only a function may import, so that `--help` and the daemon stay quick.
HEAVY = {"keras", "matplotlib", "onnx", "sklearn", "sympy", "tensorflow", "tf2onnx"}
# What a daemon's process must not hold; numpy's and onnxruntime's own parts aside.
FOREIGN = [*sorted(HEAVY), "lungwatch.training", "lungwatch.export"]


@dataclass(frozen=True, kw_only=True)
class Import:
    module: str
    line: int
    in_function: bool
    for_types_only: bool


def imports_of(source: str) -> list[Import]:
    found = []

    def visit(node: ast.AST, in_function: bool, for_types_only: bool) -> None:
        if isinstance(node, ast.Import | ast.ImportFrom):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                assert node.level == 0, "relative imports hide the direction"
                # `from lungwatch import db` imports the part as much as `import lungwatch.db`.
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            found.extend(
                Import(
                    module=name,
                    line=node.lineno,
                    in_function=in_function,
                    for_types_only=for_types_only,
                )
                for name in names
            )
        in_function |= isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            for child in node.body:
                visit(child, in_function, True)
            for child in node.orelse:
                visit(child, in_function, for_types_only)
            return
        for child in ast.iter_child_nodes(node):
            visit(child, in_function, for_types_only)

    visit(ast.parse(source), False, False)
    return found


def part_of(module: str) -> str | None:
    """The part that a module belongs to; None if it is not ours."""
    words = module.split(".")
    if words[0] != "lungwatch":
        return None
    return words[1] if len(words) > 1 and words[1] in PARTS else CORE


def sources(part: str) -> list[Path]:
    found = sorted((ROOT / part).rglob("*.py"))
    assert found, f"{part}/ has no source"
    return found


def test_a_lazy_import_and_one_for_types_are_told_from_a_real_one():
    source = (
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    import lungwatch.db\n"
        "else:\n    import json\n"
        "def f():\n    from lungwatch import daemon\n"
    )
    found = {i.module: (i.in_function, i.for_types_only) for i in imports_of(source)}
    assert found["lungwatch.db"] == (False, True)
    assert found["json"] == (False, False)
    assert found["lungwatch.daemon"] == (True, False)
    assert part_of("lungwatch.daemon") == "daemon"
    assert part_of("lungwatch.errors.FileRejected") == CORE
    assert part_of("numpy") is None


@pytest.mark.parametrize("part", ALLOWED)
def test_a_part_imports_only_what_it_may(part):
    wrong = [
        f"{path.relative_to(ROOT)}:{found.line} imports {found.module}"
        for path in sources(part)
        for found in imports_of(path.read_text())
        if (target := part_of(found.module)) is not None
        and target != part
        and target not in ALLOWED[part]
    ]
    assert not wrong, "\n".join(wrong)


def test_commands_import_the_other_parts_only_when_they_run():
    wrong = [
        f"{path.relative_to(ROOT)}:{found.line} imports {found.module}"
        for path in sources("cli")
        for found in imports_of(path.read_text())
        if not found.in_function
        and not found.for_types_only
        and part_of(found.module) not in (None, *AT_THE_TOP_OF_CLI)
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("part", ALLOWED)
def test_heavy_packages_are_imported_inside_functions(part):
    wrong = [
        f"{path.relative_to(ROOT)}:{found.line} imports {found.module}"
        for path in sources(part)
        for found in imports_of(path.read_text())
        if found.module.split(".")[0] in HEAVY
        and not found.in_function
        and not found.for_types_only
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("part", [CORE, "cli", "daemon", "db", "models"])
def test_nothing_that_serves_imports_tensorflow_even_inside_a_function(part):
    wrong = [
        f"{path.relative_to(ROOT)}:{found.line} imports {found.module}"
        for path in sources(part)
        for found in imports_of(path.read_text())
        if found.module.split(".")[0] in HEAVY
    ]
    assert not wrong, "\n".join(wrong)


def loaded_after(statements: str) -> set[str]:
    """Modules that a fresh interpreter holds after some statements."""
    code = f"{statements}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=240
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def foreign(modules: set[str]) -> list[str]:
    return [name for name in FOREIGN if name in modules]


def test_every_daemon_module_together_loads_no_tensorflow_and_no_training():
    paths = [path.relative_to(ROOT).with_suffix("").parts for path in sources("daemon")]
    names = [".".join(["lungwatch", *parts]).removesuffix(".__init__") for parts in paths]
    modules = loaded_after("\n".join(f"import {name}" for name in names))
    assert set(names) <= modules
    assert foreign(modules) == []


def test_the_command_line_loads_no_tensorflow_no_onnxruntime_and_no_database():
    modules = loaded_after("import lungwatch.cli.main")
    assert "lungwatch.cli.main" in modules
    assert foreign(modules) == []
    assert not {"onnxruntime", "cv2", "sqlalchemy", "rich", "lungwatch.daemon"} & modules


def test_help_of_every_command_loads_no_tensorflow():
    modules = loaded_after(
        "import click\n"
        "from click.testing import CliRunner\n"
        "from lungwatch.cli.main import main\n"
        "def walk(command, words):\n"
        "    done = CliRunner().invoke(main, [*words, '--help'])\n"
        "    assert done.exit_code == 0, (words, done.output)\n"
        "    if isinstance(command, click.Group):\n"
        "        with click.Context(command) as ctx:\n"
        "            for name in command.list_commands(ctx):\n"
        "                walk(command.get_command(ctx, name), [*words, name])\n"
        "walk(main, [])\n"
    )
    assert foreign(modules) == []
