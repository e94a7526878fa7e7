"""Sender of one destination: its thread, its back-off, and the outcome of what it sends."""

import logging
import threading
from collections.abc import Callable, Collection, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Protocol

from sqlalchemy import Engine

from lungwatch.daemon.config import Config, Destination
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
from lungwatch.db.deliveries import Deliveries, DeliveryRow, due_deliveries
from lungwatch.db.models import DeliveryState
from lungwatch.errors import LungwatchError

MAX_REFUSALS = 5
# Objects of one association; after a crash, the outcome of as many is unknown.
_AT_ONCE = 20
_POLL_S = 1.0


class CannotBuildError(LungwatchError):
    """No valid object can be made of a result; the text has no patient data."""


class OriginalInUseError(LungwatchError):
    """The original is being scored by another model at this moment."""


class Objects(Protocol):
    """Object files that the senders share (`outbox.ObjectStore`)."""

    def path(self, sop_instance_uid: str) -> Path:
        """Return the path of an object's file."""

    def pack(self, row: DeliveryRow, note: Callable[[DeliveryRow, str], None]) -> OutgoingObject:
        """Return a delivery's object as a file, which is built if missing."""

    def remove_if_unneeded(self, sop_instance_uid: str) -> None:
        """Remove an object's file unless a destination still waits for it."""


class Committing(Protocol):
    """Storage commitment by one destination (`commitment.CommitmentRequester`)."""

    def work(self) -> None:
        """Do what is due."""

    def close(self) -> None:
        """Release the association that a report is awaited on."""

    def abort(self) -> bool:
        """Break the connection; return whether there was one."""


@dataclass(frozen=True, kw_only=True)
class SenderContext:
    """What the senders of all destinations share.

    Attributes
    ----------
    stopped
        Set once nothing more is to be sent.
    on_crash
        As of `Worker`.
    """

    config: Config
    engine: Engine
    writer: DatabaseWriter
    outages: Outages
    clock: Clock
    progress: Progress
    objects: Objects
    stopped: threading.Event
    on_crash: Callable[[str, BaseException], None]


class DestinationSender:
    """Thread that sends what one destination is owed, and records the outcome.

    A destination that is not reached is retried for ever, with increasing delays; an object that
    is refused `MAX_REFUSALS` times has failed.

    Attributes
    ----------
    name
        Of the thread, and of its stage in `Progress`.

    Parameters
    ----------
    commitment
        None where storage commitment is not asked for.
    """

    def __init__(
        self,
        destination: Destination,
        context: SenderContext,
        commitment: Committing | None = None,
    ) -> None:
        self.name = f"outbox {destination.name}"
        self._destination = destination
        self._context = context
        self._commitment = commitment
        config = context.config
        self._longest = timedelta(seconds=config.pacs_retry_max_s)
        self._backoff = Backoff[str](first_s=config.pacs_retry_s, most_s=config.pacs_retry_max_s)
        self._deliveries = Deliveries(context.engine)
        self._user = StorageScu(config)
        self._thread = Worker(self.name, self._run, context.on_crash)

    @property
    def is_alive(self) -> bool:
        """Whether its thread runs."""
        return self._thread.is_alive()

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def join(self, timeout_s: float) -> None:
        """Wait for the end of the thread, if it was started."""
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def abort(self) -> bool:
        """Break the connection at once; return whether there was one."""
        is_committing = self._commitment is not None and self._commitment.abort()
        return self._user.abort() or is_committing

    def work_off(self) -> None:
        """Send all that is due, once; what is not reached is left for later."""
        while not self._context.stopped.is_set() and self._send_due():
            pass

    def _run(self) -> None:
        progress = self._context.progress
        while not self._context.stopped.is_set():
            with progress.busy(self.name), progress.busy("outbox"):
                had_some = self._send_due()
                if self._commitment is not None and not self._context.stopped.is_set():
                    self._commitment.work()
            if not had_some:
                self._context.stopped.wait(_POLL_S)
        if self._commitment is not None:
            self._commitment.close()

    def _send_due(self) -> bool:
        """Send what is due over one association; return whether anything was."""
        context, name = self._context, self._destination.name
        now = context.clock.now()
        if context.stopped.is_set() or not self._backoff.is_due(name, now.timestamp()):
            return False
        rows = context.outages.wait_out(
            lambda: due_deliveries(
                context.engine, name, now=now, longest=self._longest, limit=_AT_ONCE
            )
        )
        if not rows:
            return False
        ids = [row.id for row in rows]
        context.writer.call(lambda: self._deliveries.start(ids))
        objects = [item for row in rows if (item := self._pack(row)) is not None]
        crashpoint("packed")
        if objects:
            self._transmit(objects)
        return True

    def _pack(self, row: DeliveryRow) -> OutgoingObject | None:
        """Build the object of a delivery; None if it is invalid or was put back."""
        context = self._context
        try:
            return context.outages.wait_out(lambda: context.objects.pack(row, self._note_uid))
        except CannotBuildError as error:
            text = str(error)
            context.writer.call(lambda: self._deliveries.invalid(row.id, text))
            event("invalid_object", row.sha256, level=logging.ERROR, kind=row.kind, error=text)
            if row.sop_instance_uid is not None:
                self._drop_file(row.sop_instance_uid)
        except OriginalInUseError as error:
            when = context.clock.now() + timedelta(seconds=_POLL_S)
            self._put_back([row.id], str(error), when)
        except OSError as error:  # such as missing permissions: not the object's fault
            text = f"cannot write to the outbox: {error.strerror}"
            wait_s = self._backoff.delay_s(row.attempts + 1)
            self._put_back([row.id], text, context.clock.now() + timedelta(seconds=wait_s))
            event("not_packed", row.sha256, level=logging.ERROR, error=text)
        return None

    def _note_uid(self, row: DeliveryRow, uid: str) -> None:
        self._context.writer.call(lambda: self._deliveries.built(row.result_id, row.kind, uid))

    def _transmit(self, objects: Sequence[OutgoingObject]) -> None:
        left = {item.row.id: item for item in objects}
        progress = self._context.progress
        try:
            with closing(self._user.send(self._destination, objects)) as answers:
                for item, answer in answers:
                    progress.beat(self.name)
                    if answer.verdict is StoreVerdict.OUT_OF_RESOURCES:
                        self._postpone(left, answer.text)
                        return
                    self._backoff.succeeded(self._destination.name)
                    del left[item.row.id]
                    self._conclude(item, answer)
                    if self._context.stopped.is_set():
                        break
        except UnreachableError as error:
            self._postpone(left, str(error))
            return
        if left:
            self._put_back(left, "the service was stopped", self._context.clock.now())

    def _conclude(self, item: OutgoingObject, answer: Answer) -> None:
        now, destination = self._context.clock.now(), self._destination.name
        if answer.verdict is StoreVerdict.STORED:
            crashpoint("stored")
            self._context.writer.call(
                lambda: self._deliveries.sent(
                    item.row.id,
                    now,
                    sop_class_uid=item.sop_class_uid,
                    commit=destination in self._context.config.pacs_storage_commitment,
                )
            )
            event("sent", item.row.sha256, kind=item.row.kind, destination=destination)
            self._drop_file(item.path.stem)
            return
        when = now + timedelta(seconds=self._backoff.delay_s(item.row.refusals + 1))
        state = self._context.writer.call(
            lambda: self._deliveries.refused(
                item.row.id, error=answer.text, next_attempt_at=when, most=MAX_REFUSALS
            )
        )
        event(
            "refused",
            item.row.sha256,
            level=logging.ERROR if state is DeliveryState.FAILED else logging.WARNING,
            kind=item.row.kind,
            destination=destination,
            error=answer.text,
            state=state,
        )
        if state is DeliveryState.FAILED:
            self._drop_file(item.path.stem)

    def _postpone(self, left: dict[int, OutgoingObject], why: str) -> None:
        """Requeue what was not sent, and delay the next attempt at the destination."""
        now, destination = self._context.clock.now(), self._destination.name
        when = now + timedelta(seconds=self._backoff.failed(destination, now.timestamp()))
        self._put_back(left, why, when)
        event(
            "unreachable",
            level=logging.WARNING,
            destination=destination,
            error=why,
            again_at=when.isoformat(timespec="seconds"),
        )

    def _put_back(self, ids: Collection[int], error: str, when: datetime) -> None:
        self._context.writer.call(
            lambda: self._deliveries.requeue(ids, error=error, next_attempt_at=when)
        )

    def _drop_file(self, sop_instance_uid: str) -> None:
        """Remove an object's file once no destination waits for it."""
        objects = self._context.objects
        self._context.outages.wait_out(lambda: objects.remove_if_unneeded(sop_instance_uid))
