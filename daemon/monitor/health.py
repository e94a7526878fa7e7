"""Health report of the running daemon, and the port that serves it with the metrics."""

import contextlib
import json
import logging
import shutil
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from lungwatch.daemon.checks import Health, HealthStatus, Phase, judge, observe_phase
from lungwatch.daemon.home import Home
from lungwatch.daemon.logs import event
from lungwatch.daemon.retention import backups
from lungwatch.daemon.retry import Clock, OutageKind
from lungwatch.daemon.stage import Progress, TimeLimited, Worker
from lungwatch.db.engine import parse_url
from lungwatch.db.maintenance import sqlite_path
from lungwatch.db.statistics import HealthCounts
from lungwatch.errors import ConfigError, LungwatchError


@dataclass(frozen=True, kw_only=True)
class DiskUsage:
    """Free space of the home's file systems, and the age of its newest backup.

    Attributes
    ----------
    free
        Bytes free of each file system, under the first of "home", "overlays", "outbox",
        "backups" and "database" that lies on it.
    last_backup_at
        Of the newest backup, in seconds since the epoch; None if there is none.
    """

    free: dict[str, int]
    last_backup_at: float | None


def disk_usage(home: Home, database_url: str) -> DiskUsage:
    """Measure them.

    Raises
    ------
    OSError
        If the home is away.
    """
    folders = {
        "home": home.root,
        "overlays": home.overlays,
        "outbox": home.outbox,
        "backups": home.backups,
    }
    with contextlib.suppress(LungwatchError):  # another machine's
        folders["database"] = sqlite_path(parse_url(database_url)).parent
    names: dict[int, str] = {}
    for name, folder in folders.items():
        if name == "home" or folder.is_dir():
            names.setdefault(folder.stat().st_dev, name)
    newest = backups(home.backups)[-1:]
    return DiskUsage(
        free={name: shutil.disk_usage(folders[name]).free for name in names.values()},
        last_backup_at=newest[0].stat().st_mtime if newest else None,
    )


@dataclass(frozen=True, kw_only=True)
class Probes:
    """Callables that tell the state of the daemon, each at once but for the two with a limit.

    Attributes
    ----------
    signs
        Of the database; raises LungwatchError or TimeoutError.
    free_mb
        Of the home; raises OSError if the home, or the drop folder in it, is away.
    oldest_waiting
        Seconds since the epoch; None if nothing waits.
    """

    phase: Callable[[], Phase]
    signs: TimeLimited[HealthCounts]
    free_mb: TimeLimited[int]
    waiting: Callable[[], int]
    oldest_waiting: Callable[[], float | None]
    left_alone: Callable[[], int]
    skipped: Callable[[], Mapping[str, int]]
    in_hand: Callable[[], int]
    queues: Callable[[], dict[str, int]]
    outages: Callable[[], frozenset[OutageKind]]
    stuck: Callable[[], dict[str, float]]


class HealthCheck:
    """Asks the probes, and judges their answers by the list of checks. For all threads."""

    def __init__(self, probes: Probes, *, model: str, min_free_mb: int, clock: Clock) -> None:
        self._probes = probes
        self._model = model
        self._min_free_mb = min_free_mb
        self._clock = clock
        self._started_s = clock.monotonic()

    @property
    def phase(self) -> Phase:
        """Phase of the service's life."""
        return self._probes.phase()

    def examine(self) -> Health:
        """Return how it is now; takes a few seconds at most."""
        probes, now = self._probes, self._clock.now()
        counts, free_mb = self._counts(), self._free_mb()
        return judge(
            Health(
                phase=probes.phase(),
                model=self._model,
                uptime_s=round(self._clock.monotonic() - self._started_s, 1),
                database=counts is not None,
                disk_free_mb=free_mb,
                min_free_mb=self._min_free_mb,
                waiting=probes.waiting(),
                oldest_waiting_s=self._oldest_waiting_s(counts),
                queues=probes.queues(),
                in_hand=probes.in_hand(),
                left_alone=probes.left_alone(),
                skipped=dict(probes.skipped()),
                outbox_waiting=counts.outbox_waiting if counts else None,
                outbox_oldest_s=_age_s(now, counts.oldest_delivery) if counts else None,
                outbox_ended=counts.outbox_ended if counts else None,
                outages=tuple(sorted(probes.outages())),
                stuck=probes.stuck(),
            )
        )

    def _oldest_waiting_s(self, counts: HealthCounts | None) -> float | None:
        """Return since when the oldest file waits, in the drop folder or to be tried again."""
        now = self._clock.now()
        ages = [_age_s(now, counts.oldest_queued)] if counts else []
        dropped_at = self._probes.oldest_waiting()
        if dropped_at is not None:
            ages.append(_age_s(now, datetime.fromtimestamp(dropped_at, UTC)))
        return max((age for age in ages if age is not None), default=None)

    def _counts(self) -> HealthCounts | None:
        try:
            return self._probes.signs()
        except (LungwatchError, TimeoutError):
            return None

    def _free_mb(self) -> int | None:
        try:
            return self._probes.free_mb()
        except OSError:  # TimeoutError is one
            return None


def free_mb_of(home: Home) -> int:
    """Return the free space in MiB.

    Raises
    ------
    OSError
        If the home or its drop folder is away.
    """
    home.incoming.stat()
    return home.free_mb()


def _age_s(now: datetime, since: datetime | None) -> float | None:
    # A clock that was set back makes nothing younger than new.
    return None if since is None else round(max(0.0, (now - since).total_seconds()), 1)


_ADDRESS = "127.0.0.1"
_MOST = 8  # requests at once
_TIMEOUT_S = 5.0
_STAGE = "status"
_HOSTS = ("127.0.0.1", "localhost")


class StatusServer:
    """HTTP server of /metrics, /health and /ready for this machine alone.

    Parameters
    ----------
    port
        Of 127.0.0.1; 0 for any free one.
    metrics
        Returns the metrics as text.
    health
        State that /health and /ready report.
    on_crash
        As of `Worker`.
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
        class Handler(_Handler):
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
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    on_round: Callable[[], None]

    def __init__(self, *args: Any) -> None:  # noqa: ANN401 - socketserver's own signature
        self._slots = threading.BoundedSemaphore(_MOST)
        super().__init__(*args)

    def service_actions(self) -> None:
        super().service_actions()
        self.on_round()

    def process_request(self, request: Any, client_address: Any) -> None:  # noqa: ANN401
        if not self._slots.acquire(blocking=False):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:  # noqa: ANN401
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._slots.release()

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ANN401, ARG002
        """Note a request that failed, without a trace of it."""
        event("status_request_failed", level=logging.DEBUG)


class _Handler(BaseHTTPRequestHandler):
    timeout = _TIMEOUT_S
    server_version = "lungwatch"
    sys_version = ""
    text: Callable[[], bytes]
    health_check: HealthCheck

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
