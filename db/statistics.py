"""Counts over the results."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import tzinfo

from sqlalchemy import Engine

from lungwatch.db.engine import reading
from lungwatch.db.rows import ResultFilter
from lungwatch.db.selects import select_for_statistics

SCORE_BINS = 10


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """How many results there are of each kind.

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


def stats(
    engine: Engine, chosen: ResultFilter | None = None, zone: tzinfo | None = None
) -> Statistics:
    """Count the results that a filter chooses.

    Parameters
    ----------
    zone
        Whose midnight divides the days; None for the machine's own.

    Raises
    ------
    DatabaseError
        If the database cannot be read.
    """
    days, labels, statuses, flags, reasons, models = (Counter[str]() for _ in range(6))
    scores = [0] * SCORE_BINS
    arrivals = 0
    with reading(engine) as connection:
        # Counted here, since no two databases agree on local days and JSON.
        for row in connection.execute(select_for_statistics(chosen or ResultFilter())):
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
