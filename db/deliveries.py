"""Deliveries: the outbox of objects for PACS destinations, its writes and its queries."""

from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

from sqlalchemy import Connection, Engine, Select, func, select, update

from lungwatch.db.engine import Value, clean, compare_and_set, insert_if_new, reading, writing
from lungwatch.db.models import Delivery, Image, Model, Result
from lungwatch.db.states import (
    UNSENT,
    DeliveryState,
    IllegalDeliveryTransition,
    check_delivery_transition,
)
from lungwatch.errors import NotFoundError

# What was refused or invalid is no answer.
_ANSWERS = (DeliveryState.QUEUED, DeliveryState.SENDING, DeliveryState.SENT)


@dataclass(frozen=True, kw_only=True)
class OutboxPlan:
    """What is owed of each result.

    Attributes
    ----------
    destinations
        As configured: ``AETITLE@host:port``, with ``+tls`` or without.
    kinds
        ``sc``, ``sr``.
    """

    destinations: tuple[str, ...]
    kinds: tuple[str, ...]


def queue_deliveries(
    connection: Connection, result_id: int, plan: OutboxPlan, now: datetime
) -> int:
    """Queue what a result owes, within the caller's transaction, and what is there only once.

    Nothing is owed of an image that is in no study: there is nothing to lay the result beside.
    Nor is a second answer owed of one SOP instance (PS3.4 annex B), where it came in another
    encoding, as a lossless copy: whatever an earlier result of the same model answers, or has
    answered, to the same destination, is not answered again.

    Returns
    -------
    int
        How many deliveries are new.
    """
    instance = connection.execute(
        select(Image.study_uid, Image.sop_uid, Result.model_id)
        .join(Result)
        .where(Result.id == result_id, Image.study_uid.is_not(None), Image.sop_uid.is_not(None))
    ).first()
    if instance is None:
        return 0
    answered = {
        (destination, kind)
        for destination, kind in connection.execute(
            select(Delivery.destination, Delivery.kind)
            .join(Result, Result.id == Delivery.result_id)
            .join(Image, Image.id == Result.image_id)
            .where(
                Image.study_uid == instance.study_uid,
                Image.sop_uid == instance.sop_uid,
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
    """The writing side of the outbox. Each method is one transaction; time is passed in.

    Every method may raise `DatabaseError`, and those that change a state
    `IllegalDeliveryTransition`, where the delivery is not in the state to be changed.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def queue(self, result_id: int, plan: OutboxPlan, now: datetime) -> int:
        """Queue what a result owes and has no row for yet; return how many are new."""
        with writing(self._engine) as connection:
            return queue_deliveries(connection, result_id, plan, now)

    def recover(self, now: datetime) -> int:
        """Queue again what a dead process was sending.

        Whether the destination has it is not known. It is sent with the same SOP Instance
        UID, which a receiver that has it takes for the same object.
        """
        check_delivery_transition(DeliveryState.SENDING, DeliveryState.QUEUED)
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
                _change(
                    connection,
                    delivery_id,
                    current=DeliveryState.QUEUED,
                    target=DeliveryState.SENDING,
                    next_attempt_at=None,
                )
            connection.execute(
                update(Delivery).where(Delivery.id.in_(ids)).values(attempts=Delivery.attempts + 1)
            )

    def built(self, result_id: int, kind: str, sop_instance_uid: str) -> None:
        """Note which object it is that all destinations get."""
        with writing(self._engine) as connection:
            connection.execute(
                update(Delivery)
                .where(Delivery.result_id == result_id, Delivery.kind == kind)
                .values(sop_instance_uid=sop_instance_uid)
            )

    def sent(self, delivery_id: int, now: datetime) -> None:
        """Note that the destination has it."""
        self._end(delivery_id, DeliveryState.SENT, error=None, sent_at=now)

    def put_back(self, ids: Collection[int], *, error: str, next_attempt_at: datetime) -> None:
        """Queue them again: the destination was not reached, or has no room at present."""
        with writing(self._engine) as connection:
            for delivery_id in ids:
                _change(
                    connection,
                    delivery_id,
                    current=DeliveryState.SENDING,
                    target=DeliveryState.QUEUED,
                    error=clean(error),
                    next_attempt_at=next_attempt_at,
                )

    def refused(
        self, delivery_id: int, *, error: str, next_attempt_at: datetime, most: int
    ) -> DeliveryState:
        """Note that the destination would not have it; with `most` refusals it has failed.

        Returns
        -------
        DeliveryState
            ``queued`` or ``failed``.
        """
        with writing(self._engine) as connection:
            refusals = (
                1
                + connection.execute(
                    select(Delivery.refusals).where(Delivery.id == delivery_id)
                ).scalar_one()
            )
            ends = refusals >= most
            target = DeliveryState.FAILED if ends else DeliveryState.QUEUED
            _change(
                connection,
                delivery_id,
                current=DeliveryState.SENDING,
                target=target,
                refusals=refusals,
                error=clean(error),
                next_attempt_at=None if ends else next_attempt_at,
            )
            return target

    def invalid(self, delivery_id: int, error: str) -> None:
        """Note that no valid object could be built; it is not sent."""
        self._end(delivery_id, DeliveryState.INVALID, error=clean(error))

    def request(self, ids: Collection[int], now: datetime) -> int:
        """Make deliveries due now: those that have an end, and those that wait.

        One that is being sent is left alone.

        Returns
        -------
        int
            How many are due now.
        """
        with writing(self._engine) as connection:
            return sum(self._request(connection, delivery_id, now) for delivery_id in ids)

    def _request(self, connection: Connection, delivery_id: int, now: datetime) -> bool:
        state = connection.scalar(select(Delivery.state).where(Delivery.id == delivery_id))
        if state is None:
            raise NotFoundError(f"there is no delivery {delivery_id}")
        if state is DeliveryState.SENDING:
            return False
        if state is DeliveryState.QUEUED:
            connection.execute(
                update(Delivery).where(Delivery.id == delivery_id).values(next_attempt_at=now)
            )
            return True
        _change(
            connection,
            delivery_id,
            current=state,
            target=DeliveryState.QUEUED,
            attempts=0,
            refusals=0,
            error=None,
            next_attempt_at=now,
        )
        return True

    def _end(self, delivery_id: int, target: DeliveryState, **values: Value) -> None:
        with writing(self._engine) as connection:
            _change(connection, delivery_id, current=DeliveryState.SENDING, target=target, **values)


def _change(
    connection: Connection,
    delivery_id: int,
    *,
    current: DeliveryState,
    target: DeliveryState,
    **values: Value,
) -> None:
    check_delivery_transition(current, target)
    found = compare_and_set(
        connection, Delivery, delivery_id, current=current, target=target, **values
    )
    if found != current:
        raise IllegalDeliveryTransition(
            f"delivery {delivery_id} is {found}, not {current}: it cannot be {target}"
        )


if TYPE_CHECKING:
    AnySelect = Select[*tuple[Any, ...]]


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
        Times it was tried since it was queued.
    refusals
        Times the destination was reached and would not have it.
    next_attempt_at
        Not before; None for one that is not queued.
    error
        Why the last attempt did not succeed.
    sop_instance_uid
        None until the object was built.
    created_at, sent_at
        UTC.
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


@dataclass(frozen=True, kw_only=True)
class DestinationStatus:
    """How things stand with one destination.

    Attributes
    ----------
    queued, failed, invalid
        Deliveries; those being sent are among the queued.
    oldest_at
        When the oldest of the queued came about; None if there is none.
    error
        Of the queued one that was tried last and did not get through; None if there is none.
    """

    destination: str
    queued: int
    failed: int
    invalid: int
    oldest_at: datetime | None
    error: str | None


def due_deliveries(
    engine: Engine, destination: str, *, now: datetime, longest: timedelta, limit: int
) -> list[DeliveryRow]:
    """Return what is to be sent to a destination now, the longest waiting first.

    Parameters
    ----------
    longest
        The longest that anything is made to wait: what is to wait for longer was told so by
        a clock that has been set back since, and is due.
    """
    return _delivery_rows(
        engine,
        _select_deliveries()
        .where(
            Delivery.destination == destination,
            Delivery.state == DeliveryState.QUEUED,
            (Delivery.next_attempt_at <= now) | (Delivery.next_attempt_at > now + longest),
        )
        .order_by(Delivery.next_attempt_at, Delivery.id)
        .limit(limit),
    )


def deliveries_of(engine: Engine, result_id: int) -> list[DeliveryRow]:
    """Return what is owed of one result."""
    return _delivery_rows(
        engine, _select_deliveries().where(Delivery.result_id == result_id).order_by(Delivery.id)
    )


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
    return _delivery_rows(engine, statement)


def unsent_uids(engine: Engine) -> set[str]:
    """Return the SOP Instance UIDs of what waits to be sent, as far as it was built."""
    statement = select(Delivery.sop_instance_uid).where(
        Delivery.state.in_(UNSENT), Delivery.sop_instance_uid.is_not(None)
    )
    with reading(engine) as connection:
        return {uid for uid in connection.scalars(statement) if uid is not None}


def is_unsent(engine: Engine, sop_instance_uid: str) -> bool:
    """Whether a destination still waits for this object."""
    statement = select(Delivery.id).where(
        Delivery.sop_instance_uid == sop_instance_uid, Delivery.state.in_(UNSENT)
    )
    with reading(engine) as connection:
        return connection.execute(statement.limit(1)).first() is not None


@dataclass(frozen=True, kw_only=True)
class SentReport:
    """A report that a destination has, and what it is about."""

    sha256: str
    model_sha256: str
    sop_instance_uid: str


def earlier_report(engine: Engine, result_id: int) -> SentReport | None:
    """Return the last report that was sent on the same SOP instance by another model before.

    None for an image that is in no study, and where nothing of the kind was sent.
    """
    mine = (
        select(Image.study_uid, Image.sop_uid, Result.model_id, Result.finished_at)
        .join_from(Result, Image)
        .where(Result.id == result_id)
    )
    with reading(engine) as connection:
        own = connection.execute(mine).first()
        if own is None or own.study_uid is None or own.sop_uid is None:
            return None
        row = connection.execute(
            select(Image.sha256, Model.sha256.label("model_sha256"), Delivery.sop_instance_uid)
            .join_from(Delivery, Result)
            .join(Image)
            .join(Model)
            .where(
                Delivery.kind == "sr",
                Delivery.state == DeliveryState.SENT,
                Delivery.sop_instance_uid.is_not(None),
                Image.study_uid == own.study_uid,
                Image.sop_uid == own.sop_uid,
                Result.model_id != own.model_id,
                Result.finished_at <= own.finished_at,
            )
            .order_by(Result.finished_at.desc(), Delivery.id.desc())
            .limit(1)
        ).first()
    return None if row is None else SentReport(**row._mapping)  # noqa: SLF001 - as below


def destination_statuses(engine: Engine) -> list[DestinationStatus]:
    """Return how things stand with each destination that something is or was owed to."""
    counted = select(
        Delivery.destination, Delivery.state, func.count(), func.min(Delivery.created_at)
    ).group_by(Delivery.destination, Delivery.state)
    troubles = (
        select(Delivery.destination, Delivery.error)
        .where(Delivery.state == DeliveryState.QUEUED, Delivery.error.is_not(None))
        .order_by(Delivery.next_attempt_at, Delivery.id)
    )
    with reading(engine) as connection:
        rows = connection.execute(counted).all()
        errors = {row.destination: row.error for row in connection.execute(troubles)}
    return [
        DestinationStatus(
            destination=destination,
            queued=sum(row[2] for row in own if row[1] in UNSENT),
            failed=sum(row[2] for row in own if row[1] is DeliveryState.FAILED),
            invalid=sum(row[2] for row in own if row[1] is DeliveryState.INVALID),
            oldest_at=min((row[3] for row in own if row[1] in UNSENT), default=None),
            error=errors.get(destination),
        )
        for destination in sorted({row[0] for row in rows})
        for own in [[row for row in rows if row[0] == destination]]
    ]


def _select_deliveries() -> "AnySelect":
    return (
        select(
            Delivery.id,
            Delivery.result_id,
            Image.sha256,
            Delivery.destination,
            Delivery.kind,
            Delivery.state,
            Delivery.attempts,
            Delivery.refusals,
            Delivery.next_attempt_at,
            Delivery.error,
            Delivery.sop_instance_uid,
            Delivery.created_at,
            Delivery.sent_at,
        )
        .select_from(Delivery)
        .join(Result)
        .join(Image)
    )


def _delivery_rows(engine: Engine, statement: "AnySelect") -> list[DeliveryRow]:
    with reading(engine) as connection:
        return [DeliveryRow(**row._mapping) for row in connection.execute(statement)]  # noqa: SLF001 - SQLAlchemy's public name
