"""Lay out the packages as they are once installed, as links to the sources.

mypy cannot read the hook of an editable install, and an install into a folder would be stale
with the next edit. Usage: `link_tree.py TARGET`, then `MYPYPATH=TARGET mypy -p lungwatch`.
"""

import shutil
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]


def link_tree(target: Path) -> None:
    """Fill `target` anew with a folder `lungwatch` of links."""
    if target.exists():
        shutil.rmtree(target)
    with (ROOT / "pyproject.toml").open("rb") as file:
        folders = tomllib.load(file)["tool"]["setuptools"]["package-dir"]
    package = target / "lungwatch"
    package.mkdir(parents=True)
    for name, folder in folders.items():
        if name == "lungwatch":
            for entry in (ROOT / folder).iterdir():
                (package / entry.name).symlink_to(entry)
        else:
            (package / name.removeprefix("lungwatch.")).symlink_to(ROOT / folder)


if __name__ == "__main__":
    link_tree(Path(sys.argv[1]).absolute())
