"""A model's answers on a set of files, kept so that an interrupted evaluation goes on."""

import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np

from lungwatch.atomicfile import make_dirs, write_atomic
from lungwatch.preprocess import PreprocessSpec
from lungwatch.training.pixels import FloatArray
from lungwatch.training.samples import Sample

_MODEL_FILES = ("model.onnx", "model.keras", "config.json", "metrics.json")


@dataclass(frozen=True, kw_only=True)
class ScoreCache:
    """Logits by model, preprocessing and files.

    Attributes
    ----------
    folder
        Where they are kept.
    digest
        Of the model; see `model_digest`.
    """

    folder: Path
    digest: str

    def read(self, samples: Sequence[Sample], spec: PreprocessSpec) -> FloatArray | None:
        """Return the logits of these files, (N,), if none has changed since; or None."""
        try:
            logits = np.load(self._file(samples, spec), allow_pickle=False)
        except (OSError, ValueError, EOFError):
            return None
        return np.asarray(logits) if logits.shape == (len(samples),) else None

    def write(self, samples: Sequence[Sample], spec: PreprocessSpec, logits: FloatArray) -> None:
        """Keep logits, float32, shape (N,), in the order of `samples`."""
        make_dirs(self.folder)
        data = io.BytesIO()
        np.save(data, logits)
        write_atomic(self._file(samples, spec), data.getvalue())

    def _file(self, samples: Sequence[Sample], spec: PreprocessSpec) -> Path:
        files = []
        for sample in samples:
            state = sample.path.stat()
            files.append([str(sample.path.absolute()), state.st_size, state.st_mtime_ns])
        key = json.dumps([self.digest, spec.to_dict(), files])
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.npy"


def model_digest(path: Path) -> str:
    """Return the SHA-256 of what `load_scorer` would open for `path`."""
    shipped = Path(str(resources.files("lungwatch.models"))) / path
    place = path if path.exists() else shipped
    files = [place / name for name in _MODEL_FILES] if place.is_dir() else [place]
    digest = hashlib.sha256()
    for file in files:
        if file.is_file():
            digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()
