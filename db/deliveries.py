"""Deliveries: the outbox of objects for PACS destinations, its writes and its queries."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

from sqlalchemy import Connection, Engine, Select, func, or_, select, update

from lungwatch.db.engine import (
    Value,
    change_state,
    clean,
    columns_for,
    insert_if_new,
    read_rows,
    reading,
    state_of,
    writing,
)
from lungwatch.db.models import (
    UNCOMMITTED,
    UNSENT,
    CommitmentState,
    Delivery,
    DeliveryState,
    Image,
    Model,
    Result,
    check_transition,
)

if TYPE_CHECKING:
    AnySelect = Select[*tuple[Any, ...]]

# A delivery that failed or was invalid has told the destination nothing.
_ANSWERS = (DeliveryState.QUEUED, DeliveryState.SENDING, DeliveryState.SENT)


@dataclass(frozen=True, kw_only=True)
class OutboxPlan:
    """Destinations and kinds of objects that each result is sent as.

    Attributes
    ----------
    destinations
        As configured: ``AETITLE@host:port``, with ``+tls`` or without.
    kinds
        ``sc`` (Secondary Capture), ``sr`` (Structured Report).
    """

    destinations: tuple[str, ...]
    kinds: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class DeliveryRow:
    """One object of one result for one destination.

    Attributes
    ----------
    sha256
        Of the image that the result is about.
    kind
        ``sc`` (Secondary Capture) or ``sr`` (Structured Report).
    attempts
        Tries since it was queued.
    refusals
        Times the destination refused it since it was queued.
    next_attempt_at
        Earliest time; None for one that is not queued.
    error
        Why the last attempt failed.
    sop_instance_uid
        None until the object was built.
    commitment
        State of the storage commitment; None where it is not asked for. The fields after it are
        its last transaction UID, when it came into its state, the requests since it was sent,
        the destination's reports that it does not have the object, and why it is not committed.
    """

    id: int
    result_id: int
    sha256: str
    destination: str
    kind: str
    state: DeliveryState
    attempts: int
    refusals: int
    next_attempt_at: datetime | None
    error: str | None
    sop_instance_uid: str | None
    created_at: datetime
    sent_at: datetime | None
    commitment: CommitmentState | None = None
    commitment_uid: str | None = None
    commitment_at: datetime | None = None
    commitment_tries: int | None = None
    commitment_failures: int | None = None
    commitment_error: str | None = None


@dataclass(frozen=True, kw_only=True)
class DestinationStatus:
    """Numbers of deliveries to one destination.

    Attributes
    ----------
    queued, sent, failed, invalid
        Deliveries in that state; those being sent are among the queued.
    commitments
        Sent deliveries by the state of their storage commitment, where it is asked for.
    oldest_at
        When the oldest of the queued was created; None if there is none.
    error
        Of the queued one that was tried last and failed; None if there is none.
    """

    destination: str
    queued: int
    failed: int
    invalid: int
    oldest_at: datetime | None
    error: str | None
    sent: int = 0
    commitments: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class SentReport:
    """A report that a destination has received, with its image and its model."""

    sha256: str
    model_sha256: str
    sop_instance_uid: str


def queue_deliveries(
    connection: Connection, result_id: int, plan: OutboxPlan, now: datetime
) -> int:
    """Queue what is to be sent of a result, within the caller's transaction, each object once.

    Nothing is sent of an image that is in no study, and nothing twice for one SOP instance (PS3.4
    annex B) that came in another encoding, such as a lossless copy: where an earlier result of
    the same model is queued for, or was sent to, the same destination, this one is not.

    Returns
    -------
    int
        Number of new deliveries.
    """
    image = Image.__table__.c
    instance = connection.execute(
        select(image.study_uid, image.sop_uid, Result.model_id)
        .join_from(Result, Image)
        .where(Result.id == result_id, image.study_uid.is_not(None), image.sop_uid.is_not(None))
    ).first()
    if instance is None:
        return 0
    answered = {
        (destination, kind)
        for destination, kind in connection.execute(
            select(Delivery.destination, Delivery.kind)
            .join_from(Delivery, Result)
            .join(Image)
            .where(
                image.study_uid == instance.study_uid,
                image.sop_uid == instance.sop_uid,
                Result.model_id == instance.model_id,
                Result.id != result_id,
                Delivery.state.in_(_ANSWERS),
            )
        )
    }
    return sum(
        insert_if_new(
            connection,
            Delivery,
            ("result_id", "destination", "kind"),
            {
                "result_id": result_id,
                "destination": destination,
                "kind": kind,
                "state": DeliveryState.QUEUED,
                "attempts": 0,
                "refusals": 0,
                "next_attempt_at": now,
                "created_at": now,
            },
        )
        for destination in plan.destinations
        for kind in plan.kinds
        if (destination, kind) not in answered
    )


class Deliveries:
    """The writing side of the outbox. Each method is one transaction; the time is passed in.

    Every method may raise `DatabaseError`, and those that change a state `IllegalTransition`,
    where the delivery is in another state than the one to be changed.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def queue(self, result_id: int, plan: OutboxPlan, now: datetime) -> int:
        """Queue what is to be sent of a result and has no row yet; return how many are new."""
        with writing(self._engine) as connection:
            return queue_deliveries(connection, result_id, plan, now)

    def recover(self, now: datetime) -> int:
        """Queue again what a process was sending when it died; return how many.

        Whether the destination has it is not known. It is sent with the same SOP Instance UID,
        by which a receiver recognises the object.
        """
        check_transition(DeliveryState.SENDING, DeliveryState.QUEUED)
        with writing(self._engine) as connection:
            return connection.execute(
                update(Delivery)
                .where(Delivery.state == DeliveryState.SENDING)
                .values(state=DeliveryState.QUEUED, next_attempt_at=now)
            ).rowcount

    def start(self, ids: Collection[int]) -> None:
        """Note that these are being sent now; all of them, or none."""
        with writing(self._engine) as connection:
            for delivery_id in ids:
                change_state(
                    connection,
                    Delivery,
                    delivery_id,
                    current=DeliveryState.QUEUED,
                    target=DeliveryState.SENDING,
                    next_attempt_at=None,
                )
            connection.execute(
                update(Delivery).where(Delivery.id.in_(ids)).values(attempts=Delivery.attempts + 1)
            )

    def built(self, result_id: int, kind: str, sop_instance_uid: str) -> None:
        """Note which object all destinations of a result receive."""
        with writing(self._engine) as connection:
            connection.execute(
                update(Delivery)
                .where(Delivery.result_id == result_id, Delivery.kind == kind)
                .values(sop_instance_uid=sop_instance_uid)
            )

    def sent(
        self, delivery_id: int, now: datetime, *, sop_class_uid: str = "", commit: bool = False
    ) -> None:
        """Note that the destination has it.

        Parameters
        ----------
        commit
            Whether its storage commitment is to be asked for.
        """
        self._end_sending(
            [delivery_id],
            DeliveryState.SENT,
            error=None,
            sent_at=now,
            sop_class_uid=sop_class_uid or None,
            commitment=CommitmentState.DUE if commit else None,
            commitment_at=now if commit else None,
            commitment_due_at=now if commit else None,
            commitment_tries=0 if commit else None,
            commitment_error=None,
        )

    def invalid(self, delivery_id: int, error: str) -> None:
        """Note that no valid object could be built; nothing is sent."""
        self._end_sending([delivery_id], DeliveryState.INVALID, error=clean(error))

    def requeue(self, ids: Collection[int], *, error: str, next_attempt_at: datetime) -> None:
        """Queue them again: the destination was not reached, or is short of resources."""
        self._end_sending(
            ids, DeliveryState.QUEUED, error=clean(error), next_attempt_at=next_attempt_at
        )

    def refused(
        self, delivery_id: int, *, error: str, next_attempt_at: datetime, most: int
    ) -> DeliveryState:
        """Note that the destination refused it; with `most` refusals it has failed.

        Returns
        -------
        DeliveryState
            ``queued`` or ``failed``.
        """
        with writing(self._engine) as connection:
            known = select(Delivery.refusals).where(Delivery.id == delivery_id)
            refusals = 1 + connection.execute(known).scalar_one()
            has_failed = refusals >= most
            target = DeliveryState.FAILED if has_failed else DeliveryState.QUEUED
            change_state(
                connection,
                Delivery,
                delivery_id,
                current=DeliveryState.SENDING,
                target=target,
                refusals=refusals,
                error=clean(error),
                next_attempt_at=None if has_failed else next_attempt_at,
            )
            return target

    def request(self, ids: Collection[int], now: datetime) -> int:
        """Make deliveries due now, whether ended or waiting; return how many are.

        One that is being sent is left alone.

        Raises
        ------
        NotFoundError
            If there is no such delivery.
        """
        with writing(self._engine) as connection:
            return sum(_request(connection, delivery_id, now) for delivery_id in ids)

    def _end_sending(self, ids: Collection[int], target: DeliveryState, **values: Value) -> None:
        with writing(self._engine) as connection:
            for delivery_id in ids:
                change_state(
                    connection,
                    Delivery,
                    delivery_id,
                    current=DeliveryState.SENDING,
                    target=target,
                    **values,
                )


def _request(connection: Connection, delivery_id: int, now: datetime) -> bool:
    state = state_of(connection, Delivery, delivery_id)
    if state is DeliveryState.SENDING:
        return False
    if state is DeliveryState.QUEUED:
        connection.execute(
            update(Delivery).where(Delivery.id == delivery_id).values(next_attempt_at=now)
        )
        return True
    return change_state(
        connection,
        Delivery,
        delivery_id,
        current=state,
        target=DeliveryState.QUEUED,
        attempts=0,
        refusals=0,
        error=None,
        next_attempt_at=now,
        commitment=None,
        commitment_failures=None,
        commitment_error=None,
    )


def due_deliveries(
    engine: Engine, destination: str, *, now: datetime, longest: timedelta, limit: int
) -> list[DeliveryRow]:
    """Return what is to be sent to a destination now, the longest waiting first.

    Parameters
    ----------
    longest
        The longest delay that is ever set. A later time comes from a clock that was set back
        since, and is due.
    """
    statement = (
        _select_deliveries()
        .where(
            Delivery.destination == destination,
            Delivery.state == DeliveryState.QUEUED,
            (Delivery.next_attempt_at <= now) | (Delivery.next_attempt_at > now + longest),
        )
        .order_by(Delivery.next_attempt_at, Delivery.id)
        .limit(limit)
    )
    return read_rows(engine, DeliveryRow, statement)


def deliveries_of(engine: Engine, result_id: int) -> list[DeliveryRow]:
    """Return the deliveries of one result."""
    statement = _select_deliveries().where(Delivery.result_id == result_id).order_by(Delivery.id)
    return read_rows(engine, DeliveryRow, statement)


def list_deliveries(
    engine: Engine,
    *,
    states: Collection[DeliveryState] | None = None,
    destination: str | None = None,
    limit: int | None = None,
) -> list[DeliveryRow]:
    """Return deliveries in these states, or in any, the oldest first."""
    statement = _select_deliveries().order_by(Delivery.created_at, Delivery.id).limit(limit)
    if states is not None:
        statement = statement.where(Delivery.state.in_(states))
    if destination is not None:
        statement = statement.where(Delivery.destination == destination)
    return read_rows(engine, DeliveryRow, statement)


# A sent one whose storage commitment is asked for may have to be sent again.
_NEEDS_FILE = or_(Delivery.state.in_(UNSENT), Delivery.commitment.in_(UNCOMMITTED))


def unsent_uids(engine: Engine) -> set[str]:
    """Return the SOP Instance UIDs of built objects that wait to be sent, or to be committed."""
    statement = select(Delivery.sop_instance_uid).where(
        _NEEDS_FILE, Delivery.sop_instance_uid.is_not(None)
    )
    with reading(engine) as connection:
        return {uid for uid in connection.scalars(statement) if uid is not None}


def is_unsent(engine: Engine, sop_instance_uid: str) -> bool:
    """Return whether a destination still waits for this object, or has to commit it."""
    statement = select(Delivery.id).where(
        Delivery.sop_instance_uid == sop_instance_uid, _NEEDS_FILE
    )
    with reading(engine) as connection:
        return connection.execute(statement.limit(1)).first() is not None


def object_uid(engine: Engine, result_id: int, kind: str) -> str | None:
    """Return the SOP Instance UID of a result's object; None if it was never built."""
    statement = select(Delivery.sop_instance_uid).where(
        Delivery.result_id == result_id,
        Delivery.kind == kind,
        Delivery.sop_instance_uid.is_not(None),
    )
    with reading(engine) as connection:
        return connection.scalar(statement.limit(1))


def earlier_report(engine: Engine, result_id: int) -> SentReport | None:
    """Return the last report sent on the same SOP instance by another model before this result.

    None for an image that is in no study, and where there is no such report.
    """
    image = Image.__table__.c
    mine = (
        select(image.study_uid, image.sop_uid, Result.model_id, Result.finished_at)
        .join_from(Result, Image)
        .where(Result.id == result_id)
    )
    with reading(engine) as connection:
        own = connection.execute(mine).first()
    if own is None or own.study_uid is None or own.sop_uid is None:
        return None
    statement = (
        select(Image.sha256, Model.sha256.label("model_sha256"), Delivery.sop_instance_uid)
        .join_from(Delivery, Result)
        .join(Image)
        .join(Model)
        .where(
            Delivery.kind == "sr",
            Delivery.state == DeliveryState.SENT,
            Delivery.sop_instance_uid.is_not(None),
            image.study_uid == own.study_uid,
            image.sop_uid == own.sop_uid,
            Result.model_id != own.model_id,
            Result.finished_at <= own.finished_at,
        )
        .order_by(Result.finished_at.desc(), Delivery.id.desc())
        .limit(1)
    )
    return next(iter(read_rows(engine, SentReport, statement)), None)


def destination_statuses(engine: Engine) -> list[DestinationStatus]:
    """Return the status of each destination that deliveries are or were queued for."""
    counted = select(
        Delivery.destination, Delivery.state, func.count(), func.min(Delivery.created_at)
    ).group_by(Delivery.destination, Delivery.state)
    committing = (
        select(Delivery.destination, Delivery.commitment, func.count())
        .where(Delivery.commitment.is_not(None))
        .group_by(Delivery.destination, Delivery.commitment)
    )
    failures = (
        select(Delivery.destination, Delivery.error)
        .where(Delivery.state == DeliveryState.QUEUED, Delivery.error.is_not(None))
        .order_by(Delivery.next_attempt_at, Delivery.id)
    )
    with reading(engine) as connection:
        rows = connection.execute(counted).all()
        commitments = connection.execute(committing).all()
        errors = {row.destination: row.error for row in connection.execute(failures)}
    return [
        DestinationStatus(
            destination=destination,
            queued=sum(row[2] for row in own if row[1] in UNSENT),
            failed=sum(row[2] for row in own if row[1] is DeliveryState.FAILED),
            invalid=sum(row[2] for row in own if row[1] is DeliveryState.INVALID),
            oldest_at=min((row[3] for row in own if row[1] in UNSENT), default=None),
            error=errors.get(destination),
            sent=sum(row[2] for row in own if row[1] is DeliveryState.SENT),
            commitments={
                str(state): count for name, state, count in commitments if name == destination
            },
        )
        for destination in sorted({row[0] for row in rows})
        for own in [[row for row in rows if row[0] == destination]]
    ]


def _select_deliveries() -> "AnySelect":
    return (
        select(*columns_for(DeliveryRow, Delivery, {"sha256": Image.sha256}))
        .select_from(Delivery)
        .join(Result)
        .join(Image)
    )
