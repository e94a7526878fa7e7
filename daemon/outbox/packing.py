"""Packing of a delivery: from its row to the object's file in the outbox."""

import importlib.util
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, cast

from sqlalchemy import Engine

from lungwatch.atomicfile import write_atomic
from lungwatch.daemon.config import Config
from lungwatch.daemon.errortext import describe_unexpected
from lungwatch.daemon.home import Home
from lungwatch.daemon.outbox.scu import Parcel
from lungwatch.db.delivery_queries import DeliveryRow, SentReport, earlier_report, unsent_uids
from lungwatch.db.queries import get_result, is_in_hand
from lungwatch.db.rows import ResultDetail
from lungwatch.errors import ConfigError, DatabaseError, LungwatchError, MissingExtraError

if TYPE_CHECKING:
    from lungwatch.contract import Label
    from lungwatch.daemon.dicomout import BuiltObject, Kind, ResultFacts

_SHORTEST_SECRET = 16
# For an original that another model's result has in hand.
_MOST_WAITS = 60


class CannotBuildError(LungwatchError):
    """No valid object can be made of a result; the text has no patient data."""


class OriginalInUseError(LungwatchError):
    """The original is being scored by another model at this moment; it will be back."""


class Packer:
    """Builds objects, and keeps their files until every destination has them.

    Raises
    ------
    ConfigError
        If the secret for pseudonyms cannot be read or is too short.
    MissingExtraError
        If highdicom is not installed.
    """

    def __init__(self, *, config: Config, home: Home, engine: Engine) -> None:
        # Said at the start, and not with the first result.
        if importlib.util.find_spec("highdicom") is None:
            raise MissingExtraError("sending results to a PACS", "pacs")
        self._home = home
        self._engine = engine
        self._report_class = config.pacs_sr
        self._secret = _read_secret(config) if config.pacs_deidentify else None

    def path(self, sop_instance_uid: str) -> Path:
        """Where the file of an object is."""
        return self._home.outbox / f"{sop_instance_uid}.dcm"

    def pack(self, row: DeliveryRow, note: Callable[[DeliveryRow, str], None]) -> Parcel:
        """Return a delivery's object as a file; it is built unless it is there.

        Parameters
        ----------
        note
            Called with the SOP Instance UID before the file appears.

        Raises
        ------
        CannotBuildError
            If no valid object can be made of the result.
        OriginalInUseError
            If the original is being scored by another model.
        OSError
            If the file cannot be written.
        """
        if row.sop_instance_uid is not None:
            sop_class_uid = self._class_of_existing(self.path(row.sop_instance_uid))
            if sop_class_uid is not None:
                return _parcel(row, self.path(row.sop_instance_uid), sop_class_uid)
        built = self._build(row)
        note(row, built.sop_instance_uid)
        path = self.path(built.sop_instance_uid)
        write_atomic(path, built.encode())
        return _parcel(row, path, built.sop_class_uid)

    def _build(self, row: DeliveryRow) -> "BuiltObject":
        from lungwatch.daemon.dicomout import (  # noqa: PLC0415 - highdicom, where needed alone
            InvalidObject,
            SourceUnusable,
            build_objects,
        )

        result = get_result(self._engine, row.result_id)
        earlier = earlier_report(self._engine, row.result_id) if row.kind == "sr" else None
        try:
            (built,) = build_objects(
                _facts(result, self._home, earlier),
                self._home.absolute(result.file or ""),
                kinds=(cast("Kind", row.kind),),
                sr=self._report_class,
                deidentify_key=self._secret,
            )
        except (InvalidObject, SourceUnusable) as error:
            raise CannotBuildError(str(error)) from error
        except (FileNotFoundError, IsADirectoryError) as error:
            if row.attempts < _MOST_WAITS and is_in_hand(self._engine, result.sha256):
                raise OriginalInUseError from error
            raise CannotBuildError("the original or the overlay is gone") from error
        except (OSError, MemoryError, DatabaseError, MissingExtraError):
            raise
        # Whatever a strange source makes the libraries raise is this object's trouble alone.
        except Exception as error:
            raise CannotBuildError(f"not built: {describe_unexpected(error)}") from error
        return built

    def _class_of_existing(self, path: Path) -> str | None:
        """Return the SOP class of a file that may be sent as it is, None if there is none.

        One made before de-identification was switched on, or off, may not.
        """
        from pydicom import dcmread  # noqa: PLC0415 - with the above
        from pydicom.errors import InvalidDicomError  # noqa: PLC0415

        try:
            found = dcmread(path, stop_before_pixels=True)
        except (FileNotFoundError, InvalidDicomError):
            return None
        is_clean = found.get("PatientIdentityRemoved") == "YES"
        return str(found.SOPClassUID) if is_clean == (self._secret is not None) else None

    def sweep(self) -> None:
        """Remove files that no destination waits for, and what a crash left half written."""
        for path in stray_files(self._home, self._engine):
            path.unlink(missing_ok=True)


def _facts(result: ResultDetail, home: Home, earlier: SentReport | None) -> "ResultFacts":
    from lungwatch.daemon.dicomout import Predecessor, ResultFacts  # noqa: PLC0415 - as above

    if result.probability is None or result.threshold is None or result.finished_at is None:
        raise CannotBuildError("the result has no scores")
    return ResultFacts(
        sha256=result.sha256,
        label=cast("Label", result.label),
        probability=result.probability,
        threshold=result.threshold,
        uncertain_from=result.uncertain_from,
        uncertain_to=result.uncertain_to,
        flags=result.flags,
        gate_score=result.gate_score,
        lung_area=result.lung_area,
        lung_share=result.lung_share,
        model_name=result.model,
        model_version=result.model_version,
        model_sha256=result.model_sha256,
        finished_at=result.finished_at,
        overlay=home.absolute(result.overlay or ""),
        calibration=result.calibration,
        predecessor=None if earlier is None else Predecessor(**asdict(earlier)),
    )


def _parcel(row: DeliveryRow, path: Path, sop_class_uid: str) -> Parcel:
    return Parcel(
        delivery_id=row.id,
        sha256=row.sha256,
        kind=row.kind,
        refusals=row.refusals,
        path=path,
        sop_class_uid=sop_class_uid,
        sop_instance_uid=path.stem,
    )


def _read_secret(config: Config) -> bytes:
    try:
        secret = Path(config.pacs_deidentify_key).expanduser().read_bytes().strip()
    except OSError as error:
        raise ConfigError(
            f"the file that 'pacs_deidentify_key' names cannot be read: {error.strerror}"
        ) from error
    if len(secret) < _SHORTEST_SECRET:
        raise ConfigError(
            f"the secret in the file that 'pacs_deidentify_key' names has fewer than "
            f"{_SHORTEST_SECRET} bytes: make one with `head -c 32 /dev/urandom`"
        )
    return secret


def stray_files(home: Home, engine: Engine) -> list[Path]:
    """Return the files in the outbox that no delivery waits for."""
    kept = {f"{uid}.dcm" for uid in unsent_uids(engine)}
    return sorted(
        path
        for path in home.outbox.iterdir()
        if path.name not in kept and (path.suffix == ".dcm" or path.name.startswith(".tmp-"))
    )
