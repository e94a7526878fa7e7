"""The daemon as others watch it: the status port and the metrics' file."""

import logging
import threading
from collections.abc import Callable
from pathlib import Path

from lungwatch.daemon.health import HealthCheck
from lungwatch.daemon.logs import event
from lungwatch.daemon.metrics import Metrics
from lungwatch.daemon.statusserver import StatusServer
from lungwatch.daemon.vitals import Vitals
from lungwatch.daemon.worker import Worker

_EVERY_S = 15.0


class Monitor:
    """Serves the metrics as configured.

    Parameters
    ----------
    metrics
        The metrics.
    health
        What /health and /ready tell.
    on_stop
        Called at the end, to close what the two read from.
    on_crash
        See `Worker`.
    vitals
        See `StatusServer`.
    port
        See `Config.metrics_port`; 0 for none.
    textfile
        See `Config.metrics_textfile`; empty for none.

    Raises
    ------
    ConfigError
        If the port cannot be had.
    """

    def __init__(
        self,
        metrics: Metrics,
        health: HealthCheck,
        on_crash: Callable[[str, BaseException], None],
        *,
        on_stop: Callable[[], None],
        vitals: Vitals,
        port: int,
        textfile: str,
    ) -> None:
        self._metrics = metrics
        self._server = StatusServer(port, metrics.text, health, on_crash, vitals) if port else None
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
        # The collector reads all that ends in .prom, hidden or not: the temporary name must not.
        temporary = self._textfile.with_name(self._textfile.name + ".tmp")
        try:
            temporary.write_bytes(self._metrics.text())
            temporary.replace(self._textfile)
        except OSError as error:
            event("metrics_not_written", level=logging.WARNING, error=error.strerror)
