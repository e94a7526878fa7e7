"""Storage commitment as SCP (PS3.4 annex J): other systems ask about what was received here."""

import logging
import threading
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING, Any

from sqlalchemy import Engine

from lungwatch.daemon.config import Config, Destination, is_ae_title, parse_destination
from lungwatch.daemon.home import Home
from lungwatch.daemon.logs import event as log
from lungwatch.daemon.pacs.commitment import (
    ALL_COMMITTED,
    INVALID_ARGUMENT,
    NO_SUCH_ACTION,
    NO_SUCH_INSTANCE,
    PROCESSING_FAILURE,
    PUSH_MODEL_INSTANCE,
    REQUEST_ACTION,
    SOME_FAILED,
    SUCCESS,
    CommitmentScu,
    ReportReceiver,
    check_size,
    parse_instances,
    references,
    set_uid,
    transaction_of,
)
from lungwatch.daemon.pacs.scu import UnreachableError
from lungwatch.daemon.retry import Backoff, Clock, Outages, ShutdownRequested
from lungwatch.daemon.stage import DatabaseWriter, OnCrash, Progress, Worker, crashpoint
from lungwatch.db.commitments import (
    Commitments,
    RequestRow,
    kept_paths,
    list_requests,
    pending_requests,
)
from lungwatch.errors import DatabaseError

if TYPE_CHECKING:
    from pydicom.dataset import Dataset
    from pynetdicom.association import Association
    from pynetdicom.events import Event

_POLL_S = 1.0
_LOOK_S = 0.2
# The answer to the request goes out first.
_ANSWER_S = 0.3
# What was received is decided within seconds; a backlog in the drop folder takes longer.
_IN_WORK_S = 300.0
_IN_BACKLOG_S = 3600.0
_REPORT_S = 300.0
_STOP_S = 5.0
_NO_ADDRESS = "no address of the requester in 'pacs.commitment_requesters'"


@dataclass(frozen=True, kw_only=True)
class Decision:
    """A report as it is sent."""

    dataset: "Dataset"
    event_type: int
    committed: int


class KeptInstances:
    """Decides which SOP instances this home keeps."""

    def __init__(self, home: Home, engine: Engine) -> None:
        self._home = home
        self._engine = engine

    def decide(self, row: RequestRow, now: datetime) -> Decision | None:
        """Return the report on a request; None while an object may still be on its way.

        An object is kept if its image has been filed, in `done/` or `quarantine/`, and the file is
        there.

        Raises
        ------
        DatabaseError
            If the rows cannot be read.
        OSError
            If the home cannot be read.
        """
        from pydicom.dataset import Dataset  # noqa: PLC0415 - of the extra

        wanted = [(one.partition(" ")[0], one.partition(" ")[2]) for one in row.instances]
        paths = kept_paths(self._engine, {uid for _, uid in wanted})
        kept = {
            uid
            for uid, found in paths.items()
            if any(self._home.absolute(path).is_file() for path in found)
        }
        missing = [pair for pair in wanted if pair[1] not in kept]
        if missing and self._may_come(row, now):
            return None
        dataset = Dataset()
        set_uid(dataset, "TransactionUID", row.transaction_uid)
        if len(missing) < len(wanted):
            dataset.ReferencedSOPSequence = references([pair for pair in wanted if pair[1] in kept])
        if missing:
            dataset.FailedSOPSequence = references(missing)
            for item in dataset.FailedSOPSequence:
                item.FailureReason = NO_SUCH_INSTANCE
        return Decision(
            dataset=dataset,
            event_type=SOME_FAILED if missing else ALL_COMMITTED,
            committed=len(wanted) - len(missing),
        )

    def _may_come(self, row: RequestRow, now: datetime) -> bool:
        """Return whether something that came before the request has no end yet."""
        age_s = (now - row.created_at).total_seconds()
        if age_s < _IN_WORK_S and any(self._home.work.iterdir()):
            return True
        if age_s >= _IN_BACKLOG_S:
            return False
        before_s = row.created_at.timestamp()
        for path in self._home.incoming.glob("pacs-*.dcm"):
            try:
                if path.stat().st_mtime <= before_s:
                    return True
            except FileNotFoundError:
                return True  # being claimed
        return False


class CommitmentScp:
    """Takes requests into the database, and reports on them, a thread a requester.

    A requester whose address is configured gets its report over a new association, for as long as
    it takes; another one over the association of the request, while that lasts.

    Parameters
    ----------
    reports
        Where reports of destinations go; None without destinations.
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
        progress: Progress,
        on_crash: OnCrash,
        reports: ReportReceiver | None,
    ) -> None:
        self._config = config
        self._engine = engine
        self._writer = writer
        self._outages = outages
        self._clock = clock
        self._progress = progress
        self._on_crash = on_crash
        self._reports = reports
        self._kept = KeptInstances(home, engine)
        self._commitments = Commitments(engine)
        self._limit = timedelta(seconds=config.pacs_commitment_deadline_s)
        self._stopped = threading.Event()
        names = (*config.pacs_destinations, *config.pacs_commitment_requesters)
        known = [parse_destination(name) for name in names]
        self._requesters = {peer.ae_title: peer for peer in known}
        self._users = {title: CommitmentScu(config) for title in self._requesters}
        self._threads = [
            Worker(f"commitment {peer.name}", partial(self._serve, peer), on_crash)
            for peer in self._requesters.values()
        ]
        for thread in self._threads:
            progress.watch(thread.name, extra_s=_REPORT_S)

    def start(self) -> None:
        """Start the threads; requests of a dead process are reported as well."""
        for row in self._pending():
            if row.ae_title not in self._requesters:
                self._give_up(row, _NO_ADDRESS)
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Stop the threads within a bound; what is not reported is at the next start."""
        self._stopped.set()
        for user in self._users.values():
            user.abort()
        for thread in self._threads:
            if thread.is_alive():
                thread.join(_STOP_S / len(self._threads))

    def on_report(self, event: "Event") -> tuple[int, None]:
        """Answer an N-EVENT-REPORT request."""
        if self._reports is None:
            return INVALID_ARGUMENT, None
        return self._reports.on_report(event)

    def on_action(self, event: "Event") -> tuple[int, None]:
        """Answer an N-ACTION request; success means that it is in the database."""
        caller = str(event.assoc.requestor.ae_title).strip()
        status, count = self._accept(event, caller)
        if status == SUCCESS:
            log("commitment_asked", caller=caller, count=count)
        else:
            log(
                "commitment_refused",
                level=logging.WARNING,
                caller=caller if is_ae_title(caller) else "",
                status=f"0x{status:04X}",
            )
        return status, None

    def _accept(self, event: "Event", caller: str) -> tuple[int, int]:
        request: Any = event.request
        if request.RequestedSOPInstanceUID != PUSH_MODEL_INSTANCE:
            return NO_SUCH_INSTANCE, 0
        if request.ActionTypeID != REQUEST_ACTION:
            return NO_SUCH_ACTION, 0
        try:
            check_size(request.ActionInformation)
            information = event.action_information
            uid = transaction_of(information)
            pairs = parse_instances(information.get("ReferencedSOPSequence"))
        # Damaged bytes may raise any exception in pydicom.
        except Exception:
            return INVALID_ARGUMENT, 0
        if not pairs or not is_ae_title(caller):
            return INVALID_ARGUMENT, 0
        now = self._clock.now()
        instances = [f"{sop_class} {instance}" for sop_class, instance in pairs]
        try:
            request_id = self._writer.call(
                lambda: self._commitments.accept(caller, uid, instances, now)
            )
        except (DatabaseError, ShutdownRequested):
            return PROCESSING_FAILURE, 0
        crashpoint("commitment_accepted")
        if caller not in self._requesters:
            work = partial(self._report_here, event.assoc, request_id)
            Worker(f"commitment {request_id}", work, self._on_crash).start()
        return SUCCESS, len(pairs)

    def _report_here(self, association: "Association", request_id: int) -> None:
        """Report over the requester's own association, while it lasts."""
        row = next((row for row in self._pending() if row.id == request_id), None)
        self._stopped.wait(_ANSWER_S)
        while row is not None and association.is_established and not self._stopped.is_set():
            decision = self._decide(row)
            if decision is None:
                self._stopped.wait(_LOOK_S)
                continue
            try:
                CommitmentScu(self._config).report_on(
                    association, decision.dataset, decision.event_type
                )
            except UnreachableError:
                break
            self._conclude(row, decision)
            return
        if row is not None and not self._stopped.is_set():
            self._give_up(row, _NO_ADDRESS)

    def _serve(self, peer: Destination) -> None:
        name = f"commitment {peer.name}"
        backoff = Backoff[str](
            first_s=self._config.pacs_retry_s, most_s=self._config.pacs_retry_max_s
        )
        while not self._stopped.wait(_POLL_S):
            now = self._clock.now()
            if not backoff.is_due(name, now.timestamp()):
                continue
            with self._progress.busy(name):
                for row in self._outages.wait_out(
                    partial(pending_requests, self._engine, peer.ae_title, now)
                ):
                    if self._stopped.is_set() or not self._report(row, peer, backoff):
                        break

    def _report(self, row: RequestRow, peer: Destination, backoff: Backoff[str]) -> bool:
        """Report on one request if it is decided; False if the requester was not reached."""
        decision = self._decide(row)
        if decision is None:
            return True
        name = f"commitment {peer.name}"
        self._progress.beat(name)
        try:
            self._users[peer.ae_title].report(peer, decision.dataset, decision.event_type)
        except UnreachableError as error:
            now, why = self._clock.now(), str(error)
            if now - row.created_at > self._limit:
                self._give_up(row, why)
                return True
            when = now + timedelta(seconds=backoff.failed(name, now.timestamp()))
            self._writer.call(
                lambda: self._commitments.put_off(
                    row.id, error=why, next_attempt_at=when, is_try=True
                )
            )
            log("commitment_not_reported", level=logging.WARNING, requester=peer.name, error=why)
            return False
        backoff.succeeded(name)
        self._conclude(row, decision)
        return True

    def _pending(self) -> list[RequestRow]:
        return self._outages.wait_out(lambda: list_requests(self._engine, pending_only=True))

    def _decide(self, row: RequestRow) -> Decision | None:
        return self._outages.wait_out(lambda: self._kept.decide(row, self._clock.now()))

    def _conclude(self, row: RequestRow, decision: Decision) -> None:
        now = self._clock.now()
        self._writer.call(
            lambda: self._commitments.reported(row.id, committed=decision.committed, now=now)
        )
        log(
            "commitment_reported",
            requester=row.ae_title,
            committed=decision.committed,
            failed=len(row.instances) - decision.committed,
        )

    def _give_up(self, row: RequestRow, why: str) -> None:
        self._writer.call(lambda: self._commitments.not_reported(row.id, why))
        log("commitment_not_reported", level=logging.ERROR, requester=row.ae_title, error=why)
