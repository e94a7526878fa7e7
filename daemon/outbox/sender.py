"""The one thread that sends what is owed to PACS, for as long as it takes."""

import logging
import threading
from collections.abc import Callable, Collection, Sequence
from contextlib import closing
from datetime import datetime, timedelta

from sqlalchemy import Engine

from lungwatch.daemon.clock import Clock
from lungwatch.daemon.config import Config
from lungwatch.daemon.crashpoint import crashpoint
from lungwatch.daemon.home import Home
from lungwatch.daemon.logs import event
from lungwatch.daemon.outage import Outages
from lungwatch.daemon.outbox.backoff import Backoff
from lungwatch.daemon.outbox.destination import Destination, parse_destination
from lungwatch.daemon.outbox.packing import CannotBuildError, OriginalInUseError, Packer
from lungwatch.daemon.outbox.scu import (
    Answer,
    Parcel,
    StorageUser,
    TlsFiles,
    UnreachableError,
    Verdict,
)
from lungwatch.daemon.vitals import Vitals
from lungwatch.daemon.worker import Worker
from lungwatch.daemon.writer import Writer
from lungwatch.db.deliveries import Deliveries
from lungwatch.db.delivery_queries import DeliveryRow, due, is_unsent
from lungwatch.db.delivery_states import DeliveryState

MAX_REFUSALS = 5
# Enough for one association; few enough that a crash leaves few whose fate is not known.
_AT_ONCE = 20
_POLL_S = 1.0
_ABORT_S = 5.0


class Sender:
    """Takes what is due, builds it, sends it, and tells the database what came of it.

    What happens to a destination is never the pipeline's trouble: the two meet in the
    database alone. One that is not reached is left alone for longer each time, whatever
    waits for it, and is never given up; what it refuses for good has failed after
    `MAX_REFUSALS` times.

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
        writer: Writer,
        outages: Outages,
        clock: Clock,
        on_crash: Callable[[str, BaseException], None],
        vitals: Vitals | None = None,
    ) -> None:
        self._engine = engine
        self._vitals = vitals or Vitals(clock)
        self._writer = writer
        self._outages = outages
        self._clock = clock
        self._destinations = [parse_destination(text) for text in config.pacs_destinations]
        self._longest = timedelta(seconds=config.pacs_retry_max_s)
        self._backoff = Backoff(first_s=config.pacs_retry_s, most_s=config.pacs_retry_max_s)
        self._deliveries = Deliveries(engine)
        self._packer = Packer(config=config, home=home, engine=engine)
        self._user = StorageUser(config.pacs_ae_title, TlsFiles.of(config))
        self._stopped = threading.Event()
        self._thread = Worker("sender", self._run, on_crash)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self, timeout_s: float) -> None:
        """Begin nothing more and end: what is being sent may be finished for so long."""
        self._stopped.set()
        if not self._thread.is_alive():
            return
        self._thread.join(timeout_s)
        # While it is still calling, nothing was sent: its thread ends with the process.
        if self._thread.is_alive() and self._user.abort():
            self._thread.join(_ABORT_S)

    def cancel(self) -> None:
        """Let `work_off`, on another thread, end after the object that it is sending."""
        self._stopped.set()

    def recover(self) -> None:
        """Put back what a dead process was sending, and sweep its files."""
        now = self._clock.now()
        count = self._writer.call(lambda: self._deliveries.recover(now))
        if count:
            event("resend", count=count)
        self._packer.sweep()

    def work_off(self) -> None:
        """Send all that is due, once: a destination that is not reached keeps waiting."""
        while not self._stopped.is_set() and self._send_due():
            pass

    def _run(self) -> None:
        self.recover()
        while not self._stopped.is_set():
            with self._vitals.busy("outbox"):
                had_some = self._send_due()
            if not had_some:
                self._stopped.wait(_POLL_S)

    def _send_due(self) -> bool:
        """Give each destination one association; whether any of them had something due."""
        return sum([self._serve(destination) for destination in self._destinations]) > 0

    def _serve(self, destination: Destination) -> bool:
        now = self._clock.now()
        if self._stopped.is_set() or not self._backoff.is_open(destination.name, now):
            return False
        rows = self._outages.ride_out(
            lambda: due(
                self._engine, destination.name, now=now, longest=self._longest, limit=_AT_ONCE
            )
        )
        if not rows:
            return False
        ids = [row.id for row in rows]
        self._writer.call(lambda: self._deliveries.start(ids))
        parcels = [parcel for row in rows if (parcel := self._pack(row)) is not None]
        crashpoint("packed")
        if parcels:
            self._transmit(destination, parcels)
        return True

    def _pack(self, row: DeliveryRow) -> Parcel | None:
        """Build the object of a delivery; None if it has met its end, or waits again."""
        try:
            parcel = self._outages.ride_out(lambda: self._packer.pack(row, self._note_uid))
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
        except OSError as error:  # no rights: nothing that is the object's fault
            text = f"cannot write to the outbox: {error.strerror}"
            when = self._clock.now() + timedelta(seconds=self._backoff.after(row.attempts + 1))
            self._put_back([row.id], text, when)
            event("not_packed", row.sha256, level=logging.ERROR, error=text)
            return None
        return parcel

    def _note_uid(self, row: DeliveryRow, uid: str) -> None:
        self._writer.call(lambda: self._deliveries.built(row.result_id, row.kind, uid))

    def _transmit(self, destination: Destination, parcels: Sequence[Parcel]) -> None:
        left = {parcel.delivery_id: parcel for parcel in parcels}
        try:
            with closing(self._user.send(destination, parcels)) as answers:
                for parcel, answer in answers:
                    self._vitals.beat("outbox")
                    if answer.verdict is Verdict.NO_ROOM:
                        self._leave_alone(destination, left, answer.text)
                        return
                    self._backoff.reached(destination.name)
                    del left[parcel.delivery_id]
                    self._conclude(destination, parcel, answer)
                    if self._stopped.is_set():
                        break
        except UnreachableError as error:
            self._leave_alone(destination, left, str(error))
            return
        if left:
            self._put_back(left, "the service was stopped", self._clock.now())

    def _conclude(self, destination: Destination, parcel: Parcel, answer: Answer) -> None:
        now = self._clock.now()
        if answer.verdict is Verdict.STORED:
            crashpoint("stored")
            self._writer.call(lambda: self._deliveries.sent(parcel.delivery_id, now))
            event("sent", parcel.sha256, kind=parcel.kind, destination=destination.name)
            self._drop_file(parcel.sop_instance_uid)
            return
        when = now + timedelta(seconds=self._backoff.after(parcel.refusals + 1))
        state = self._writer.call(
            lambda: self._deliveries.refused(
                parcel.delivery_id, error=answer.text, next_attempt_at=when, most=MAX_REFUSALS
            )
        )
        event(
            "refused",
            parcel.sha256,
            level=logging.ERROR if state is DeliveryState.FAILED else logging.WARNING,
            kind=parcel.kind,
            destination=destination.name,
            error=answer.text,
            state=state,
        )
        if state is DeliveryState.FAILED:
            self._drop_file(parcel.sop_instance_uid)

    def _leave_alone(self, destination: Destination, left: dict[int, Parcel], why: str) -> None:
        """Put back what did not get through, and shut the destination off for a while."""
        when = self._backoff.failed(destination.name, self._clock.now())
        self._put_back(left, why, when)
        event(
            "unreachable",
            level=logging.WARNING,
            destination=destination.name,
            error=why,
            again_at=when.isoformat(timespec="seconds"),
        )

    def _put_back(self, ids: Collection[int], error: str, when: datetime) -> None:
        self._writer.call(lambda: self._deliveries.put_back(ids, error=error, next_attempt_at=when))

    def _drop_file(self, sop_instance_uid: str | None) -> None:
        """Remove an object's file once no destination waits for it."""
        if sop_instance_uid is None:
            return
        if not self._outages.ride_out(lambda: is_unsent(self._engine, sop_instance_uid)):
            self._packer.path(sop_instance_uid).unlink(missing_ok=True)
