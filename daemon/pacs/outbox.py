"""Outbox: the files of objects that destinations are owed, and a sender for each destination."""

import importlib.util
import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, cast

from sqlalchemy import Engine

from lungwatch.daemon.config import Config, parse_destination
from lungwatch.daemon.home import Home
from lungwatch.daemon.intake.custody import OwnedFile
from lungwatch.daemon.logs import event
from lungwatch.daemon.pacs.commitment import CommitmentRequester, ReportReceiver
from lungwatch.daemon.pacs.destination import (
    CannotBuildError,
    DestinationSender,
    OriginalInUseError,
    SenderContext,
)
from lungwatch.daemon.pacs.scu import OutgoingObject
from lungwatch.daemon.retry import Clock, Outages, answer_future
from lungwatch.daemon.stage import DatabaseWriter, Progress, Worker
from lungwatch.db.commitments import Commitments
from lungwatch.db.deliveries import (
    Deliveries,
    DeliveryRow,
    SentReport,
    earlier_report,
    is_unsent,
    object_uid,
    unsent_uids,
)
from lungwatch.db.queries import ResultRow, get_result, is_unfinished
from lungwatch.errors import (
    ConfigError,
    DatabaseError,
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
_CHANGED = (
    "the filed original is not the file that was scored (its SHA-256 differs): see `lungwatch "
    "reconcile`, and restore it from a backup"
)


class ObjectStore:
    """Object files in the outbox: built on demand, kept until every destination has them.

    The senders share it: one object is built at a time, while none of them waits for a peer.

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
        # Held while an object is built or its file removed, never while one is sent.
        self._lock = threading.Lock()

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
        with self._lock:
            return self._pack(row, note)

    def remove_if_unneeded(self, sop_instance_uid: str) -> None:
        """Remove an object's file unless a destination still waits for it.

        Raises
        ------
        DatabaseError
            If the deliveries cannot be read.
        """
        with self._lock:
            if not is_unsent(self._engine, sop_instance_uid):
                self.path(sop_instance_uid).unlink(missing_ok=True)

    def _pack(self, row: DeliveryRow, note: Callable[[DeliveryRow, str], None]) -> OutgoingObject:
        uid = row.sop_instance_uid or object_uid(self._engine, row.result_id, row.kind)
        if uid is not None:
            path = self.path(uid)
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
            facts = _facts(result, self._home, earlier)
            # Read through the descriptor on which its digest was checked.
            with (
                closing(_original(self._home, result)) as original,
                original.reader() as source,
            ):
                (built,) = build_objects(
                    facts,
                    source,
                    kinds=(cast("Kind", row.kind),),
                    sr=self._report_class,
                    deidentify_key=self._secret,
                )
        except CannotBuildError:
            raise
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


def _original(home: Home, result: ResultRow) -> OwnedFile:
    """Open the file that was scored; what is read of it is what its digest was checked on."""
    original = OwnedFile.open(home.absolute(result.file or ""))
    if original.sha256 != result.sha256:
        original.close()
        raise CannotBuildError(_CHANGED)
    return original


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
        overlay_sha256=result.overlay_sha256,
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


_ABORT_S = 5.0
_ASSOCIATION_S = 900.0  # of many objects, each with the network's timeouts


class Sender:
    """The senders of all destinations, a thread each.

    A destination that is slow or not reached holds up neither the pipeline nor the others: they
    share the database, its writer and the files of the outbox alone.

    Attributes
    ----------
    reports
        Takes the destinations' reports on storage commitment that come to the listener.

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
        progress = progress or Progress(clock)
        # Of all destinations together, for the histogram; each has a limit of its own.
        progress.watch("outbox", extra_s=math.inf)
        self._writer = writer
        self._clock = clock
        self._deliveries = Deliveries(engine)
        self._objects = ObjectStore(config=config, home=home, engine=engine)
        self._stopped = threading.Event()
        context = SenderContext(
            config=config,
            engine=engine,
            writer=writer,
            outages=outages,
            clock=clock,
            progress=progress,
            objects=self._objects,
            stopped=self._stopped,
            on_crash=on_crash,
        )
        self.reports = ReportReceiver(
            config=config,
            commitments=Commitments(engine),
            writer=writer,
            clock=clock,
            objects=self._objects,
        )
        self._senders = [
            DestinationSender(
                destination,
                context,
                CommitmentRequester(destination, context, self.reports)
                if destination.name in config.pacs_storage_commitment
                else None,
            )
            for destination in map(parse_destination, config.pacs_destinations)
        ]
        for sender in self._senders:
            progress.watch(sender.name, extra_s=_ASSOCIATION_S)
        self._starter = Worker("sender", self._begin, on_crash)

    def start(self) -> None:
        """Start the threads, once what a dead process was sending is queued again."""
        self._starter.start()

    def stop(self, timeout_s: float) -> None:
        """End the threads, after at most `timeout_s` for the objects that are being sent."""
        self._stopped.set()
        if not self._starter.ident:
            return  # never started
        self._join(timeout_s)
        # One that is still connecting has sent nothing: its thread ends with the process.
        connected = [sender for sender in self._senders if sender.is_alive and sender.abort()]
        if connected:
            self._join(_ABORT_S)

    def cancel(self) -> None:
        """Make `work_off`, on another thread, return after the objects that are being sent."""
        self._stopped.set()

    def recover(self) -> None:
        """Requeue what a dead process was sending, and remove its stray files."""
        now = self._clock.now()
        count = self._writer.call(lambda: self._deliveries.recover(now))
        if count:
            event("resend", count=count)
        self._objects.sweep()

    def work_off(self) -> None:
        """Send all that is due, once; a destination that is not reached is left for later."""
        answers: list[Future[None]] = []
        for sender in self._senders:
            answers.append(Future())
            threading.Thread(
                target=answer_future,
                args=(sender.work_off, answers[-1]),
                name=sender.name,
                daemon=True,
            ).start()
        for answer in answers:
            answer.result()

    def _begin(self) -> None:
        self.recover()
        for sender in self._senders:
            if not self._stopped.is_set():
                sender.start()

    def _join(self, timeout_s: float) -> None:
        deadline_s = time.monotonic() + timeout_s
        self._starter.join(timeout_s)
        for sender in self._senders:
            sender.join(max(0.0, deadline_s - time.monotonic()))
