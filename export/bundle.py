"""A model bundle on disk: graph, content gate, reference for drift, card, digests of all."""

import hashlib
import json
import shutil
from pathlib import Path

from lungwatch.atomicfile import fsync_dir, make_dirs, write_atomic
from lungwatch.bundle import (
    ABOUT_FILE,
    CARD_FILE,
    DRIFT_FILE,
    GATE_FILE,
    LEARNT_FILE,
    MODEL_FILE,
)
from lungwatch.contract import ModelContract
from lungwatch.driftreference import DriftReference
from lungwatch.errors import ConfigError, ModelError


def write_bundle(
    folder: Path,
    *,
    model: bytes,
    contract: ModelContract,
    card: str,
    gate: bytes | None = None,
    drift: DriftReference | None = None,
    learnt: bytes | None = None,
    replace: bool = False,
) -> Path:
    """Write `<folder>/<name>-<version>/`, whole or not at all.

    Parameters
    ----------
    gate
        The content gate's ONNX file, if the contract describes one.
    drift
        The reference for drift, if there is one.
    learnt
        The record of the images that the network learnt from, if there is one.

    Raises
    ------
    ModelError
        If there is a gate that the contract does not describe, or the reverse; or the reference
        is of another embedding.
    ConfigError
        If that version exists already and `replace` is not set: results in databases point
        at a version by its name.
    OSError
        If writing fails.
    """
    if (gate is None) != (contract.gate is None):
        raise ModelError(
            f"{contract.id}: a content gate and its section in the contract go together"
        )
    target = folder / contract.id
    if target.exists() and not replace:
        raise ConfigError(f"{target} exists already; choose another version or replace it")
    make_dirs(folder)
    building = folder / f".tmp-{contract.id}"
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir()
    files = {MODEL_FILE: model, CARD_FILE: card.encode()}
    if gate is not None:
        files[GATE_FILE] = gate
    if drift is not None:
        drift.check(contract.embedding_size)
        files[DRIFT_FILE] = (drift.to_json() + "\n").encode()
    if learnt is not None:
        files[LEARNT_FILE] = learnt
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
