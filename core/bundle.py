"""Model bundle: its files, each read once, and a site's own calibration of it.

A bundle is a folder with `model.onnx` and `bundle.json`; optional are `gate.onnx`, `drift.json`,
`card.md`, `learnt.json` (images that it learnt from) and `bundle.sig`. A site's calibration is a
file of the home, `calibrations/<model>-<12 digits of its SHA-256>.json`, without patient data. A
new one moves the former one to `calibrations/former/`, where every record that a result names can
be found again.
"""

import contextlib
import hashlib
import json
import os
import stat
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from lungwatch.contract import Calibration, Decision
from lungwatch.errors import ModelError
from lungwatch.files import fsync_dir, make_dirs, write_atomic

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
    """The bytes of a bundle's files, read from `folder` at one moment; None for missing ones."""

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
        """The "name-version" of `bundle.json`; empty if it has none."""
        about = self._about()
        name, version = about.get("name"), about.get("version")
        return f"{name}-{version}" if isinstance(name, str) and isinstance(version, str) else ""

    def statement(self) -> bytes:
        """Return the signed text: this format's name and each file's SHA-256.

        The first line keeps a signature from being mistaken for one of something else.
        """
        files: list[tuple[str, bytes | None]] = [
            (ABOUT_FILE, self.about),
            (MODEL_FILE, self.model),
            (CARD_FILE, self.card),
        ]
        # Format 1 has no line for a gate, formats 1 and 2 none for a reference: signatures of
        # bundles without one stay valid, and a signed one cannot be removed.
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
        # The signed statement has no line for `learnt.json`: the digest here binds it.
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
    """Read a bundle's files, all from the one folder that the path leads to now.

    Raises
    ------
    ModelError
        If one of them cannot be read, is not a regular file, or is too large.
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
    # Without O_NONBLOCK a FIFO under that name would block the start for ever.
    with _opened(folder / name, os.O_NONBLOCK, name, place) as descriptor:
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise ModelError(f"{folder / name} is not a regular file")
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


CALIBRATION_FORMAT = 1
_DIGEST_DIGITS = 12
_MARK_DIGITS = 8
_MAX_RECORD_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class SiteCalibration:
    """One hospital's own probability, threshold and uncertain band for one model.

    Attributes
    ----------
    model, model_sha256
        "name-version", and the digest of `model.onnx`.
    made_at
        UTC, to the second.
    made_with
        Version of this program.
    covid_cases, other_cases
        Number of images that it was fitted to, by their truth.
    error
        Share of each class that may be given the other one's label, 0..1.
    abstention, covid_abstention, other_abstention
        Share of all cases and of each class that are UNCERTAIN, 0..1.
    roc_auc, ece
        ROC-AUC of the scores and expected calibration error of the probability on these cases.
    method
        Method of the fit, in words.
    calibration, decision
        They replace the contract's.
    """

    model: str
    model_sha256: str
    made_at: datetime
    made_with: str
    covid_cases: int
    other_cases: int
    error: float
    abstention: float
    covid_abstention: float
    other_abstention: float
    roc_auc: float
    ece: float
    method: str
    calibration: Calibration
    decision: Decision

    @property
    def id(self) -> str:
        """The record's name in results: its time, and a digest of its content."""
        text = json.dumps(self._values(), sort_keys=True)
        mark = hashlib.sha256(text.encode()).hexdigest()[:_MARK_DIGITS]
        return f"{self.made_at:%Y-%m-%dT%H:%M:%SZ}-{mark}"

    @property
    def text(self) -> str:
        """Summary in one line."""
        decision = self.decision
        return (
            f"site calibration {self.id} of {self.covid_cases} COVID and {self.other_cases} other "
            f"cases: threshold {decision.threshold:.3f}, uncertain from "
            f"{decision.uncertain_low:.3f} to {decision.uncertain_high:.3f} (error at most "
            f"{self.error:.1%} of each class, {self.abstention:.1%} uncertain)"
        )

    def to_json(self) -> str:
        """Return the record as JSON."""
        values = {"format": CALIBRATION_FORMAT, "id": self.id, **self._values()}
        return json.dumps(values, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read a record.

        Raises
        ------
        ModelError
            If it is of another format, incomplete or altered since it was made.
        """
        try:
            values: dict[str, Any] = json.loads(text)
            if values.pop("format") != CALIBRATION_FORMAT:
                raise ModelError("it is of another format; make it again")
            name = values.pop("id")
            record = cls(
                **values
                | {
                    "made_at": datetime.fromisoformat(values["made_at"]),
                    "calibration": Calibration(**values["calibration"]),
                    "decision": Decision(**values["decision"]),
                }
            )
            found = record.id
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ModelError("it is not understood") from error
        if found != name:
            raise ModelError("it was altered since it was made")
        return record

    def _values(self) -> dict[str, Any]:
        return {**asdict(self), "made_at": self.made_at.astimezone(UTC).isoformat()}


def calibration_path(folder: Path, model: str, model_sha256: str) -> Path:
    """Return the path of a model's record."""
    return folder / f"{model}-{model_sha256[:_DIGEST_DIGITS]}.json"


def read_calibration(folder: Path, model: str, model_sha256: str) -> SiteCalibration | None:
    """Return the record that belongs to a model; None if there is none.

    Raises
    ------
    ModelError
        If there is one that cannot be read, was altered, or belongs to another model file.
    """
    path = calibration_path(folder, model, model_sha256)
    what_to_do = "make it again with `lungwatch calibrate`, or remove it with `--remove`"
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_RECORD_BYTES + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ModelError(f"cannot read the calibration {path}: {error.strerror}") from error
    try:
        record = SiteCalibration.from_json(data.decode())
    except (ModelError, UnicodeDecodeError) as error:
        why = error if isinstance(error, ModelError) else "it is not understood"
        raise ModelError(f"the calibration {path} is refused: {why}; {what_to_do}") from error
    if (record.model, record.model_sha256) != (model, model_sha256):
        raise ModelError(
            f"the calibration {path} is refused: it belongs to {record.model} with the SHA-256 "
            f"{record.model_sha256[:_DIGEST_DIGITS]}…, not to this file of {model}; {what_to_do}"
        )
    return record


def write_calibration(folder: Path, record: SiteCalibration) -> Path:
    """Write a record, move the former one aside, and return the path."""
    path = calibration_path(folder, record.model, record.model_sha256)
    make_dirs(folder)
    _keep_former(path)
    write_atomic(path, record.to_json().encode())
    return path


def remove_calibration(folder: Path, model: str, model_sha256: str) -> bool:
    """Move a model's record aside, so that the bundle decides again; False if there is none."""
    path = calibration_path(folder, model, model_sha256)
    if not path.exists():
        return False
    _keep_former(path)
    path.unlink(missing_ok=True)
    fsync_dir(folder)
    return True


def other_builds(folder: Path, model: str, model_sha256: str) -> list[Path]:
    """Return records of the same name and version that are of another model file."""
    mine = calibration_path(folder, model, model_sha256)
    digits = "[0-9a-f]" * _DIGEST_DIGITS
    return sorted(path for path in folder.glob(f"{model}-{digits}.json") if path != mine)


def _keep_former(path: Path) -> None:
    """Copy the present record into `former/`: results refer to it."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return
    former = path.parent / "former"
    make_dirs(former)
    try:
        name = SiteCalibration.from_json(data.decode()).id.replace(":", "")
    except (ModelError, UnicodeDecodeError):
        name = f"damaged-{hashlib.sha256(data).hexdigest()[:_MARK_DIGITS]}"
    write_atomic(former / f"{path.stem}.{name}.json", data)
