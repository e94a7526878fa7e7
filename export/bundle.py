"""A model bundle on disk: the graph, its card, and the digests of both."""

import hashlib
import json
import shutil
from pathlib import Path

from lungwatch.atomicfile import fsync_dir, make_dirs, write_atomic
from lungwatch.bundle import ABOUT_FILE, CARD_FILE, MODEL_FILE
from lungwatch.contract import ModelContract
from lungwatch.errors import ConfigError


def write_bundle(
    folder: Path, *, model: bytes, contract: ModelContract, card: str, replace: bool = False
) -> Path:
    """Write `<folder>/<name>-<version>/`, whole or not at all.

    Raises
    ------
    ConfigError
        If that version exists already and `replace` is not set: results in databases point
        at a version by its name.
    OSError
        If writing fails.
    """
    target = folder / contract.id
    if target.exists() and not replace:
        raise ConfigError(f"{target} exists already; choose another version or replace it")
    make_dirs(folder)
    building = folder / f".tmp-{contract.id}"
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir()
    files = {MODEL_FILE: model, CARD_FILE: card.encode()}
    for name, data in files.items():
        write_atomic(building / name, data)
    about = {
        "name": contract.name,
        "version": contract.version,
        "sha256": {name: hashlib.sha256(data).hexdigest() for name, data in files.items()},
    }
    write_atomic(building / ABOUT_FILE, (json.dumps(about, indent=2) + "\n").encode())
    if target.exists():
        shutil.rmtree(target)
    building.rename(target)
    fsync_dir(folder)
    return target
