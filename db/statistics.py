"""Statistics: counts for people, figures for monitoring, rows for drift detection.

Every function raises `DatabaseError` where the database cannot be read.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, tzinfo
from typing import TYPE_CHECKING, Any

from sqlalchemy import Engine, Select, and_, case, func, select

from lungwatch.attributes import ATTRIBUTES
from lungwatch.db.engine import columns_for, read_rows, reading, writing
from lungwatch.db.models import (
    UNSENT,
    CommitmentRequest,
    CommitmentState,
    Delivery,
    DeliveryState,
    Image,
    Model,
    Result,
    State,
)
from lungwatch.db.queries import ResultFilter, arrivals_of_result, select_chosen
from lungwatch.db.removals import last_stop
from lungwatch.errors import GATE_REASONS

if TYPE_CHECKING:
    AnySelect = Select[*tuple[Any, ...]]

SCORE_BINS = 10
_ENDS = (State.DONE, State.REJECTED, State.FAILED)


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """Numbers of results of each kind.

    Attributes
    ----------
    results, arrivals
        Results, and files dropped for them.
    by_day
        Keyed by ISO date of receipt, in order.
    by_label, by_status, by_flag, by_reason, by_model
        The most frequent first; results without a label, reason or flag are not in those.
    scores
        Number of probabilities in each tenth of 0..1, the last including 1.
    """

    results: int
    arrivals: int
    by_day: Mapping[str, int]
    by_label: Mapping[str, int]
    by_status: Mapping[str, int]
    by_flag: Mapping[str, int]
    by_reason: Mapping[str, int]
    by_model: Mapping[str, int]
    scores: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class DestinationCounts:
    """What one destination is owed.

    Attributes
    ----------
    waiting, oldest
        Objects to be sent, and when the oldest of them was queued.
    """

    waiting: int
    oldest: datetime | None


@dataclass(frozen=True, kw_only=True)
class HealthCounts:
    """The few figures that health is judged by, cheap to read.

    Attributes
    ----------
    queued, oldest_queued
        Results queued for another run, and when the first of them was requested; not those
        queued for rescoring by another model, whose image has a result that is done.
    outbox_waiting, oldest_delivery
        Objects to be sent, and when the oldest of them was queued.
    outbox_ended
        Objects that were refused for good or were invalid.
    destinations
        Those that something waits for, by name.
    not_committed
        Sent objects that their destinations have not committed in time.
    last_done
        When the last result was done.
    retention_stopped
        Why the last run of retention was stopped; None if it was not.
    """

    queued: int
    oldest_queued: datetime | None
    outbox_waiting: int
    oldest_delivery: datetime | None
    outbox_ended: int
    last_done: datetime | None
    destinations: Mapping[str, DestinationCounts] = field(default_factory=dict)
    not_committed: int = 0
    retention_stopped: str | None = None


@dataclass(frozen=True, kw_only=True)
class MetricCounts:
    """Figures of the database for the metrics, without patient data.

    Attributes
    ----------
    ends
        Results by end and reason (empty for none).
    retried
        Results that took more than one attempt.
    attempts
        Of all results, since each was last dropped or retried.
    deliveries
        The outbox by destination and state.
    commitments
        Sent objects by destination and state of their storage commitment, where it is asked for.
    commitment_requests
        Other systems' requests for storage commitment, by state.
    delivery_attempts
        Of all that is in the outbox, by destination.
    scored
        Number of the model's probabilities.
    first, last
        Probabilities of the model's first and last results, at most `window` each.
    """

    ends: dict[tuple[str, str], int]
    retried: int
    attempts: int
    deliveries: dict[tuple[str, str], int]
    commitments: dict[tuple[str, str], int] = field(default_factory=dict)
    commitment_requests: dict[str, int] = field(default_factory=dict)
    delivery_attempts: dict[str, int]
    scored: int
    first: list[float]
    last: list[float]


@dataclass(frozen=True, kw_only=True)
class DriftRow:
    """One result as drift detection uses it: scored, or refused by the content gate.

    Attributes
    ----------
    finished_at
        UTC.
    reason
        Why the content gate refused the picture; None for a scored one.
    logit, gate_score, lung_area, lung_share
        As recorded; None where unknown.
    components
        The projected embedding; None where the bundle has no axes, or nothing was scored.
    station, view_position, modality, manufacturer_model, photometric, format, rows, columns, \
bits_stored
        Attributes of the image (`lungwatch.attributes`).
    """

    id: int
    finished_at: datetime
    reason: str | None
    logit: float | None
    gate_score: float | None
    lung_area: float | None
    lung_share: float | None
    components: list[float] | None
    station: str | None
    view_position: str | None
    modality: str | None
    manufacturer_model: str | None
    photometric: str | None
    format: str | None
    rows: int | None
    columns: int | None
    bits_stored: int | None


def stats(
    engine: Engine, chosen: ResultFilter | None = None, zone: tzinfo | None = None
) -> Statistics:
    """Count the results that a filter chooses.

    Parameters
    ----------
    zone
        Whose midnight divides the days; None for the machine's own.
    """
    days, labels, statuses, flags, reasons, models = (Counter[str]() for _ in range(6))
    scores = [0] * SCORE_BINS
    arrivals = 0
    columns: list[Any] = [
        Image.received_at,
        Result.state,
        Result.label,
        Result.reason,
        Result.flags,
        Result.probability,
        Model.name,
        Model.version,
        arrivals_of_result().label("arrivals"),
    ]
    with reading(engine) as connection:
        # Counted here, since no two databases agree on local days and JSON.
        for row in connection.execute(select_chosen(columns, chosen or ResultFilter())):
            days[row.received_at.astimezone(zone).date().isoformat()] += 1
            statuses[str(row.state)] += 1
            models[f"{row.name}-{row.version}"] += 1
            flags.update(row.flags)
            arrivals += row.arrivals
            if row.label is not None:
                labels[row.label] += 1
            if row.reason is not None:
                reasons[row.reason] += 1
            if row.probability is not None:
                scores[min(int(row.probability * SCORE_BINS), SCORE_BINS - 1)] += 1
    return Statistics(
        results=statuses.total(),
        arrivals=arrivals,
        by_day=dict(sorted(days.items())),
        by_label=dict(labels.most_common()),
        by_status=dict(statuses.most_common()),
        by_flag=dict(flags.most_common()),
        by_reason=dict(reasons.most_common()),
        by_model=dict(models.most_common()),
        scores=tuple(scores),
    )


def health_counts(engine: Engine, *, writable: bool = False) -> HealthCounts:
    """Read the figures that health is judged by.

    Parameters
    ----------
    writable
        Whether to check first that a write transaction can begin; nothing is written.

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
        # An image in done/ has a result already; another model is only to score it too.
        .where(Result.state == State.QUEUED, Image.path.is_(None) | ~Image.path.startswith("done/"))
    )
    deliveries = (
        select(
            Delivery.destination,
            func.sum(case((Delivery.state.in_(UNSENT), 1), else_=0)).label("waiting"),
            func.min(case((Delivery.state.in_(UNSENT), Delivery.created_at))).label("oldest"),
            func.sum(case((Delivery.state.in_(ended), 1), else_=0)).label("ended"),
        )
        .where(Delivery.state.in_((*UNSENT, *ended)))
        .group_by(Delivery.destination)
    )
    lost = select(func.count()).where(Delivery.commitment == CommitmentState.FAILED)
    # The newest by the index over finished_at, which rejections share: a maximum over the done
    # alone would read them all.
    last = (
        select(Result.finished_at)
        .where(Result.state == State.DONE, Result.finished_at.is_not(None))
        .order_by(Result.finished_at.desc())
        .limit(1)
    )
    stopped = last_stop(engine)
    with reading(engine) as connection:
        queued, oldest_queued = connection.execute(results).one()
        owed = connection.execute(deliveries).all()
        return HealthCounts(
            queued=queued,
            oldest_queued=oldest_queued,
            outbox_waiting=sum(int(row.waiting) for row in owed),
            oldest_delivery=min((row.oldest for row in owed if row.oldest), default=None),
            outbox_ended=sum(int(row.ended) for row in owed),
            destinations={
                row.destination: DestinationCounts(waiting=int(row.waiting), oldest=row.oldest)
                for row in owed
                if row.waiting
            },
            last_done=connection.scalar(last),
            not_committed=connection.scalar(lost) or 0,
            retention_stopped=stopped,
        )


def metric_counts(engine: Engine, model_id: int, window: int) -> MetricCounts:
    """Read the figures of the metrics.

    Parameters
    ----------
    model_id
        Whose probabilities.
    window
        Most probabilities at either end.
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
        commitments = connection.execute(
            select(Delivery.destination, Delivery.commitment, func.count())
            .where(Delivery.commitment.is_not(None))
            .group_by(Delivery.destination, Delivery.commitment)
        ).all()
        requests = connection.execute(
            select(CommitmentRequest.state, func.count()).group_by(CommitmentRequest.state)
        ).all()
        attempts: Counter[str] = Counter()
        for destination, _, _, tries in queue:
            attempts[destination] += int(tries)
        return MetricCounts(
            ends={
                (state.value, reason or ""): count
                for state, reason, count, _, _ in rows
                if state in _ENDS
            },
            retried=sum(int(row[4]) for row in rows),
            attempts=sum(int(row[3]) for row in rows),
            deliveries={(name, state.value): count for name, state, count, _ in queue},
            commitments={(name, str(state)): count for name, state, count in commitments},
            commitment_requests={str(state): count for state, count in requests},
            delivery_attempts=dict(attempts),
            scored=connection.scalar(select(func.count()).select_from(Result).where(*of_model))
            or 0,
            first=_probabilities(connection.scalars(done.order_by(Result.id).limit(window))),
            last=_probabilities(connection.scalars(done.order_by(Result.id.desc()).limit(window))),
        )


def _probabilities(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def drift_rows(
    engine: Engine, model_sha256: str, *, first: int, last: int, since: datetime | None = None
) -> tuple[list[DriftRow], list[DriftRow]]:
    """Return the first results of a model and its newest ones; they may overlap.

    The index over `finished_at` bounds what is read: nothing before the model was first used, and
    no more than is asked for.

    Parameters
    ----------
    model_sha256
        Of the model's file.
    first, last
        At most so many each.
    since
        Nothing that ended before; None for the model's first use.

    Returns
    -------
    oldest, newest
        The oldest first; the newest first.
    """
    with reading(engine) as connection:
        model = connection.execute(
            select(Model.id, Model.first_used_at).where(Model.sha256 == model_sha256)
        ).first()
    if model is None:
        return [], []
    start = model.first_used_at if since is None else max(since, model.first_used_at)
    chosen = _select_drift(model.id).where(Result.finished_at >= start)
    oldest = chosen.order_by(Result.finished_at, Result.id).limit(first)
    newest = chosen.order_by(Result.finished_at.desc(), Result.id.desc()).limit(last)
    return read_rows(engine, DriftRow, oldest), read_rows(engine, DriftRow, newest)


def _select_drift(model_id: int) -> "AnySelect":
    scored = and_(Result.state.in_((State.RECORDED, State.DONE)), Result.logit.is_not(None))
    refused = and_(Result.state == State.REJECTED, Result.reason.in_(GATE_REASONS))
    # As a value, not a condition: SQLite would take the index over `state`, which is nearly every
    # row, and sort them all.
    is_used = case((scored, 1), (refused, 1), else_=0)
    image = Image.__table__.c
    columns = columns_for(DriftRow, Result, {name: image[name] for name in ATTRIBUTES})
    return (
        select(*columns).join_from(Result, Image).where(Result.model_id == model_id, is_used == 1)
    )
