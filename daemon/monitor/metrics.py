"""Metrics in Prometheus' text format; the status port and the textfile that serve them."""

import io
import json
import logging
import math
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, TypeVar

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from lungwatch import __version__
from lungwatch.daemon.logs import dropped_lines, event
from lungwatch.daemon.monitor.drift import Drift
from lungwatch.daemon.monitor.health import Health, HealthCheck, HealthStatus, observe_phase
from lungwatch.daemon.retention import DiskUsage
from lungwatch.daemon.retry import Clock, OutageKind, TimeLimited
from lungwatch.daemon.stage import Progress, StageProgress, Worker
from lungwatch.db.statistics import HealthCounts, MetricCounts
from lungwatch.errors import ConfigError, LungwatchError
from lungwatch.files import replacing

WINDOW = 500
"""Results of each of the two windows of the population stability index."""
_BINS = 10
_BUCKETS_S = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
_STATUS = (HealthStatus.OK, HealthStatus.DEGRADED, HealthStatus.FAILING)
_EVERY_S = 15.0
_ADDRESS = "127.0.0.1"
_MOST = 8  # requests at once
_TIMEOUT_S = 5.0
_MAX_REQUEST_BYTES = 16 * 1024
_STAGE = "status"
_HOSTS = ("127.0.0.1", "localhost")
_DECODER_REPLACED = "decoder_replaced"
_CUT_OFF = "cut_off"
T = TypeVar("T")
Labels = TypeVar("Labels", bound=tuple[str, ...])


class _EventCounter(logging.Handler):
    """Counts of log events by action, of replaced decoders and of cut connections by reason."""

    def __init__(self) -> None:
        super().__init__()
        self._actions: Counter[str] = Counter()
        self._decoders: Counter[str] = Counter()
        self._cut: Counter[str] = Counter()
        self._guard = threading.Lock()

    def emit(self, record: logging.LogRecord) -> None:
        """Count a record if it is an event."""
        fields = getattr(record, "event_fields", None)
        if fields is None:
            return
        with self._guard:
            self._actions[fields["action"]] += 1
            if fields["action"] == _DECODER_REPLACED:
                self._decoders[str(fields["reason"])] += 1
            elif fields["action"] == _CUT_OFF:
                self._cut[str(fields["why"])] += 1

    def snapshot(self) -> tuple[dict[str, int], dict[str, int], dict[str, int]]:
        """Return events by action, replaced decoders and cut connections by reason."""
        with self._guard:
            return dict(self._actions), dict(self._decoders), dict(self._cut)


class Metrics:
    """Metrics of one daemon. For all threads.

    Parameters
    ----------
    read_signs, read_figures, read_drift, read_disks
        Read the database and the file systems.
    gate
        "refuse" or "flag", as configured; "none" for a model without a content gate.
    window
        Results in each of the two windows of the population stability index.
    """

    def __init__(
        self,
        *,
        health: HealthCheck,
        read_signs: TimeLimited[HealthCounts],
        read_figures: TimeLimited[MetricCounts],
        read_drift: TimeLimited[Drift],
        read_disks: TimeLimited[DiskUsage],
        model: str,
        gate: str,
        progress: Progress,
        clock: Clock,
        window: int = WINDOW,
    ) -> None:
        self._health = health
        self._read_signs = read_signs
        self._read_figures = read_figures
        self._read_drift = read_drift
        self._read_disks = read_disks
        self._model = model
        self._gate = gate
        self._progress = progress
        self._clock = clock
        self._window = window
        self._events = _EventCounter()
        logging.getLogger("lungwatch").addHandler(self._events)
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

    def close(self) -> None:
        """Stop counting events."""
        logging.getLogger("lungwatch").removeHandler(self._events)

    def collect(self) -> Iterator[Metric]:
        """Yield everything that is read on demand; called by the registry."""
        build = {(__version__, self._model): 1}
        yield _gauges("build_info", "Version and model.", ("version", "model"), build)
        yield _gauges("content_gate", "1 for its mode.", ("mode",), {(self._gate,): 1})
        yield from _health_metrics(self._health.examine())
        yield from _stage_metrics(self._progress.snapshot())
        actions, decoders, cut = self._events.snapshot()
        yield _counters("events", "Logged, by action.", ("action",), _keyed(actions))
        yield _counters(
            "decoder_replacements", "Decoder processes ended.", ("reason",), _keyed(decoders)
        )
        yield CounterMetricFamily(
            "lungwatch_log_dropped_lines", "Not logged: the reader stalled.", dropped_lines()
        )
        yield _counters("connections_cut", "Connections ended.", ("why",), _keyed(cut))
        if (disks := _answer(self._read_disks)) is not None:
            free = _keyed(disks.free)
            yield _gauges("disk_free_bytes", "Free on each file system.", ("folder",), free)
            if disks.last_backup_at is not None:
                yield _gauge(
                    "last_backup_timestamp_seconds", "Newest backup.", disks.last_backup_at
                )
        counts = _answer(self._read_signs)
        yield _gauge("database_up", "Whether it can be written.", counts is not None)
        if counts is None:
            return
        yield from self._outbox(counts)
        if (figures := _answer(self._read_figures)) is not None:
            yield from self._recorded(figures)
        if (drift := _answer(self._read_drift)) is not None:
            yield from _drift_metrics(drift)

    def _outbox(self, read: HealthCounts) -> Iterator[Metric]:
        now = self._clock.now()
        age_s = (now - read.oldest_delivery).total_seconds() if read.oldest_delivery else 0.0
        yield _gauge("outbox_waiting", "Objects to be sent.", read.outbox_waiting)
        yield _gauge("outbox_oldest_seconds", "Age of the oldest; 0 for none.", age_s)
        last = read.last_done.timestamp() if read.last_done else 0.0
        yield _gauge("last_done_timestamp_seconds", "Last result; 0 for none.", last)

    def _recorded(self, read: MetricCounts) -> Iterator[Metric]:
        yield _counters("files", "Contents by end, as recorded.", ("end", "reason"), read.ends)
        yield _gauge("retried_files", "More than one attempt.", read.retried)
        yield CounterMetricFamily("lungwatch_attempts", "Runs of all contents.", read.attempts)
        yield _gauges("deliveries", "The outbox.", ("destination", "state"), read.deliveries)
        yield _gauges(
            "commitments",
            "Sent objects by storage commitment.",
            ("destination", "state"),
            read.commitments,
        )
        yield _gauges(
            "commitment_requests",
            "Requests of other systems for storage commitment.",
            ("state",),
            _keyed(read.commitment_requests),
        )
        attempts = _keyed(read.delivery_attempts)
        yield _counters("delivery_attempts", "Of all in the outbox.", ("destination",), attempts)
        if read.last:
            mean = sum(read.last) / len(read.last)
            yield _gauge("probability_mean", "Of the last results.", mean)
        # Windows that share results would make any drift look smaller than it is.
        if read.scored >= 2 * self._window:
            psi = stability_index(read.first, read.last)
            yield _gauge("probability_psi", "Last against first.", psi)


def _health_metrics(health: Health) -> Iterator[Metric]:
    waiting_s = health.oldest_waiting_s or 0.0
    yield _gauge("health_status", "0 ok, 1 degraded, 2 failing.", _STATUS.index(health.status))
    yield _gauge("uptime_seconds", "Since the start.", health.uptime_s)
    yield _gauge("in_flight_files", "Claimed files.", health.in_hand)
    yield _gauge("waiting_files", "Not yet claimed.", health.waiting)
    for name, text in (("waiting", "Not yet claimed."), ("in_hand", "Claimed files.")):
        values = _keyed({lane: counts[name] for lane, counts in health.lanes.items()})
        yield _gauges(f"lane_{name}_files", text, ("lane",), values)
    yield _gauge("oldest_waiting_seconds", "Age of the oldest; 0 for none.", waiting_s)
    yield _gauge("left_alone_files", "Seen, and not to be taken.", health.left_alone)
    skipped = _keyed(health.skipped)
    yield _gauges("skipped_files", "Skipped for their names, folders too.", ("pattern",), skipped)
    yield _gauge("disk_watermark_bytes", "No claims below.", health.min_free_mb * 1024 * 1024)
    outages = {(kind.value,): kind in health.outages for kind in OutageKind}
    yield _gauges("outage", "1 while it lasts.", ("kind",), outages)


def _stage_metrics(stages: Mapping[str, StageProgress]) -> Iterator[Metric]:
    for name, text, attribute in (
        ("stage_waiting", "Queue depth.", "waiting"),
        ("stage_busy", "Units in work.", "busy"),
        ("stage_oldest_seconds", "Since the oldest unit's progress.", "oldest_s"),
    ):
        values = {stage: getattr(progress, attribute) for stage, progress in stages.items()}
        yield _gauges(name, text, ("stage",), _keyed(values))


def _drift_metrics(found: Drift) -> Iterator[Metric]:
    labels = ("station", "what")
    alarming = {(test.station, test.what): float(test.alarm) for test in found.tests}
    distances = {(test.station, test.what): test.statistic for test in found.tests}
    windows = {(scope.station,): float(scope.results) for scope in found.scopes}
    yield _gauges("drift", "1 for an alarm; station empty: all together.", labels, alarming)
    yield _gauges("drift_distance", "From the reference, 0 to 1.", labels, distances)
    yield _gauges("drift_window_results", "Results compared.", ("station",), windows)


def _answer(read: TimeLimited[T]) -> T | None:
    try:
        return read()
    except (LungwatchError, OSError):  # TimeoutError is an OSError
        return None


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"lungwatch_{name}", text, value)


def _gauges(name: str, text: str, labels: Sequence[str], values: Mapping[Labels, float]) -> Metric:
    return _filled(GaugeMetricFamily(f"lungwatch_{name}", text, labels=labels), values)


def _counters(
    name: str, text: str, labels: Sequence[str], values: Mapping[Labels, float]
) -> Metric:
    return _filled(CounterMetricFamily(f"lungwatch_{name}", text, labels=labels), values)


def _filled(
    family: GaugeMetricFamily | CounterMetricFamily, values: Mapping[Labels, float]
) -> Metric:
    for key, value in sorted(values.items()):
        family.add_metric(key, value)
    return family


def _keyed(values: Mapping[str, float]) -> dict[tuple[str], float]:
    return {(key,): value for key, value in values.items()}


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


class StatusServer:
    """HTTP server of /metrics, /health and /ready for this machine alone.

    Parameters
    ----------
    port
        Of 127.0.0.1; 0 for any free one.
    metrics
        Returns the metrics as text.
    progress
        Records that requests are accepted, as the stage "status".

    Raises
    ------
    ConfigError
        If the port cannot be bound.
    """

    def __init__(
        self,
        port: int,
        metrics: Callable[[], bytes],
        health: HealthCheck,
        on_crash: Callable[[str, BaseException], None],
        progress: Progress,
    ) -> None:
        class Handler(_StatusHandler):
            text = staticmethod(metrics)
            health_check = health

        try:
            self._server = _Server((_ADDRESS, port), Handler)
        except OSError as error:
            raise ConfigError(f"cannot bind metrics_port {port}: {error.strerror}") from error
        self.port = self._server.server_address[1]
        self._server.on_round = lambda: progress.beat(_STAGE)
        self._progress = progress
        self._thread = Worker("status", self._serve, on_crash)

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def _serve(self) -> None:
        with self._progress.busy(_STAGE):
            self._server.serve_forever()

    def stop(self) -> None:
        """Close the port."""
        if self._thread.is_alive():
            self._server.shutdown()
        self._server.cut_all()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    """A server of few requests at once, each with one deadline for all of it."""

    daemon_threads = True
    on_round: Callable[[], None]

    def __init__(self, *args: Any) -> None:  # noqa: ANN401 - socketserver's own signature
        self._guard = threading.Lock()
        self._since_s: dict[socket.socket, float] = {}
        super().__init__(*args)

    def service_actions(self) -> None:
        super().service_actions()
        self.on_round()
        now_s = time.monotonic()
        with self._guard:
            late = [one for one, since_s in self._since_s.items() if now_s - since_s > _TIMEOUT_S]
        for one in late:
            self._cut(one, "request not in time")

    def process_request(self, request: Any, client_address: Any) -> None:  # noqa: ANN401
        with self._guard:
            # The one that has been here longest makes room.
            is_full = len(self._since_s) >= _MOST
            oldest = min(self._since_s, key=self._since_s.__getitem__) if is_full else None
            self._since_s[request] = time.monotonic()
        if oldest is not None:
            self._cut(oldest, "too many")
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:  # noqa: ANN401
        try:
            super().process_request_thread(request, client_address)
        finally:
            with self._guard:
                self._since_s.pop(request, None)

    def _cut(self, request: socket.socket, why: str) -> None:
        with self._guard:
            if self._since_s.pop(request, None) is None:
                return
            with suppress(OSError):
                request.shutdown(socket.SHUT_RDWR)
        event("cut_off", level=logging.WARNING, why=why, port=self.server_address[1])

    def cut_all(self) -> None:
        """End every request, at a stop."""
        with self._guard:
            for request in self._since_s:
                with suppress(OSError):
                    request.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ANN401, ARG002
        """Note a request that failed, without a trace of it."""
        event("status_request_failed", level=logging.DEBUG)


class _BoundedReader(io.RawIOBase):
    """The bytes of one request, up to a bound."""

    def __init__(self, connection: socket.socket) -> None:
        super().__init__()
        self._connection = connection
        self._left = _MAX_REQUEST_BYTES

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:  # noqa: ANN401 - RawIOBase's
        if self._left <= 0:
            raise OSError("the request is too large")
        count = self._connection.recv_into(memoryview(buffer)[: self._left])
        self._left -= count
        return count


class _StatusHandler(BaseHTTPRequestHandler):
    timeout = _TIMEOUT_S
    server_version = "lungwatch"
    sys_version = ""
    text: Callable[[], bytes]
    health_check: HealthCheck

    def setup(self) -> None:
        super().setup()
        self.rfile.close()
        self.rfile = io.BufferedReader(_BoundedReader(self.connection), 4096)

    def do_GET(self) -> None:
        host = self.headers.get("Host", "").rsplit(":", 1)[0]
        if host not in _HOSTS:  # DNS rebinding
            self._answer(403, b"forbidden\n", "text/plain")
        elif self.path == "/metrics":
            self._answer(200, self.text(), "text/plain; version=0.0.4; charset=utf-8")
        elif self.path == "/health":
            health = self.health_check.examine()
            body = json.dumps(asdict(health)) + "\n"
            status = 503 if health.status is HealthStatus.FAILING else 200
            self._answer(status, body.encode(), "application/json")
        elif self.path == "/ready":
            phase = self.health_check.phase
            is_ready = not list(observe_phase(phase))
            self._answer(200 if is_ready else 503, f"{phase}\n".encode(), "text/plain")
        else:
            self._answer(404, b"not found\n", "text/plain")

    def _answer(self, status: int, body: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing: whoever asks every few seconds would fill the log."""


class Monitor:
    """Status port and metrics textfile, as configured.

    Parameters
    ----------
    on_stop
        Called at the end, to close what metrics and health read from.
    port, textfile
        As in `Config`.

    Raises
    ------
    ConfigError
        If the port cannot be bound.
    """

    def __init__(
        self,
        metrics: Metrics,
        health: HealthCheck,
        on_crash: Callable[[str, BaseException], None],
        *,
        on_stop: Callable[[], None],
        progress: Progress,
        port: int,
        textfile: str,
    ) -> None:
        self._metrics = metrics
        self._server = (
            StatusServer(port, metrics.text, health, on_crash, progress) if port else None
        )
        self._textfile = Path(textfile) if textfile else None
        self._on_stop = on_stop
        self._stopped = threading.Event()
        self._thread = Worker("textfile", self._write_on, on_crash)

    def start(self) -> None:
        """Begin to serve."""
        if self._server is not None:
            self._server.start()
        if self._textfile is not None:
            self._thread.start()

    def stop(self) -> None:
        """Write the file once more and close the port."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()
        if self._server is not None:
            self._server.stop()
        self._on_stop()

    def _write_on(self) -> None:
        is_stopped = False
        while not is_stopped:
            self._write()
            is_stopped = self._stopped.wait(_EVERY_S)
        self._write()

    def _write(self) -> None:
        assert self._textfile is not None
        try:
            # The collector reads all that ends in .prom, hidden or not.
            with replacing(self._textfile, suffix=".tmp") as temporary:
                temporary.write_bytes(self._metrics.text())
        except OSError as error:
            event("metrics_not_written", level=logging.WARNING, error=error.strerror)
