"""Storage commitment as SCU (PS3.4 annex J): requests to a destination, and its reports."""

import logging
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Protocol

from lungwatch.daemon.config import Config, Destination
from lungwatch.daemon.logs import event as log
from lungwatch.daemon.pacs.destination import Objects, SenderContext
from lungwatch.daemon.pacs.scu import StorageScu, UnreachableError
from lungwatch.daemon.retry import Backoff, Clock, ShutdownRequested
from lungwatch.daemon.stage import DatabaseWriter, crashpoint
from lungwatch.db.commitments import Commitments, DueCommitment, due_commitments
from lungwatch.errors import DatabaseError

if TYPE_CHECKING:
    from pydicom.dataset import Dataset
    from pynetdicom.association import Association
    from pynetdicom.events import Event

PUSH_MODEL = "1.2.840.10008.1.20.1"
# Of the one instance that all requests are about (PS3.4, J.3.5).
PUSH_MODEL_INSTANCE = "1.2.840.10008.1.20.1.1"
REQUEST_ACTION = 1
ALL_COMMITTED, SOME_FAILED = 1, 2
# PS3.4 J.3.3.1.1 and J.3.2.1.4, PS3.7 annex C.
SUCCESS = 0x0000
PROCESSING_FAILURE = 0x0110
NO_SUCH_INSTANCE = 0x0112
INVALID_ARGUMENT = 0x0115
NO_SUCH_ACTION = 0x0123
MOST_LOSSES = 3
"""Reports of "not committed" after which an object is no longer sent again."""
MOST_INSTANCES = 10_000
_MOST_BYTES = 4 * 1024 * 1024
# As files have them (`source.read_source`).
_UID = re.compile(r"[0-9][0-9.]{0,63}", re.ASCII)
_AT_ONCE = 100
# A destination may report on the association of the request; most open one of their own.
_HOLD_S = 10.0
_EXPIRE_EVERY_S = 15.0
_DIMSE_S = 60.0


@dataclass(frozen=True, kw_only=True)
class Report:
    """Outcome of one transaction: committed UIDs, and failure reasons by UID."""

    transaction_uid: str
    committed: frozenset[str]
    failed: Mapping[str, int]


def references(instances: Sequence[tuple[str, str]]) -> "list[Dataset]":
    """Return items of a Referenced SOP Sequence for pairs of SOP class and instance."""
    from pydicom.dataset import Dataset  # noqa: PLC0415 - only where something is sent

    items = []
    for sop_class_uid, sop_instance_uid in instances:
        item = Dataset()
        set_uid(item, "ReferencedSOPClassUID", sop_class_uid)
        set_uid(item, "ReferencedSOPInstanceUID", sop_instance_uid)
        items.append(item)
    return items


def set_uid(dataset: "Dataset", keyword: str, uid: str) -> None:
    """Set a UID as its owner wrote it: a leading zero, which PS3.5 9.1 forbids, is repeated."""
    from pydicom.config import IGNORE  # noqa: PLC0415 - only where something is sent
    from pydicom.dataelem import DataElement  # noqa: PLC0415 - as above
    from pydicom.tag import Tag  # noqa: PLC0415 - as above

    dataset.add(DataElement(Tag(keyword), "UI", uid, validation_mode=IGNORE))


def parse_instances(items: Any) -> list[tuple[str, str]]:  # noqa: ANN401 - a pydicom sequence
    """Return the pairs of SOP class and instance of a sequence.

    Raises
    ------
    ValueError
        If there are too many, or a UID is missing or too long.
    """
    found = [
        (str(item.ReferencedSOPClassUID), str(item.ReferencedSOPInstanceUID))
        for item in (items or ())
    ]
    if len(found) > MOST_INSTANCES or not all(
        _UID.fullmatch(uid) for pair in found for uid in pair
    ):
        raise ValueError("too many instances, or an invalid UID")
    return found


def transaction_of(dataset: "Dataset") -> str:
    """Return the transaction UID.

    Raises
    ------
    ValueError
        If it is missing or too long.
    """
    uid = str(dataset.get("TransactionUID") or "")
    if not _UID.fullmatch(uid):
        raise ValueError("no usable transaction UID")
    return uid


def check_size(encoded: Any) -> None:  # noqa: ANN401 - a BytesIO, or None
    """Refuse a data set that is missing or too large to be one of a commitment.

    Raises
    ------
    ValueError
        If it is.
    """
    if encoded is None or not 0 < len(encoded.getvalue()) <= _MOST_BYTES:
        raise ValueError("missing or too large")


def parse_report(dataset: "Dataset") -> Report:
    """Parse the event information of an N-EVENT-REPORT (PS3.4, table J.3-2).

    Raises
    ------
    ValueError
        If it is malformed.
    """
    failed = dataset.get("FailedSOPSequence")
    reasons = {
        str(item.ReferencedSOPInstanceUID): int(item.get("FailureReason") or PROCESSING_FAILURE)
        for item in (failed or ())
    }
    parse_instances(failed)
    return Report(
        transaction_uid=transaction_of(dataset),
        committed=frozenset(
            uid for _, uid in parse_instances(dataset.get("ReferencedSOPSequence"))
        ),
        failed=reasons,
    )


class CommitmentScu(StorageScu):
    """Associations for storage commitment with one peer at a time."""

    def request(
        self,
        destination: Destination,
        transaction_uid: str,
        instances: Sequence[tuple[str, str]],
        on_report: "Callable[[Event], tuple[int, None]]",
    ) -> "Association":
        """Ask a destination to commit (N-ACTION), and return the association.

        Raises
        ------
        UnreachableError
            If it was not reached, or did not take the request.
        """
        from pydicom.dataset import Dataset  # noqa: PLC0415 - only where something is sent
        from pynetdicom import evt  # noqa: PLC0415

        association = self._associate(
            self._entity({PUSH_MODEL}),
            destination,
            handlers=[(evt.EVT_N_EVENT_REPORT, on_report)],
        )
        if not association.is_established:
            raise UnreachableError("storage commitment is not accepted")
        information = Dataset()
        information.TransactionUID = transaction_uid
        information.ReferencedSOPSequence = references(instances)
        try:
            with self._limited(_DIMSE_S):
                status, _ = association.send_n_action(
                    information, REQUEST_ACTION, PUSH_MODEL, PUSH_MODEL_INSTANCE
                )
        except (RuntimeError, ValueError, AttributeError, OSError) as error:
            raise UnreachableError("the association broke") from error
        self._check(association, status, "N-ACTION")
        return association

    def report(self, destination: Destination, dataset: "Dataset", event_type: int) -> None:
        """Report to a requester over a new association, as its SCP (N-EVENT-REPORT).

        Raises
        ------
        UnreachableError
            If it was not reached, or did not take the report.
        """
        from pynetdicom.presentation import build_role  # noqa: PLC0415 - as above

        association = self._associate(
            self._entity({PUSH_MODEL}),
            destination,
            # PS3.4 J.3.3: the SCP opens the association, and says by role selection that it is one.
            ext_neg=[build_role(PUSH_MODEL, scu_role=False, scp_role=True)],
        )
        if not association.is_established:
            raise UnreachableError("storage commitment is not accepted")
        self.report_on(association, dataset, event_type)
        self.release(association)

    def report_on(self, association: "Association", dataset: "Dataset", event_type: int) -> None:
        """Report over an association that there is.

        Raises
        ------
        UnreachableError
            If it broke, or the requester did not take the report.
        """
        try:
            with self._limited(_DIMSE_S):
                status, _ = association.send_n_event_report(
                    dataset, event_type, PUSH_MODEL, PUSH_MODEL_INSTANCE
                )
        except (RuntimeError, ValueError, AttributeError, OSError) as error:
            raise UnreachableError("the association broke") from error
        self._check(association, status, "N-EVENT-REPORT")

    def release(self, association: "Association") -> None:
        """Release an association, within a time limit."""
        self._release(association)
        self._association = None

    def _check(self, association: "Association", status: "Dataset", what: str) -> None:
        if "Status" not in status:
            raise UnreachableError(f"{what} was not answered")
        if status.Status != SUCCESS:
            self.release(association)
            raise UnreachableError(f"{what} status 0x{int(status.Status):04X}")


class ReportReceiver:
    """Applies the reports of destinations, whichever association they come on."""

    def __init__(
        self,
        *,
        config: Config,
        commitments: Commitments,
        writer: DatabaseWriter,
        clock: Clock,
        objects: Objects,
    ) -> None:
        self._backoff = Backoff[str](first_s=config.pacs_retry_s, most_s=config.pacs_retry_max_s)
        self._commitments = commitments
        self._writer = writer
        self._clock = clock
        self._objects = objects

    def on_report(self, event: "Event") -> tuple[int, None]:
        """Answer an N-EVENT-REPORT request; success means that the outcome is recorded."""
        request: Any = event.request
        try:
            check_size(request.EventInformation)
            report = parse_report(event.event_information)
        # Damaged bytes may raise any exception in pydicom.
        except Exception:
            log("bad_report", level=logging.WARNING, caller=event.assoc.requestor.ae_title)
            return INVALID_ARGUMENT, None
        try:
            return self._apply(report), None
        except (DatabaseError, OSError, ShutdownRequested):
            return PROCESSING_FAILURE, None  # it is asked for again

    def _apply(self, report: Report) -> int:
        now = self._clock.now()
        outcome = self._writer.call(
            lambda: self._commitments.report(
                report.transaction_uid,
                committed=report.committed,
                failed=report.failed,
                now=now,
                next_attempt_at=now + timedelta(seconds=self._backoff.delay_s(1)),
                most=MOST_LOSSES,
            )
        )
        if outcome is None:
            log("bad_report", level=logging.WARNING, why="unknown transaction")
            return INVALID_ARGUMENT
        has_lost = outcome.again or outcome.failed
        log(
            "committed" if not has_lost else "not_committed",
            level=logging.INFO if not has_lost else logging.ERROR,
            destination=outcome.destination,
            committed=len(outcome.committed),
            again=outcome.again,
            failed=outcome.failed,
        )
        for uid in (*outcome.committed, *(report.failed if outcome.failed else ())):
            self._objects.remove_if_unneeded(uid)
        return SUCCESS


class CommitmentRequester:
    """Asks one destination to commit what it was sent; called by its sender's thread."""

    def __init__(
        self, destination: Destination, context: SenderContext, reports: ReportReceiver
    ) -> None:
        config = context.config
        self._destination = destination
        self._context = context
        self._reports = reports
        self._wait = timedelta(seconds=config.pacs_commitment_wait_s)
        self._limit = timedelta(seconds=config.pacs_commitment_deadline_s)
        self._longest = max(self._wait, timedelta(seconds=config.pacs_retry_max_s))
        self._backoff = Backoff[str](first_s=config.pacs_retry_s, most_s=config.pacs_retry_max_s)
        self._expire_s = min(_EXPIRE_EVERY_S, config.pacs_commitment_wait_s)
        self._hold_s = min(_HOLD_S, config.pacs_commitment_wait_s)
        self._expired_at_s = float("-inf")
        self._commitments = Commitments(context.engine)
        self._user = CommitmentScu(config)
        self._held: Association | None = None
        self._held_until_s = 0.0

    def work(self) -> None:
        """Do what is due: end what is overdue, release what has waited, ask."""
        now_s = time.monotonic()
        if self._held is not None and (
            now_s >= self._held_until_s or not self._held.is_established
        ):
            self.close()
        if now_s - self._expired_at_s >= self._expire_s:
            self._expired_at_s = now_s
            self._expire()
        now = self._context.clock.now()
        if self._held is None and self._backoff.is_due(self._destination.name, now.timestamp()):
            rows = self._context.outages.wait_out(
                lambda: due_commitments(
                    self._context.engine,
                    self._destination.name,
                    now=now,
                    longest=self._longest,
                    limit=_AT_ONCE,
                )
            )
            if rows:
                self._ask(rows)

    def close(self) -> None:
        """Release the association that a report was awaited on."""
        held, self._held = self._held, None
        if held is not None:
            self._user.release(held)

    def abort(self) -> bool:
        """Break the connection; return whether there was one."""
        return self._user.abort()

    def _ask(self, rows: Sequence[DueCommitment]) -> None:
        from pydicom.uid import generate_uid  # noqa: PLC0415 - only where something is sent

        # Random: who does not know it cannot report on it.
        uid = str(generate_uid(prefix=None))
        name, now = self._destination.name, self._context.clock.now()
        self._context.writer.call(
            lambda: self._commitments.request(
                name,
                [row.id for row in rows],
                transaction_uid=uid,
                now=now,
                due_at=now + self._wait,
            )
        )
        crashpoint("commitment_noted")
        pairs = [(row.sop_class_uid or "", row.sop_instance_uid) for row in rows]
        try:
            held = self._user.request(self._destination, uid, pairs, self._on_report)
        except UnreachableError as error:
            why = str(error)
            when = now + timedelta(seconds=self._backoff.failed(name, now.timestamp()))
            self._context.writer.call(
                lambda: self._commitments.postpone(uid, error=why, now=now, due_at=when)
            )
            log("commitment_not_requested", level=logging.WARNING, destination=name, error=why)
            return
        crashpoint("commitment_asked")
        self._held, self._held_until_s = held, time.monotonic() + self._hold_s
        self._backoff.succeeded(name)
        log("commitment_requested", destination=name, count=len(rows))

    def _on_report(self, event: "Event") -> tuple[int, None]:
        answer = self._reports.on_report(event)
        self._held_until_s = 0.0
        return answer

    def _expire(self) -> None:
        name, now = self._destination.name, self._context.clock.now()
        failed = self._context.writer.call(
            lambda: self._commitments.expire(name, now=now, limit=self._limit)
        )
        if failed:
            log(
                "not_committed",
                level=logging.ERROR,
                destination=name,
                failed=len(failed),
                error="no report before the deadline",
            )
        for uid in failed:
            self._context.objects.remove_if_unneeded(uid)


class CommitmentHandlers(Protocol):
    """What the listener passes requests of storage commitment to."""

    def start(self) -> None:
        """Start the threads."""

    def stop(self) -> None:
        """Stop the threads."""

    def on_action(self, event: "Event") -> tuple[int, None]:
        """Answer an N-ACTION request."""

    def on_report(self, event: "Event") -> tuple[int, None]:
        """Answer an N-EVENT-REPORT request."""
