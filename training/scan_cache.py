"""What a scan found, kept in a run folder, so that an interrupted one goes on where it was."""

import hashlib
import io
import json
import secrets
import threading
import zipfile
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from lungwatch import __version__
from lungwatch.atomicfile import make_dirs, write_atomic
from lungwatch.training.look import Look
from lungwatch.training.samples import Sample

_ARRAYS = ("histogram", "thumbnail")
_VALUES = tuple(f.name for f in fields(Look) if f.name not in ("sample", *_ARRAYS))
_PER_BLOCK = 100


class ScanCache:
    """Looks by file, size and time of change, written in blocks.

    It holds thumbnails of X-rays: it is to be kept as safe as the data set. A header's patient
    ID is replaced by a keyed digest, which still tells patients apart.

    Parameters
    ----------
    folder
        Where the blocks are; made if it is missing. A damaged block, or one of another version
        of lungwatch, is left unread.
    """

    def __init__(self, folder: Path) -> None:
        make_dirs(folder)
        self._folder = folder
        self._lock = threading.Lock()
        self._fresh: dict[str, Look] = {}
        self._known: dict[str, dict[str, Any]] = {}
        salt = folder / "salt"
        if not salt.is_file():
            write_atomic(salt, secrets.token_bytes(32))
        self._salt = salt.read_bytes()
        self._blocks = 0
        for block in sorted(folder.glob("*.npz")):
            self._blocks = max(self._blocks, int(block.stem) if block.stem.isdigit() else 0)
            self._load(block)

    def key(self, sample: Sample) -> str:
        """Name a file's present state; to be asked for before the file is read.

        Raises
        ------
        OSError
            If the file is gone.
        """
        state = sample.path.stat()
        return f"{state.st_size} {state.st_mtime_ns} {sample.path.absolute()}"

    def find(self, key: str, sample: Sample) -> Look | None:
        """Return what is known of a file that has not changed since; None if nothing is."""
        values = self._known.get(key)
        return Look(sample=sample, **values) if values else None

    def keep(self, key: str, look: Look) -> Look:
        """Remember a look; return it as `find` will."""
        if look.patient_id:
            digest = hashlib.blake2b(look.patient_id.encode(), key=self._salt, digest_size=12)
            look = replace(look, patient_id=digest.hexdigest())
        with self._lock:
            self._fresh[key] = look
            if len(self._fresh) >= _PER_BLOCK:
                self._flush()
        return look

    def flush(self) -> None:
        """Write what is remembered and not yet written."""
        with self._lock:
            self._flush()

    def _flush(self) -> None:
        if not self._fresh:
            return
        looks = list(self._fresh.values())
        about = {
            "version": __version__,
            "keys": list(self._fresh),
            "values": [{name: getattr(look, name) for name in _VALUES} for look in looks],
        }
        data = io.BytesIO()
        arrays = {name: np.stack([getattr(look, name) for look in looks]) for name in _ARRAYS}
        arrays["about"] = np.array(json.dumps(about))
        np.savez(data, **arrays)  # type: ignore[arg-type]  # none is named allow_pickle
        self._blocks += 1
        write_atomic(self._folder / f"{self._blocks:05d}.npz", data.getvalue())
        self._fresh.clear()

    def _load(self, block: Path) -> None:
        try:
            with np.load(block, allow_pickle=False) as file:
                about = json.loads(str(file["about"]))
                arrays = {name: file[name] for name in _ARRAYS}
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return
        if about["version"] != __version__:
            return
        for index, (key, values) in enumerate(zip(about["keys"], about["values"], strict=True)):
            self._known[key] = values | {name: arrays[name][index] for name in _ARRAYS}
