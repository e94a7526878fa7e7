"""Outbox: building, sending and retrying the objects that destinations are owed."""

import importlib.util
import logging
import threading
from collections.abc import Callable, Collection, Sequence
from contextlib import closing
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, cast

from sqlalchemy import Engine

from lungwatch.daemon.config import Config, Destination, parse_destination
from lungwatch.daemon.home import Home
from lungwatch.daemon.logs import event
from lungwatch.daemon.pacs.scu import (
    Answer,
    OutgoingObject,
    StorageScu,
    StoreVerdict,
    UnreachableError,
)
from lungwatch.daemon.retry import Backoff, Clock, Outages
from lungwatch.daemon.stage import DatabaseWriter, Progress, Worker, crashpoint
from lungwatch.db.deliveries import (
    Deliveries,
    DeliveryRow,
    SentReport,
    due_deliveries,
    earlier_report,
    is_unsent,
    unsent_uids,
)
from lungwatch.db.models import DeliveryState
from lungwatch.db.queries import ResultRow, get_result, is_unfinished
from lungwatch.errors import (
    ConfigError,
    DatabaseError,
    LungwatchError,
    MissingExtraError,
    describe_unexpected,
)
from lungwatch.files import write_atomic

if TYPE_CHECKING:
    from lungwatch.contract import Label
    from lungwatch.daemon.pacs.objects import BuiltObject
    from lungwatch.daemon.pacs.source import Kind, ResultFacts


_SHORTEST_SECRET = 16
# Of an original that another model is scoring.
_MOST_WAITS = 60


class CannotBuildError(LungwatchError):
    """No valid object can be made of a result; the text has no patient data."""


class OriginalInUseError(LungwatchError):
    """The original is being scored by another model at this moment."""


class ObjectStore:
    """Object files in the outbox: built on demand, kept until every destination has them.

    Raises
    ------
    ConfigError
        If the secret for pseudonyms cannot be read or is too short.
    MissingExtraError
        If highdicom is not installed.
    """

    def __init__(self, *, config: Config, home: Home, engine: Engine) -> None:
        # Reported at the start, not with the first result.
        if importlib.util.find_spec("highdicom") is None:
            raise MissingExtraError("sending results to a PACS", "pacs")
        self._home = home
        self._engine = engine
        self._report_class = config.pacs_sr
        self._secret = _read_secret(config) if config.pacs_deidentify else None

    def path(self, sop_instance_uid: str) -> Path:
        """Return the path of an object's file."""
        return self._home.outbox / f"{sop_instance_uid}.dcm"

    def pack(self, row: DeliveryRow, note: Callable[[DeliveryRow, str], None]) -> OutgoingObject:
        """Return a delivery's object as a file, which is built if missing.

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
            path = self.path(row.sop_instance_uid)
            sop_class_uid = self._class_of_existing(path)
            if sop_class_uid is not None:
                return OutgoingObject(row=row, path=path, sop_class_uid=sop_class_uid)
        built = self._build(row)
        note(row, built.sop_instance_uid)
        path = self.path(built.sop_instance_uid)
        write_atomic(path, built.data)
        return OutgoingObject(row=row, path=path, sop_class_uid=built.sop_class_uid)

    def _build(self, row: DeliveryRow) -> "BuiltObject":
        from lungwatch.daemon.pacs.objects import InvalidObjectError, build_objects  # noqa: PLC0415 - of the extra
        from lungwatch.daemon.pacs.source import UnusableSourceError  # noqa: PLC0415 - of the extra

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
        except (InvalidObjectError, UnusableSourceError) as error:
            raise CannotBuildError(str(error)) from error
        except (FileNotFoundError, IsADirectoryError) as error:
            if row.attempts < _MOST_WAITS and is_unfinished(self._engine, result.sha256):
                raise OriginalInUseError from error
            raise CannotBuildError("the original or the overlay is gone") from error
        except (OSError, MemoryError, DatabaseError, MissingExtraError):
            raise
        # A malformed source may raise anything in the libraries; only this object fails.
        except Exception as error:
            raise CannotBuildError(f"not built: {describe_unexpected(error)}") from error
        return built

    def _class_of_existing(self, path: Path) -> str | None:
        """Return the SOP class of an existing file; None without one.

        A file made before de-identification was switched on or off counts as missing.
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
        """Remove files that no destination waits for, and incomplete ones of a crash."""
        for path in stray_files(self._home, self._engine):
            path.unlink(missing_ok=True)


def _facts(result: ResultRow, home: Home, earlier: SentReport | None) -> "ResultFacts":
    from lungwatch.daemon.pacs.source import ResultFacts  # noqa: PLC0415 - as above

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
        findings=result.findings or {},
        gate_score=result.gate_score,
        lung_area=result.lung_area,
        lung_share=result.lung_share,
        model_name=result.model,
        model_version=result.model_version,
        model_sha256=result.model_sha256,
        finished_at=result.finished_at,
        overlay=home.absolute(result.overlay or ""),
        calibration=result.calibration,
        predecessor=earlier,
    )


def _read_secret(config: Config) -> bytes:
    try:
        secret = Path(config.pacs_deidentify_key).expanduser().read_bytes().strip()
    except OSError as error:
        raise ConfigError(
            f"the file that 'pacs.deidentify_key' names cannot be read: {error.strerror}"
        ) from error
    if len(secret) < _SHORTEST_SECRET:
        raise ConfigError(
            f"the secret in the file that 'pacs.deidentify_key' names has fewer than "
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


MAX_REFUSALS = 5
# Objects of one association; after a crash, the outcome of as many is unknown.
_AT_ONCE = 20
_POLL_S = 1.0
_ABORT_S = 5.0
_ASSOCIATION_S = 900.0  # of many objects, each with the network's timeouts


class Sender:
    """Thread that builds and sends the objects that are due, and records the outcome.

    A failing destination does not affect the pipeline: the two share only the database. A
    destination that is not reached is retried for ever, with increasing delays; an object that is
    refused `MAX_REFUSALS` times has failed.

    Raises
    ------
    MissingExtraError
        If what sending needs is not installed.
    LungwatchError
        If a destination or the secret for pseudonyms cannot be used.
    """

    def __init__(
        self,
        *,
        config: Config,
        home: Home,
        engine: Engine,
        writer: DatabaseWriter,
        outages: Outages,
        clock: Clock,
        on_crash: Callable[[str, BaseException], None],
        progress: Progress | None = None,
    ) -> None:
        self._engine = engine
        self._progress = progress or Progress(clock)
        self._progress.watch("outbox", extra_s=_ASSOCIATION_S)
        self._writer = writer
        self._outages = outages
        self._clock = clock
        self._destinations = [parse_destination(text) for text in config.pacs_destinations]
        self._longest = timedelta(seconds=config.pacs_retry_max_s)
        self._backoff = Backoff[str](first_s=config.pacs_retry_s, most_s=config.pacs_retry_max_s)
        self._deliveries = Deliveries(engine)
        self._packer = ObjectStore(config=config, home=home, engine=engine)
        self._user = StorageScu(config)
        self._stopped = threading.Event()
        self._thread = Worker("sender", self._run, on_crash)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self, timeout_s: float) -> None:
        """End the thread, after at most `timeout_s` for the object that is being sent."""
        self._stopped.set()
        if not self._thread.is_alive():
            return
        self._thread.join(timeout_s)
        # While it is still connecting, nothing was sent: its thread ends with the process.
        if self._thread.is_alive() and self._user.abort():
            self._thread.join(_ABORT_S)

    def cancel(self) -> None:
        """Make `work_off`, on another thread, return after the object that it is sending."""
        self._stopped.set()

    def recover(self) -> None:
        """Requeue what a dead process was sending, and remove its stray files."""
        now = self._clock.now()
        count = self._writer.call(lambda: self._deliveries.recover(now))
        if count:
            event("resend", count=count)
        self._packer.sweep()

    def work_off(self) -> None:
        """Send all that is due, once; a destination that is not reached is left for later."""
        while not self._stopped.is_set() and self._send_due():
            pass

    def _run(self) -> None:
        self.recover()
        while not self._stopped.is_set():
            with self._progress.busy("outbox"):
                had_some = self._send_due()
            if not had_some:
                self._stopped.wait(_POLL_S)

    def _send_due(self) -> bool:
        """Give each destination one association; return whether any had an object due."""
        return sum([self._serve(destination) for destination in self._destinations]) > 0

    def _serve(self, destination: Destination) -> bool:
        now = self._clock.now()
        if self._stopped.is_set() or not self._backoff.is_due(destination.name, now.timestamp()):
            return False
        rows = self._outages.wait_out(
            lambda: due_deliveries(
                self._engine, destination.name, now=now, longest=self._longest, limit=_AT_ONCE
            )
        )
        if not rows:
            return False
        ids = [row.id for row in rows]
        self._writer.call(lambda: self._deliveries.start(ids))
        objects = [item for row in rows if (item := self._pack(row)) is not None]
        crashpoint("packed")
        if objects:
            self._transmit(destination, objects)
        return True

    def _pack(self, row: DeliveryRow) -> OutgoingObject | None:
        """Build the object of a delivery; None if it is invalid or was put back."""
        try:
            item = self._outages.wait_out(lambda: self._packer.pack(row, self._note_uid))
        except CannotBuildError as error:
            text = str(error)
            self._writer.call(lambda: self._deliveries.invalid(row.id, text))
            event("invalid_object", row.sha256, level=logging.ERROR, kind=row.kind, error=text)
            self._drop_file(row.sop_instance_uid)
            return None
        except OriginalInUseError as error:
            when = self._clock.now() + timedelta(seconds=_POLL_S)
            self._put_back([row.id], str(error), when)
            return None
        except OSError as error:  # such as missing permissions: not the object's fault
            text = f"cannot write to the outbox: {error.strerror}"
            when = self._clock.now() + timedelta(seconds=self._backoff.delay_s(row.attempts + 1))
            self._put_back([row.id], text, when)
            event("not_packed", row.sha256, level=logging.ERROR, error=text)
            return None
        return item

    def _note_uid(self, row: DeliveryRow, uid: str) -> None:
        self._writer.call(lambda: self._deliveries.built(row.result_id, row.kind, uid))

    def _transmit(self, destination: Destination, objects: Sequence[OutgoingObject]) -> None:
        left = {item.row.id: item for item in objects}
        try:
            with closing(self._user.send(destination, objects)) as answers:
                for item, answer in answers:
                    self._progress.beat("outbox")
                    if answer.verdict is StoreVerdict.OUT_OF_RESOURCES:
                        self._postpone(destination, left, answer.text)
                        return
                    self._backoff.succeeded(destination.name)
                    del left[item.row.id]
                    self._conclude(destination, item, answer)
                    if self._stopped.is_set():
                        break
        except UnreachableError as error:
            self._postpone(destination, left, str(error))
            return
        if left:
            self._put_back(left, "the service was stopped", self._clock.now())

    def _conclude(self, destination: Destination, item: OutgoingObject, answer: Answer) -> None:
        now = self._clock.now()
        if answer.verdict is StoreVerdict.STORED:
            crashpoint("stored")
            self._writer.call(lambda: self._deliveries.sent(item.row.id, now))
            event("sent", item.row.sha256, kind=item.row.kind, destination=destination.name)
            self._drop_file(item.path.stem)
            return
        when = now + timedelta(seconds=self._backoff.delay_s(item.row.refusals + 1))
        state = self._writer.call(
            lambda: self._deliveries.refused(
                item.row.id, error=answer.text, next_attempt_at=when, most=MAX_REFUSALS
            )
        )
        event(
            "refused",
            item.row.sha256,
            level=logging.ERROR if state is DeliveryState.FAILED else logging.WARNING,
            kind=item.row.kind,
            destination=destination.name,
            error=answer.text,
            state=state,
        )
        if state is DeliveryState.FAILED:
            self._drop_file(item.path.stem)

    def _postpone(
        self, destination: Destination, left: dict[int, OutgoingObject], why: str
    ) -> None:
        """Requeue what was not sent, and delay the next attempt at the destination."""
        now = self._clock.now()
        wait_s = self._backoff.failed(destination.name, now.timestamp())
        when = now + timedelta(seconds=wait_s)
        self._put_back(left, why, when)
        event(
            "unreachable",
            level=logging.WARNING,
            destination=destination.name,
            error=why,
            again_at=when.isoformat(timespec="seconds"),
        )

    def _put_back(self, ids: Collection[int], error: str, when: datetime) -> None:
        self._writer.call(lambda: self._deliveries.requeue(ids, error=error, next_attempt_at=when))

    def _drop_file(self, sop_instance_uid: str | None) -> None:
        """Remove an object's file once no destination waits for it."""
        if sop_instance_uid is None:
            return
        if not self._outages.wait_out(lambda: is_unsent(self._engine, sop_instance_uid)):
            self._packer.path(sop_instance_uid).unlink(missing_ok=True)
