"""The metrics, in Prometheus' form: read from the database and the stages when asked for."""

import math
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from lungwatch import __version__
from lungwatch.daemon.clock import Clock
from lungwatch.daemon.vitals import Vitals
from lungwatch.db.monitoring import Figures, figures

WINDOW = 500
"""Results that the drift is told from, and as many to compare them with."""
_LEAST = 50
_BINS = 10
_BUCKETS_S = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)


class Metrics:
    """One daemon's metrics. For all threads.

    Parameters
    ----------
    engine
        Of the database.
    model_id, model
        The running model's row and its name with version.
    home
        The folder whose disk counts.
    vitals
        Of the stages.
    in_flight, waiting
        Return the files between claim and end, and those in the drop folder.
    clock
        The machine's.
    """

    def __init__(
        self,
        *,
        engine: Engine,
        model_id: int,
        model: str,
        home: Path,
        vitals: Vitals,
        in_flight: Callable[[], int],
        waiting: Callable[[], int],
        clock: Clock,
    ) -> None:
        self._engine = engine
        self._model_id = model_id
        self._model = model
        self._home = home
        self._vitals = vitals
        self._in_flight = in_flight
        self._waiting = waiting
        self._clock = clock
        self._registry = CollectorRegistry(auto_describe=False)
        self._stage_seconds = Histogram(
            "lungwatch_stage_seconds",
            "Duration of one unit of a stage's work.",
            ["stage"],
            buckets=_BUCKETS_S,
            registry=self._registry,
        )
        self._registry.register(self)

    def observe(self, stage: str, seconds: float) -> None:
        """Count one unit of a stage's work."""
        self._stage_seconds.labels(stage).observe(seconds)

    def text(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """Yield what is read when asked for; called by the registry."""
        build = GaugeMetricFamily(
            "lungwatch_build_info", "Version and model.", labels=["version", "model"]
        )
        build.add_metric([__version__, self._model], 1)
        yield build
        yield GaugeMetricFamily("lungwatch_in_flight_files", "Claimed files.", self._in_flight())
        yield GaugeMetricFamily("lungwatch_waiting_files", "Not yet claimed.", self._waiting())
        free = shutil.disk_usage(self._home).free
        yield GaugeMetricFamily("lungwatch_disk_free_bytes", "Free in the home.", free)
        yield from self._stages()
        try:
            read = figures(self._engine, self._model_id, WINDOW)
        except SQLAlchemyError:
            yield GaugeMetricFamily("lungwatch_database_up", "Whether it answers.", 0)
            return
        yield GaugeMetricFamily("lungwatch_database_up", "Whether it answers.", 1)
        yield from self._recorded(read)

    def _stages(self) -> Iterator[Metric]:
        queue = GaugeMetricFamily("lungwatch_stage_waiting", "Queue depth.", labels=["stage"])
        busy = GaugeMetricFamily("lungwatch_stage_busy", "Units in work.", labels=["stage"])
        oldest = GaugeMetricFamily(
            "lungwatch_stage_oldest_seconds", "Since the oldest unit's progress.", labels=["stage"]
        )
        for name, stage in self._vitals.snapshot().items():
            queue.add_metric([name], stage.waiting)
            busy.add_metric([name], stage.busy)
            oldest.add_metric([name], stage.oldest_s)
        yield from (queue, busy, oldest)

    def _recorded(self, read: Figures) -> Iterator[Metric]:
        files = CounterMetricFamily(
            "lungwatch_files", "Contents by end, as recorded.", labels=["end", "reason"]
        )
        for (end, reason), count in sorted(read.ends.items()):
            files.add_metric([end, reason], count)
        yield files
        yield GaugeMetricFamily("lungwatch_retried_files", "More than one attempt.", read.retried)
        outbox = GaugeMetricFamily("lungwatch_deliveries", "The outbox.", labels=["state"])
        for state, count in sorted(read.deliveries.items()):
            outbox.add_metric([state], count)
        yield outbox
        now = self._clock.now()
        age = (now - read.oldest_delivery).total_seconds() if read.oldest_delivery else 0.0
        yield GaugeMetricFamily("lungwatch_outbox_oldest_seconds", "Age of the oldest.", age)
        last = read.last_done.timestamp() if read.last_done else 0.0
        yield GaugeMetricFamily("lungwatch_last_done_timestamp_seconds", "Last result.", last)
        if read.last:
            mean = sum(read.last) / len(read.last)
            yield GaugeMetricFamily("lungwatch_probability_mean", "Of the last results.", mean)
        if min(len(read.first), len(read.last)) >= _LEAST:
            drift = stability_index(read.first, read.last)
            yield GaugeMetricFamily("lungwatch_probability_psi", "Last against first.", drift)


def stability_index(expected: Sequence[float], actual: Sequence[float]) -> float:
    """Return the population stability index of probabilities over tenths.

    The sum of (a - e) ln(a / e) over the bins' shares, each count raised by one half so that
    no share is zero. 0 for equal shares; above 0.25 is commonly called a shift.
    """
    total = 0.0
    shares = [_shares(values) for values in (expected, actual)]
    for e, a in zip(*shares, strict=True):
        total += (a - e) * math.log(a / e)
    return total


def _shares(values: Sequence[float]) -> list[float]:
    counts = Counter(min(int(value * _BINS), _BINS - 1) for value in values)
    return [(counts[i] + 0.5) / (len(values) + 0.5 * _BINS) for i in range(_BINS)]
