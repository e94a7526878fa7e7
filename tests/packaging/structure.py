"""Size and shape of the packages: files, lines, functions, import cycles, importers, names.

``make structure`` prints the figures of the working tree. ``make structure ARGS="--rev main~20"``
puts another revision's beside them; ``--json`` prints them as JSON; ``--list`` adds the names
behind the counts.

Lines are physical lines; a function's are those from its `def` to its end, without decorators.
"""

import argparse
import ast
import io
import json
import subprocess
import sys
import tarfile
import tempfile
import tomllib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parents[2]
# The packages that hold code; `models` holds bundles.
FOLDERS = ("core", "db", "daemon", "cli", "training", "export")
SMALL_LINES = 40
# Alembic's revisions are named and shaped by Alembic.
_GENERATED = "lungwatch.db.migrations"

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, kw_only=True)
class Module:
    """One source file.

    Attributes
    ----------
    name
        Dotted, as it is imported.
    functions
        Qualified name of each function -> its lines.
    forwarding
        Functions whose body is one call with their own parameters.
    imports
        Names of modules that are imported when this one is.
    lazy_imports
        Names of modules that a function imports.
    """

    name: str
    folder: str
    lines: int
    is_package: bool
    functions: dict[str, int]
    classes: tuple[str, ...]
    forwarding: tuple[str, ...]
    imports: frozenset[str]
    lazy_imports: frozenset[str]


@dataclass(frozen=True, kw_only=True)
class Package:
    """The figures of one folder, or of all together.

    Attributes
    ----------
    longest_file, longest_function
        Name and lines.
    """

    files: int
    lines: int
    median: float
    longest_file: tuple[str, int]
    longest_function: tuple[str, int]


@dataclass(frozen=True, kw_only=True)
class Structure:
    """The figures of a tree.

    Attributes
    ----------
    packages
        Folder -> its figures.
    markers
        How many `__init__.py` are among the modules.
    cycles
        Groups of modules that import one another when they are imported.
    lazy_cycles
        Groups that do so only if the imports inside functions are counted too.
    small_with_one_importer
        Modules under 40 lines that a single module imports.
    long_functions
        Functions over 90 lines.
    same_module_names, same_class_names
        A name -> where it is used, if it is used more than once.
    """

    packages: dict[str, Package]
    total: Package
    markers: int
    cycles: list[list[str]]
    lazy_cycles: list[list[str]]
    with_one_importer: list[str]
    small_with_one_importer: list[str]
    without_importer: list[str]
    long_functions: dict[str, int]
    forwarding_functions: list[str]
    same_module_names: dict[str, list[str]] = field(default_factory=dict)
    same_class_names: dict[str, list[str]] = field(default_factory=dict)


def measure(root: Path = ROOT) -> Structure:
    """Measure a tree of the repository, a folder as `git archive` lays it out."""
    modules = read_modules(root)
    importers = _importers(modules)
    alone = {
        module.name: module
        for module in modules.values()
        if len(importers[module.name]) == 1 and not _is_generated(module)
    }
    by_folder: dict[str, list[Module]] = defaultdict(list)
    for module in modules.values():
        by_folder[module.folder].append(module)
    eager = {name: module.imports for name, module in modules.items()}
    every = {name: module.imports | module.lazy_imports for name, module in modules.items()}
    return Structure(
        packages={folder: _package(by_folder[folder]) for folder in FOLDERS},
        total=_package(modules.values()),
        markers=sum(module.is_package for module in modules.values()),
        cycles=_cycles(eager),
        lazy_cycles=_cycles(every),
        with_one_importer=sorted(alone),
        small_with_one_importer=sorted(n for n, m in alone.items() if m.lines < SMALL_LINES),
        without_importer=sorted(
            module.name
            for module in modules.values()
            if not importers[module.name] and not _is_generated(module)
        ),
        long_functions={
            f"{module.name}.{function}": lines
            for module in modules.values()
            for function, lines in module.functions.items()
            if lines > 90
        },
        forwarding_functions=sorted(
            f"{module.name}.{function}"
            for module in modules.values()
            for function in module.forwarding
        ),
        same_module_names=_same_names(
            (module.name.rpartition(".")[2], module.name)
            for module in modules.values()
            if not module.is_package and not _is_generated(module)
        ),
        same_class_names=_same_names(
            (name, module.name) for module in modules.values() for name in module.classes
        ),
    )


def measure_revision(revision: str) -> Structure:
    """Measure a revision of this repository as git has it."""
    archive = subprocess.run(
        ["git", "-C", ROOT, "archive", revision], capture_output=True, check=True
    ).stdout
    with tempfile.TemporaryDirectory(prefix="lungwatch-structure-") as folder:
        with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
            tar.extractall(folder, filter="data")
        return measure(Path(folder))


def read_modules(root: Path) -> dict[str, Module]:
    """Read every module of the packages, by its name."""
    with (root / "pyproject.toml").open("rb") as file:
        mapped = tomllib.load(file)["tool"]["setuptools"]["package-dir"]
    package_of = {folder: package for package, folder in mapped.items()}
    paths: dict[str, tuple[str, Path]] = {}
    for folder in FOLDERS:
        for path in sorted((root / folder).rglob("*.py")):
            parts = path.relative_to(root / folder).with_suffix("").parts
            name = ".".join([package_of[folder], *parts]).removesuffix(".__init__")
            paths[name] = (folder, path)
    return {
        name: _module(name, folder, path, frozenset(paths))
        for name, (folder, path) in paths.items()
    }


def _module(name: str, folder: str, path: Path, known: frozenset[str]) -> Module:
    source = path.read_text()
    tree = ast.parse(source)
    found = list(_imports(tree, is_lazy=False))
    eager = {target for names, lazy in found if not lazy for target in _resolve(names, known)}
    lazy = {target for names, lazy in found if lazy for target in _resolve(names, known)}
    functions = dict(_functions(tree))
    return Module(
        name=name,
        folder=folder,
        lines=len(source.splitlines()),
        is_package=path.name == "__init__.py",
        functions={name: _length(node) for name, node in functions.items()},
        classes=tuple(node.name for node in tree.body if isinstance(node, ast.ClassDef)),
        forwarding=tuple(name for name, node in functions.items() if _only_forwards(node)),
        imports=frozenset(eager - {name}),
        lazy_imports=frozenset(lazy - {name}),
    )


def _imports(node: ast.AST, *, is_lazy: bool) -> Iterator[tuple[tuple[str, str], bool]]:
    """Yield ((module, name in it), whether a function imports it); none for types only."""
    if isinstance(node, ast.Import):
        yield from (((alias.name, ""), is_lazy) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        yield from (((node.module or "", alias.name), is_lazy) for alias in node.names)
    is_lazy |= isinstance(node, Function | ast.Lambda)
    children: Iterable[ast.AST] = ast.iter_child_nodes(node)
    if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
        children = node.orelse
    for child in children:
        yield from _imports(child, is_lazy=is_lazy)


def _resolve(imported: tuple[str, str], known: frozenset[str]) -> set[str]:
    """Return the module that an import names; the name may itself be a module."""
    module, name = imported
    if f"{module}.{name}" in known:
        return {f"{module}.{name}"}
    return {module} & known


def _functions(tree: ast.AST, prefix: str = "") -> Iterator[tuple[str, Function]]:
    """Yield the functions and methods, those inside functions left to these."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, Function):
            yield f"{prefix}{node.name}", node
        elif isinstance(node, ast.ClassDef):
            yield from _functions(node, f"{prefix}{node.name}.")
        else:
            yield from _functions(node, prefix)


def _length(node: Function) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def _only_forwards(node: Function) -> bool:
    """Whether all it does is to call another one with its own parameters."""
    body = node.body
    if isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
        body = body[1:]
    if len(body) != 1 or not isinstance(body[0], ast.Return | ast.Expr) or node.decorator_list:
        return False
    call = body[0].value
    if not isinstance(call, ast.Call):
        return False
    given = [*call.args, *(keyword.value for keyword in call.keywords)]
    parameters = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
    passed = [argument.id for argument in given if isinstance(argument, ast.Name)]
    own = [name for name in parameters if name != "self"]
    return bool(own) and len(passed) == len(given) and sorted(passed) == sorted(own)


def _package(modules: Iterable[Module]) -> Package:
    modules = list(modules)
    functions = {
        f"{module.name}.{name}": lines
        for module in modules
        for name, lines in module.functions.items()
    }
    lines = {module.name: module.lines for module in modules}
    return Package(
        files=len(modules),
        lines=sum(lines.values()),
        median=median(lines.values()) if lines else 0,
        longest_file=max(lines.items(), key=lambda item: item[1], default=("", 0)),
        longest_function=max(functions.items(), key=lambda item: item[1], default=("", 0)),
    )


def _importers(modules: dict[str, Module]) -> dict[str, set[str]]:
    importers: dict[str, set[str]] = {name: set() for name in modules}
    for module in modules.values():
        for target in module.imports | module.lazy_imports:
            importers[target].add(module.name)
    return importers


def _is_generated(module: Module) -> bool:
    return module.is_package or module.name.startswith(_GENERATED)


def _same_names(named: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    users: dict[str, list[str]] = defaultdict(list)
    for name, user in named:
        users[name].append(user)
    return {name: sorted(found) for name, found in sorted(users.items()) if len(found) > 1}


def _cycles(imports: dict[str, frozenset[str]]) -> list[list[str]]:
    """Return the strongly connected groups of more than one module."""
    reached = {name: _reached(name, imports) for name in imports}
    groups = {
        tuple(sorted({name} | {other for other in reached[name] if name in reached[other]}))
        for name in imports
    }
    return sorted(list(group) for group in groups if len(group) > 1)


def _reached(start: str, imports: dict[str, frozenset[str]]) -> set[str]:
    found: set[str] = set()
    pending = [start]
    while pending:
        for target in imports[pending.pop()] - found:
            found.add(target)
            pending.append(target)
    return found


def table(columns: dict[str, Structure]) -> str:
    """Put the figures of trees beside one another, as a Markdown table."""
    rows: list[list[str]] = [["", *columns], ["---", *["---:"] * len(columns)]]

    def row(name: str, figures: Iterable[object]) -> None:
        rows.append([name, *map(str, figures)])

    found = list(columns.values())
    row("modules", (s.total.files for s in found))
    row("of them `__init__.py`", (s.markers for s in found))
    row("lines", (f"{s.total.lines:,}" for s in found))
    row("median lines a file", (f"{s.total.median:.0f}" for s in found))
    row("longest file", (_named(s.total.longest_file) for s in found))
    row("longest function", (_named(s.total.longest_function) for s in found))
    row("functions over 90 lines", (len(s.long_functions) for s in found))
    row("import cycles", (len(s.cycles) for s in found))
    row("with imports in functions", (len(s.lazy_cycles) for s in found))
    row("modules with one importer", (len(s.with_one_importer) for s in found))
    row(f"of them under {SMALL_LINES} lines", (len(s.small_with_one_importer) for s in found))
    row("module names used twice", (len(s.same_module_names) for s in found))
    row("class names used twice", (len(s.same_class_names) for s in found))
    row("functions that only forward", (len(s.forwarding_functions) for s in found))
    for folder in FOLDERS:
        row(f"`{folder}/`: files", (s.packages[folder].files for s in found))
        row(f"`{folder}/`: lines", (f"{s.packages[folder].lines:,}" for s in found))
        row(f"`{folder}/`: median", (f"{s.packages[folder].median:.0f}" for s in found))
        row(f"`{folder}/`: longest file", (_named(s.packages[folder].longest_file) for s in found))
        row(
            f"`{folder}/`: longest function",
            (_named(s.packages[folder].longest_function) for s in found),
        )
    widths = [max(len(cells[column]) for cells in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "| " + " | ".join(c.ljust(w) for c, w in zip(cells, widths, strict=True)) + " |"
        for cells in rows
    )


def _named(item: tuple[str, int]) -> str:
    name, lines = item
    return f"{lines} ({name.removeprefix('lungwatch.')})"


def listing(structure: Structure) -> str:
    """Write out the names behind the counts."""
    parts = {
        "functions over 90 lines": [
            f"{lines} {name}" for name, lines in structure.long_functions.items()
        ],
        "import cycles": [", ".join(cycle) for cycle in structure.cycles],
        "import cycles with imports in functions": [", ".join(c) for c in structure.lazy_cycles],
        f"one importer and under {SMALL_LINES} lines": structure.small_with_one_importer,
        "one importer": structure.with_one_importer,
        "no importer in the packages": structure.without_importer,
        "functions that only forward": structure.forwarding_functions,
        "modules of one name": [
            f"{name}: {', '.join(users)}" for name, users in structure.same_module_names.items()
        ],
        "classes of one name": [
            f"{name}: {', '.join(users)}" for name, users in structure.same_class_names.items()
        ],
    }
    return "\n\n".join(
        "\n  ".join([f"{title} ({len(names)})", *names]) for title, names in parts.items()
    )


def main() -> int:
    """Print the figures."""
    parser = argparse.ArgumentParser(prog="make structure", description=__doc__)
    parser.add_argument("--rev", action="append", default=[], help="a git revision to put beside")
    parser.add_argument("--json", action="store_true", help="the figures as JSON")
    parser.add_argument("--list", action="store_true", help="the names behind the counts too")
    options = parser.parse_args()
    columns = {revision: measure_revision(revision) for revision in options.rev}
    columns["working tree"] = measure()
    if options.json:
        print(json.dumps({name: asdict(found) for name, found in columns.items()}, indent=2))
        return 0
    print(table(columns))
    if options.list:
        print(f"\n{listing(columns['working tree'])}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
