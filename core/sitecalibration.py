"""Site calibration: one hospital's own probability, threshold and uncertain band for one model.

The record lies beside the bundles, `<home>/calibrations/<model>-<12 digits of its SHA-256>.json`,
and holds no patient data. A new one moves the former one to `calibrations/former/`, where every
record that a result names can be found again.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from lungwatch.contract import Calibration, Decision
from lungwatch.errors import ModelError
from lungwatch.files import fsync_dir, make_dirs, write_atomic

CALIBRATION_FORMAT = 1
_DIGEST_DIGITS = 12
_MARK_DIGITS = 8
_MAX_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class SiteCalibration:
    """What a site's own cases with known truth make of one model's scores.

    Attributes
    ----------
    model, model_sha256
        "name-version", and the digest of the `model.onnx` that it belongs to.
    made_at
        UTC, to the second.
    made_with
        Version of this program.
    covid_cases, other_cases
        Images that it was made of, by their truth.
    error
        Share of each class that may be given the other one's label, 0..1.
    abstention
        Share of the cases that are UNCERTAIN by it, 0..1.
    covid_abstention, other_abstention
        The same within each class.
    roc_auc
        Of the scores on these cases.
    ece
        Expected calibration error of the probability on these cases.
    method
        How it was made, in words.
    calibration, decision
        What takes the place of the contract's.
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
        """The record's name in results: when it was made, and a digest of what it says."""
        text = json.dumps(self._values(), sort_keys=True)
        mark = hashlib.sha256(text.encode()).hexdigest()[:_MARK_DIGITS]
        return f"{self.made_at:%Y-%m-%dT%H:%M:%SZ}-{mark}"

    @property
    def text(self) -> str:
        """One line for people."""
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
    """Return where the record of a model lies."""
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
            data = file.read(_MAX_BYTES + 1)
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
    """Put a record in force, and the former one aside; return where it lies.

    Raises
    ------
    OSError
        If it cannot be written.
    """
    path = calibration_path(folder, record.model, record.model_sha256)
    make_dirs(folder)
    _keep_former(path)
    write_atomic(path, record.to_json().encode())
    return path


def remove_calibration(folder: Path, model: str, model_sha256: str) -> bool:
    """Put a model's record aside, so that the bundle decides again; whether there was one.

    Raises
    ------
    OSError
        If it cannot be moved.
    """
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
    """Lay a copy of the record in force into `former/`: results name it."""
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
