"""Everything that writes to the outbox: which object is owed to whom, and what came of it."""

from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import Connection, Engine, select, update

from lungwatch.db.changes import Value, clean, compare_and_set, insert_if_new
from lungwatch.db.delivery_states import (
    DeliveryState,
    IllegalDeliveryTransition,
    check_delivery_transition,
)
from lungwatch.db.engine import writing
from lungwatch.db.schema import Delivery, Image, Result
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
