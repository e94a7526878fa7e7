"""Database figures for monitoring: counts and ages, no patient data."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import Engine, case, func, select

from lungwatch.db.delivery_states import UNSENT, DeliveryState
from lungwatch.db.engine import reading, writing
from lungwatch.db.schema import Delivery, Image, Result
from lungwatch.db.states import State

_ENDS = (State.DONE, State.REJECTED, State.FAILED)


@dataclass(frozen=True, kw_only=True)
class Signs:
    """The few figures that health is told from, cheap to read.

    Attributes
    ----------
    queued, oldest_queued
        Results to be tried again, and when the first of them was asked for; not those that
        another model is to score beside a result that is done.
    outbox_waiting, oldest_delivery
        Objects to be sent, and when the oldest of them was queued.
    outbox_ended
        Objects that were refused for good or were invalid.
    last_done
        When the last result came about.
    """

    queued: int
    oldest_queued: datetime | None
    outbox_waiting: int
    oldest_delivery: datetime | None
    outbox_ended: int
    last_done: datetime | None


@dataclass(frozen=True, kw_only=True)
class Figures:
    """The database at one time.

    Attributes
    ----------
    ends
        Results by end and reason (empty for none).
    retried
        Results that took more than one attempt.
    attempts
        Of all results, since each was last dropped or asked for.
    deliveries
        The outbox by destination and state.
    delivery_attempts
        Of all that is in the outbox, by destination.
    scored
        How many probabilities of the model there are.
    first, last
        Probabilities of the model's first and last results, up to the asked number.
    """

    ends: dict[tuple[str, str], int]
    retried: int
    attempts: int
    deliveries: dict[tuple[str, str], int]
    delivery_attempts: dict[str, int]
    scored: int
    first: list[float]
    last: list[float]


def signs(engine: Engine, *, writable: bool = False) -> Signs:
    """Read the signs.

    Parameters
    ----------
    writable
        Whether to try, first, that a transaction that writes could begin; nothing is written.

    Raises
    ------
    DatabaseError
        If the database cannot be opened, read or, if asked for, written.
    """
    if writable:
        with writing(engine) as connection:
            connection.execute(select(1))
    ended = (DeliveryState.FAILED, DeliveryState.INVALID)
    results = (
        select(func.count(), func.min(Result.claimed_at))
        .join_from(Result, Image)
        # Filed already, and asked of another model: nobody waits for a first answer.
        .where(Result.state == State.QUEUED, Image.path.is_(None) | ~Image.path.startswith("done/"))
    )
    deliveries = select(
        func.sum(case((Delivery.state.in_(UNSENT), 1), else_=0)),
        func.min(case((Delivery.state.in_(UNSENT), Delivery.created_at))),
        func.sum(case((Delivery.state.in_(ended), 1), else_=0)),
    ).where(Delivery.state.in_((*UNSENT, *ended)))
    # The newest by the index over finished_at, which rejections share: a maximum over the done
    # alone would read them all.
    last = (
        select(Result.finished_at)
        .where(Result.state == State.DONE, Result.finished_at.is_not(None))
        .order_by(Result.finished_at.desc())
        .limit(1)
    )
    with reading(engine) as connection:
        queued, oldest_queued = connection.execute(results).one()
        unsent, oldest_delivery, given_up = connection.execute(deliveries).one()
        return Signs(
            queued=queued,
            oldest_queued=oldest_queued,
            outbox_waiting=unsent or 0,
            oldest_delivery=oldest_delivery,
            outbox_ended=given_up or 0,
            last_done=connection.scalar(last),
        )


def figures(engine: Engine, model_id: int, window: int) -> Figures:
    """Read the figures.

    Parameters
    ----------
    model_id
        Whose probabilities.
    window
        Most probabilities at either end.

    Raises
    ------
    DatabaseError
        If the database cannot be read.
    """
    of_model = (
        Result.state == State.DONE,
        Result.model_id == model_id,
        Result.probability.is_not(None),
    )
    done = select(Result.probability).where(*of_model)
    results = select(
        Result.state,
        Result.reason,
        func.count(),
        func.sum(Result.attempts),
        func.sum(case((Result.attempts > 1, 1), else_=0)),
    ).group_by(Result.state, Result.reason)
    outbox = select(
        Delivery.destination, Delivery.state, func.count(), func.sum(Delivery.attempts)
    ).group_by(Delivery.destination, Delivery.state)
    with reading(engine) as connection:
        rows = connection.execute(results).all()
        queue = connection.execute(outbox).all()
        attempts: Counter[str] = Counter()
        for destination, _, _, tries in queue:
            attempts[destination] += int(tries)
        return Figures(
            ends={
                (state.value, reason or ""): count
                for state, reason, count, _, _ in rows
                if state in _ENDS
            },
            retried=sum(int(row[4]) for row in rows),
            attempts=sum(int(row[3]) for row in rows),
            deliveries={(name, state.value): count for name, state, count, _ in queue},
            delivery_attempts=dict(attempts),
            scored=connection.scalar(select(func.count()).select_from(Result).where(*of_model))
            or 0,
            first=_probabilities(connection.scalars(done.order_by(Result.id).limit(window))),
            last=_probabilities(connection.scalars(done.order_by(Result.id.desc()).limit(window))),
        )


def _probabilities(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]
