"""Queries of the outbox; each call sees one snapshot and blocks no writer."""

from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

from sqlalchemy import Engine, Select, func, select

from lungwatch.db.delivery_states import UNSENT, DeliveryState
from lungwatch.db.engine import reading
from lungwatch.db.schema import Delivery, Image, Model, Result

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
class QueueState:
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


def due(
    engine: Engine, destination: str, *, now: datetime, longest: timedelta, limit: int
) -> list[DeliveryRow]:
    """Return what is to be sent to a destination now, the longest waiting first.

    Parameters
    ----------
    longest
        The longest that anything is made to wait: what is to wait for longer was told so by
        a clock that has been set back since, and is due.
    """
    return _rows(
        engine,
        _select()
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
    return _rows(engine, _select().where(Delivery.result_id == result_id).order_by(Delivery.id))


def list_deliveries(
    engine: Engine,
    *,
    states: Collection[DeliveryState] | None = None,
    destination: str | None = None,
    limit: int | None = None,
) -> list[DeliveryRow]:
    """Return deliveries in these states, or in any, the oldest first."""
    statement = _select().order_by(Delivery.created_at, Delivery.id).limit(limit)
    if states is not None:
        statement = statement.where(Delivery.state.in_(states))
    if destination is not None:
        statement = statement.where(Delivery.destination == destination)
    return _rows(engine, statement)


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


def queue_states(engine: Engine) -> list[QueueState]:
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
        QueueState(
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


def _select() -> "AnySelect":
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


def _rows(engine: Engine, statement: "AnySelect") -> list[DeliveryRow]:
    with reading(engine) as connection:
        return [DeliveryRow(**row._mapping) for row in connection.execute(statement)]  # noqa: SLF001 - SQLAlchemy's public name
