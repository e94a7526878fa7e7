"""docs/architecture.md against the folders: every room and every module in it is named."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
ROOMS = {
    folder: row
    for cells, row in re.findall(r"^\| (`[^|]*`) \| (.*) \|$", DOCUMENT, flags=re.MULTILINE)
    for folder in re.findall(r"`([a-z/]+/)`", cells)
}
PACKAGES = ("core", "db", "daemon", "cli", "training", "export")


def _modules() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            folder = f"{path.parent.relative_to(ROOT).as_posix()}/"
            if "migrations" not in folder and path.stem != "__init__":
                found.setdefault(folder, []).append(path.stem)
    return found


@pytest.mark.parametrize("folder", sorted(_modules()))
def test_every_module_is_named_in_its_room(folder):
    if folder in ("cli/", "training/recipes/"):  # a file a command: `lungwatch --help` names them
        assert folder in ROOMS
        return
    unnamed = [name for name in _modules()[folder] if f"`{name}`" not in ROOMS[folder]]
    assert not unnamed


def test_no_room_names_what_is_gone():
    named = {
        (folder, name)
        for folder, row in ROOMS.items()
        for name in re.findall(r"`([a-z_0-9]+)`", row)
        if folder.split("/")[0] in PACKAGES and folder != "cli/"
    }
    known = {
        (folder, path.stem)
        for folder, _ in named
        for path in [*(ROOT / folder).glob("*.py"), *(ROOT / folder).iterdir()]
    }
    assert named - known == set()


def test_it_can_be_read_in_one_sitting():
    assert len(DOCUMENT.splitlines()) < 150
