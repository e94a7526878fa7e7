"""Files of a model bundle, each read once: what is checked is what is run.

A bundle is a folder with `model.onnx` and `bundle.json`; optional are `gate.onnx`, `drift.json`,
`card.md`, `learnt.json` (images that it learnt from) and `bundle.sig`.
"""

import contextlib
import hashlib
import json
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lungwatch.errors import ModelError

MODEL_FILE = "model.onnx"
GATE_FILE = "gate.onnx"
DRIFT_FILE = "drift.json"
ABOUT_FILE = "bundle.json"
CARD_FILE = "card.md"
LEARNT_FILE = "learnt.json"
SIGNATURE_FILE = "bundle.sig"
# Protocol buffers, and so ONNX files, end at 2 GiB.
_MAX_MODEL_BYTES = 2 << 30
_MAX_GATE_BYTES = 64 << 20
_MAX_TEXT_BYTES = 4 << 20


@dataclass(frozen=True, kw_only=True)
class BundleFiles:
    """The bytes of a bundle as they were at one moment.

    Attributes
    ----------
    folder
        Where they were read.
    model, about, gate, drift, card, learnt, signature
        Contents of `model.onnx`, `bundle.json`, `gate.onnx`, `drift.json`, `card.md`,
        `learnt.json` and `bundle.sig`; None for one of the last five that is not there.
    """

    folder: Path
    model: bytes
    about: bytes
    gate: bytes | None = None
    drift: bytes | None = None
    card: bytes | None = None
    learnt: bytes | None = None
    signature: bytes | None = None

    @property
    def model_sha256(self) -> str:
        """SHA-256 of `model.onnx`, in hexadecimal digits."""
        return hashlib.sha256(self.model).hexdigest()

    @property
    def id(self) -> str:
        """The "name-version" of `bundle.json`; empty if it tells none."""
        about = self._about()
        name, version = about.get("name"), about.get("version")
        return f"{name}-{version}" if isinstance(name, str) and isinstance(version, str) else ""

    def statement(self) -> bytes:
        """Return what a signature is made over: this format's name and each file's SHA-256.

        The text is the same for the same bytes, whoever writes it; the first line keeps a
        signature from being taken for one of anything else.
        """
        files: list[tuple[str, bytes | None]] = [
            (ABOUT_FILE, self.about),
            (MODEL_FILE, self.model),
            (CARD_FILE, self.card),
        ]
        # Format 1 has no line for a gate, formats 1 and 2 none for a reference: signatures of
        # bundles without one stay good, and one of a bundle with it is none of the same bundle
        # without it.
        lines = ["lungwatch model bundle 1"]
        if self.gate is not None:
            lines = ["lungwatch model bundle 2"]
            files.append((GATE_FILE, self.gate))
        if self.drift is not None:
            lines = ["lungwatch model bundle 3"]
            files = [*files[:3], (GATE_FILE, self.gate), (DRIFT_FILE, self.drift)]
        for name, data in files:
            digest = "none" if data is None else hashlib.sha256(data).hexdigest()
            lines.append(f"{name} {digest}")
        return ("\n".join(lines) + "\n").encode("ascii")

    def check_digests(self) -> None:
        """Compare model, gate, reference, card and record of images with `bundle.json`.

        Raises
        ------
        ModelError
            If one differs, the model's is missing, there is a gate, reference or record that
            `bundle.json` does not list, or `bundle.json` is not understood.
        """
        listed = self._about().get("sha256")
        if isinstance(listed, str):
            listed = {MODEL_FILE: listed}
        if not isinstance(listed, dict) or MODEL_FILE not in listed:
            raise ModelError(f"{self.folder / ABOUT_FILE} is damaged")
        # The statement that is signed has no line for the record: the digest here binds it.
        for name, data in (
            (GATE_FILE, self.gate),
            (DRIFT_FILE, self.drift),
            (LEARNT_FILE, self.learnt),
        ):
            if data is not None and name not in listed:
                raise ModelError(
                    f"{self.folder / name} is not of this bundle: {ABOUT_FILE} does not list it"
                )
        for name, data in (
            (MODEL_FILE, self.model),
            (GATE_FILE, self.gate),
            (DRIFT_FILE, self.drift),
            (CARD_FILE, self.card),
            (LEARNT_FILE, self.learnt),
        ):
            found = hashlib.sha256(data).hexdigest() if data is not None else None
            if name in listed and listed[name] != found:
                raise ModelError(
                    f"{self.folder / name} is not the file that the bundle was made with "
                    "(SHA-256 differs)"
                )

    def _about(self) -> dict[str, object]:
        try:
            about = json.loads(self.about.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise ModelError(f"{self.folder / ABOUT_FILE} is damaged") from error
        if not isinstance(about, dict):
            raise ModelError(f"{self.folder / ABOUT_FILE} is damaged")
        return about


def read_bundle(folder: Path) -> BundleFiles:
    """Read a bundle's files, all of the one folder that the path leads to now.

    Raises
    ------
    ModelError
        If one of them cannot be read, is no regular file or larger than one can be.
    """
    with _opened(folder, os.O_DIRECTORY) as place:
        return BundleFiles(
            folder=folder,
            model=_read(folder, place, MODEL_FILE, _MAX_MODEL_BYTES),
            about=_read(folder, place, ABOUT_FILE, _MAX_TEXT_BYTES),
            gate=_read_optional(folder, place, GATE_FILE, _MAX_GATE_BYTES),
            drift=_read_optional(folder, place, DRIFT_FILE),
            card=_read_optional(folder, place, CARD_FILE),
            learnt=_read_optional(folder, place, LEARNT_FILE),
            signature=_read_optional(folder, place, SIGNATURE_FILE),
        )


def _read_optional(
    folder: Path, place: int, name: str, most: int = _MAX_TEXT_BYTES
) -> bytes | None:
    try:
        os.stat(name, dir_fd=place, follow_symlinks=False)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ModelError(f"cannot read {folder / name}: {error.strerror}") from error
    return _read(folder, place, name, most)


def _read(folder: Path, place: int, name: str, most: int) -> bytes:
    # Without O_NONBLOCK a FIFO under that name would keep the start waiting for ever.
    with _opened(folder / name, os.O_NONBLOCK, name, place) as descriptor:
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise ModelError(f"{folder / name} is no regular file")
            with os.fdopen(os.dup(descriptor), "rb") as file:
                data = file.read(most + 1)
        except OSError as error:
            raise ModelError(f"cannot read {folder / name}: {error.strerror}") from error
    if len(data) > most:
        raise ModelError(f"{folder / name} is larger than {most >> 20} MiB")
    return data


@contextlib.contextmanager
def _opened(
    path: Path, flags: int, name: str | None = None, place: int | None = None
) -> Iterator[int]:
    try:
        descriptor = os.open(name or path, os.O_RDONLY | os.O_CLOEXEC | flags, dir_fd=place)
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}") from error
    try:
        yield descriptor
    finally:
        os.close(descriptor)
