"""What monitoring asks of the database: counts and ages, nothing of a patient."""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import Engine, func, select

from lungwatch.db.schema import Delivery, Result
from lungwatch.db.states import State

_ENDS = (State.DONE, State.REJECTED, State.FAILED)


@dataclass(frozen=True, kw_only=True)
class Figures:
    """The database at one time.

    Attributes
    ----------
    ends
        Results by end and reason (empty for none).
    retried
        Results that took more than one attempt.
    last_done
        When the last result came about.
    deliveries
        The outbox by state.
    oldest_delivery
        When the oldest one that waits to be sent was queued.
    first, last
        Probabilities of the model's first and last results, up to the asked number.
    """

    ends: dict[tuple[str, str], int]
    retried: int
    last_done: datetime | None
    deliveries: dict[str, int]
    oldest_delivery: datetime | None
    first: list[float]
    last: list[float]


def figures(engine: Engine, model_id: int, window: int) -> Figures:
    """Read the figures.

    Parameters
    ----------
    model_id
        Whose probabilities.
    window
        Most probabilities at either end.
    """
    done = select(Result.probability).where(
        Result.state == State.DONE, Result.model_id == model_id, Result.probability.is_not(None)
    )
    with engine.connect() as connection:
        ended = connection.execute(
            select(Result.state, Result.reason, func.count())
            .where(Result.state.in_(_ENDS))
            .group_by(Result.state, Result.reason)
        )
        queue = connection.execute(select(Delivery.state, func.count()).group_by(Delivery.state))
        waiting = select(func.min(Delivery.created_at)).where(Delivery.next_attempt_at.is_not(None))
        return Figures(
            ends={(state.value, reason or ""): count for state, reason, count in ended},
            retried=connection.scalar(
                select(func.count()).select_from(Result).where(Result.attempts > 1)
            )
            or 0,
            last_done=connection.scalar(
                select(func.max(Result.finished_at)).where(Result.state == State.DONE)
            ),
            deliveries={state.value: count for state, count in queue},
            oldest_delivery=connection.scalar(waiting),
            first=_probabilities(connection.scalars(done.order_by(Result.id).limit(window))),
            last=_probabilities(connection.scalars(done.order_by(Result.id.desc()).limit(window))),
        )


def _probabilities(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]
