"""/metrics, /health and /ready for this machine alone. Nothing of a patient."""

import json
import logging
import threading
from collections.abc import Callable
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from lungwatch.daemon.health import HealthCheck, Phase, Status
from lungwatch.daemon.logs import event
from lungwatch.daemon.vitals import Vitals
from lungwatch.daemon.worker import Worker
from lungwatch.errors import ConfigError

_ADDRESS = "127.0.0.1"
_MOST = 8  # requests at once
_TIMEOUT_S = 5.0
_STAGE = "status"
_HOSTS = ("127.0.0.1", "localhost")


class StatusServer:
    """The HTTP port.

    Parameters
    ----------
    port
        Of 127.0.0.1; 0 for any free one.
    metrics
        Returns the metrics' text.
    health
        What /health and /ready tell.
    on_crash
        As of `Worker`.
    vitals
        Where it is noted, as the progress of the stage "status", that requests are accepted.

    Raises
    ------
    ConfigError
        If the port cannot be had.
    """

    def __init__(
        self,
        port: int,
        metrics: Callable[[], bytes],
        health: HealthCheck,
        on_crash: Callable[[str, BaseException], None],
        vitals: Vitals,
    ) -> None:
        class Handler(_Handler):
            text = staticmethod(metrics)
            health_check = health

        try:
            self._server = _Server((_ADDRESS, port), Handler)
        except OSError as error:
            raise ConfigError(f"metrics_port {port} cannot be had: {error.strerror}") from error
        self.port = self._server.server_address[1]
        self._server.on_round = lambda: vitals.beat(_STAGE)
        self._vitals = vitals
        self._thread = Worker("status", self._serve, on_crash)

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def _serve(self) -> None:
        with self._vitals.busy(_STAGE):
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
        if host not in _HOSTS:  # a page of another site whose name was rebound to this machine
            self._answer(403, b"forbidden\n", "text/plain")
        elif self.path == "/metrics":
            self._answer(200, self.text(), "text/plain; version=0.0.4; charset=utf-8")
        elif self.path == "/health":
            health = self.health_check.examine()
            body = json.dumps(asdict(health)) + "\n"
            status = 503 if health.status is Status.FAILING else 200
            self._answer(status, body.encode(), "application/json")
        elif self.path == "/ready":
            phase = self.health_check.phase
            self._answer(200 if phase is Phase.READY else 503, f"{phase}\n".encode(), "text/plain")
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
