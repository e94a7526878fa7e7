"""The service: start, supervision of its threads, systemd notification, and stop."""

import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict

from sqlalchemy import Engine

from lungwatch.daemon.assembly import Parts, assemble, load_model, make_services
from lungwatch.daemon.config import Config
from lungwatch.daemon.configfile import KEYS
from lungwatch.daemon.home import Home, claim_database, is_first_start, missing_database
from lungwatch.daemon.lease import DatabaseWatch, take_lease
from lungwatch.daemon.logs import change_format, event
from lungwatch.daemon.monitor.health import Phase, check_start
from lungwatch.daemon.pacs.scu import plan_of
from lungwatch.daemon.pipeline import confinement
from lungwatch.daemon.pipeline.filing import check_clear, recover
from lungwatch.daemon.retry import Clock, OutageKind, Outages, ShutdownRequested, SystemClock
from lungwatch.daemon.stage import Context, DatabaseWriter, InFlight, Progress, Worker
from lungwatch.db.engine import check_integrity
from lungwatch.db.maintenance import open_database
from lungwatch.db.results import Store
from lungwatch.errors import LungwatchError, NotFoundError, describe_unexpected

_SIGNS_PER_PERIOD = 3
_STATUS_S = 5.0
_HEALTH_S = 1.0
_SENDER_S = 5.0
_STOP_SLACK_S = 15.0
_RELOADED = frozenset({"log_format"})  # by SIGHUP; all else needs a restart

ProgressCallback = Callable[[int, int], None]


def notify(message: str) -> None:
    """Send a message such as "READY=1" to the service manager, if there is one (sd_notify(3)).

    Raises
    ------
    OSError
        If the manager's socket is named and cannot be written to.
    """
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):  # a socket in the abstract namespace
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as connection:
        connection.sendto(message.encode(), address)


class Watchdog:
    """Signs of life to the service manager's watchdog, from the main loop, unless a stage is stuck.

    Without them the manager kills and restarts the service. Files in progress are taken up by
    the next process, as after any crash.

    Parameters
    ----------
    progress
        Of every stage.
    clock
        Only its monotonic time is used.
    is_excused
        Tells whether an outage, such as a full disk, keeps every stage waiting: a restart would
        not help, and that time does not count.
    dead
        Returns the threads that ended unexpectedly, by name.
    status
        Returns one line for `systemctl status`, without patient data.
    environ
        For WATCHDOG_USEC and WATCHDOG_PID; the process's own if None.
    """

    def __init__(
        self,
        *,
        progress: Progress,
        clock: Clock,
        is_excused: Callable[[], bool],
        dead: Callable[[], list[str]],
        status: Callable[[], str],
        environ: Mapping[str, str] | None = None,
    ) -> None:
        self._progress = progress
        self._clock = clock
        self._is_excused = is_excused
        self._dead = dead
        self._status = status
        self._period_s = _period_s(os.environ if environ is None else environ)
        self._alive_s = self._status_s = float("-inf")
        self._last_status = ""
        self._stuck: set[str] = set()

    def wait_s(self, most_s: float) -> float:
        """Return how long the main loop may sleep between two ticks."""
        return most_s if self._period_s is None else min(most_s, self._period_s)

    def tick(self) -> None:
        """Check every stage, then send a sign of life or not."""
        now_s = self._clock.monotonic()
        if self._is_excused():
            self._progress.excuse(now_s)
        stuck = self._progress.stuck(now_s)
        self._report(stuck)
        dead = self._dead()
        if stuck or dead:
            names = ", ".join([*stuck, *dead])
            self._notify_status(f"no progress: {names}", now_s)
            return
        self._notify_status(self._status(), now_s)
        if self._period_s is not None and now_s - self._alive_s >= self._period_s:
            self._alive_s = now_s
            notify("WATCHDOG=1")

    def _report(self, stuck: dict[str, float]) -> None:
        """Log each stage once when it is stuck, and once when it continues."""
        for stage, seconds in stuck.items():
            if stage not in self._stuck:
                event("stuck", level=logging.ERROR, stage=stage, seconds=round(seconds))
        for stage in sorted(self._stuck - stuck.keys()):
            event("unstuck", level=logging.WARNING, stage=stage)
        self._stuck = set(stuck)

    def _notify_status(self, status: str, now_s: float) -> None:
        if status != self._last_status and now_s - self._status_s >= _STATUS_S:
            self._last_status, self._status_s = status, now_s
            notify(f"STATUS={status}")


def _period_s(environ: Mapping[str, str]) -> float | None:
    """Return the seconds between two signs of life; None if none are expected."""
    try:
        timeout_s = int(environ.get("WATCHDOG_USEC", "")) / 1e6
    except ValueError:
        return None
    # Set for another process, whose environment this one has inherited.
    if environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    return timeout_s / _SIGNS_PER_PERIOD


class Service:
    """One daemon over one home.

    Parameters
    ----------
    config
        As read by `load_config`.
    clock
        The machine's, unless a test brings its own.
    rescores
        Whether to process only results that were requested of the model, with `once`.
    new_database
        Whether a missing database is made although the home has been worked in.
    """

    def __init__(
        self,
        config: Config,
        clock: Clock | None = None,
        *,
        rescores: bool = False,
        new_database: bool = False,
    ) -> None:
        self._config = config
        self._loaded = config
        self._new_database = new_database
        self._clock = clock or SystemClock()
        self._home = Home(config.home)
        self._stop = threading.Event()
        self._rescores = rescores
        self._in_flight = InFlight(config.max_in_flight, config.slow_in_flight)
        self._crash: tuple[str, BaseException] | None = None
        self._parts: Parts | None = None
        self._is_ready = False
        self._outages = Outages()
        self._progress = Progress(self._clock, config.stuck_s)
        self._drain_timer = threading.Timer(config.drain_s, self._outages.shut_down)
        self._drain_timer.daemon = True

    @property
    def phase(self) -> Phase:
        """Phase of its life."""
        if self._stop.is_set():
            return Phase.STOPPING
        return Phase.READY if self._is_ready else Phase.STARTING

    def run(self, *, once: bool = False, on_progress: ProgressCallback | None = None) -> int:
        """Work until stopped, or with `once` until every file in the drop folder has an end.

        Parameters
        ----------
        once
            Process what is there and return.
        on_progress
            Called with (ended, known) files; only with `once`.

        Returns
        -------
        int
            The exit status: 0, or 1 if a thread died or, with `once`, a file could not be taken
            or the run was stopped.

        Raises
        ------
        LungwatchError
            If the start is not possible; the message says what to do.
        """
        confinement.hide()
        check_start(self._config)
        with self._home.locked():
            # A writer may break the lease of `writer_of`; the kernel reports that by a signal
            # whose default is to kill.
            signal.signal(signal.SIGIO, signal.SIG_IGN)
            try:
                # The database server may boot later than this machine.
                notify("STATUS=opening the database")
                engine = self._open() if once else self._outages.wait_out(self._open)
            except ShutdownRequested:
                event("stopped", ended=0, left=0)
                return 0
            try:
                return self._run_leased(engine, once=once, on_progress=on_progress)
            finally:
                self._drain_timer.cancel()
                engine.dispose()

    def _open(self) -> Engine:
        """Open the database, if it is intact and belongs to this home."""
        url = self._config.database_url
        creates = self._new_database or is_first_start(self._home)
        try:
            engine = open_database(url, creates=creates)
        except NotFoundError as error:
            raise missing_database(self._home, url) from error
        try:
            check_integrity(engine)
            claim_database(self._home, engine, self._clock.now())
        except BaseException:
            engine.dispose()
            raise
        return engine

    def _run_leased(
        self, engine: Engine, *, once: bool, on_progress: ProgressCallback | None
    ) -> int:
        """Hold the lease on the database while the service runs."""
        lease_s = self._config.lease_s
        try:
            guard = self._outages.wait_out(
                lambda: take_lease(
                    self._home,
                    engine,
                    lease_s=lease_s,
                    clock=self._clock,
                    stopped=self._stop.wait,
                )
            )
        except ShutdownRequested:
            event("stopped", ended=0, left=0)
            return 0
        watch = DatabaseWatch(
            guard,
            self._home,
            lease_s=lease_s,
            clock=self._clock,
            outages=self._outages,
            on_crash=self._on_crash,
        )
        watch.start()
        try:
            return self._run(guard.engine, once=once, on_progress=on_progress)
        finally:
            watch.stop()

    def stop(self) -> None:
        """Stop claiming, and end when the files in flight are done.

        Thread-safe, but not for a signal handler, which could interrupt the holder of a lock
        that it needs.
        """
        if self._parts is None:
            self._outages.shut_down()  # no file is in flight yet
        elif not self._stop.is_set():
            # Steps that wait for the end of an outage get the drain time and no more.
            self._drain_timer.start()
        self._stop.set()
        if self._parts is not None:
            self._parts.intake.stop()
            if self._parts.sender is not None:
                self._parts.sender.cancel()

    def log_status(self) -> None:
        """Log what is waiting and in work, and a line for each stage."""
        parts = self._parts
        event(
            "status",
            phase=self.phase.value,
            ended=self._in_flight.ended,
            in_flight=self._in_flight.count,
            waiting=0 if parts is None else parts.intake.waiting,
            outages=",".join(sorted(self._outages.current)) or "none",
        )
        for stage, found in self._progress.snapshot().items():
            event("stage_status", stage=stage, **asdict(found))

    def rescan(self) -> None:
        """Have the whole drop folder looked through now."""
        parts = self._parts
        event("rescan", why="asked for by a signal" if parts else "not started yet")
        if parts is not None:
            parts.watcher.ask_for_scan()

    def reload(self, read: Callable[[], Config]) -> None:
        """Take over what can change in a running daemon, if the whole configuration is valid.

        Parameters
        ----------
        read
            Reads the configuration anew.
        """
        is_ready = self.phase is Phase.READY
        if is_ready:
            notify(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
        try:
            self._take_over(read())
        except LungwatchError as error:
            text = " ".join(str(error).split())
            event("reload_refused", level=logging.WARNING, error=text)
        finally:
            if is_ready:
                notify("READY=1")

    def _take_over(self, found: Config) -> None:
        changed = [key for key in KEYS if getattr(found, key) != getattr(self._loaded, key)]
        later = [KEYS[key].dotted for key in changed if key not in _RELOADED]
        if "log_format" in changed:
            change_format(found.log_format)
        self._loaded = self._loaded.model_copy(
            update={key: getattr(found, key) for key in changed if key in _RELOADED}
        )
        now = [KEYS[key].dotted for key in changed if key in _RELOADED]
        event("reloaded", changed=",".join(now) or "none")
        if later:
            event("reload_needs_restart", level=logging.WARNING, keys=",".join(later))

    def _run(self, engine: Engine, *, once: bool, on_progress: ProgressCallback | None) -> int:
        context = Context(
            config=self._config,
            home=self._home,
            clock=self._clock,
            outages=self._outages,
            progress=self._progress,
            store=Store(engine, plan_of(self._config)),
            writer=DatabaseWriter(self._outages, self._on_crash, self._progress),
            in_flight=self._in_flight,
            stopped=self._stop,
            on_crash=self._on_crash,
        )
        model = load_model(context)
        if self._rescores:
            check_clear(self._home, engine, model.row)
        recover(self._home, engine, context.store, self._clock)
        parts = self._parts = assemble(context, engine, model, rescores=self._rescores)
        listener = monitor = None
        if not once:
            # Before the threads: a port that cannot be bound is a reason not to start.
            listener, monitor = make_services(context, engine, model, parts, lambda: self.phase)
        parts.clock_watch.start()
        context.writer.start()
        parts.pipeline.start()
        try:
            for service in (monitor, listener):
                if service is not None:
                    service.start()
            # Not earlier: a start that is refused says its reason alone.
            _log_sandbox()
            self._is_ready = True
            event("ready", observer=parts.watcher.kind, why=parts.watcher.why, model=model.id)
            notify("READY=1")
            if once:
                self._work_off(parts, on_progress)
            else:
                self._serve(parts)
        except ShutdownRequested:
            pass  # stopped during an outage: the next start continues
        finally:
            self._notify_stopping()
            if listener is not None:
                listener.stop()
            parts.watcher.stop()
            parts.clock_watch.stop()
            self._wind_up(parts, context.writer)
            # Last, so that it reports the drain.
            if monitor is not None:
                monitor.stop()
        return self._status(parts, once=once)

    def _serve(self, parts: Parts) -> None:
        """Run the intake on its own thread and supervise all threads."""
        thread = Worker("intake", parts.intake.run, self._on_crash)
        thread.start()
        if parts.sender is not None:
            parts.sender.start()

        def status() -> str:
            ended, in_flight = self._in_flight.ended, self._in_flight.count
            counts = f"{ended} ended, {in_flight} in progress, {parts.intake.waiting} waiting"
            outages = ", ".join(sorted(self._outages.current))
            return f"{counts}; held up: {outages}" if outages else counts

        watchdog = Watchdog(
            progress=self._progress,
            clock=self._clock,
            # A lost drop folder keeps no stage waiting.
            is_excused=lambda: bool(self._outages.current - {OutageKind.DROP_FOLDER}),
            dead=lambda: parts.pipeline.dead + ([] if thread.is_alive() else [thread.name]),
            status=status,
        )
        try:
            while not self._stop.wait(watchdog.wait_s(_HEALTH_S)):
                watchdog.tick()
                if not parts.watcher.is_alive:
                    self._on_crash("watcher", RuntimeError("the observer's thread ended"))
        finally:
            parts.intake.stop()
            thread.join()

    def _work_off(self, parts: Parts, on_progress: ProgressCallback | None) -> None:
        """Scan on this thread until no file is left to take or in flight."""
        intake, in_flight = parts.intake, self._in_flight
        intake.resume()
        while not self._stop.is_set():
            # Before the scan: an archive that ends later leaves more files to take.
            was_idle = in_flight.wait_empty(0)
            had_work = intake.scan()
            if on_progress is not None:
                ended = in_flight.ended
                on_progress(ended, ended + in_flight.count + intake.waiting)
            if not had_work and was_idle:
                break
            if not had_work:
                in_flight.wait_empty(_HEALTH_S)
            else:
                self._stop.wait(0.1)
        intake.skipped.log_all()
        if parts.sender is not None:
            parts.sender.recover()
            parts.sender.work_off()

    def _notify_stopping(self) -> None:
        # The manager must wait longer than the drain may take.
        patience_us = round((self._config.drain_s + _SENDER_S + _STOP_SLACK_S) * 1e6)
        notify(f"STOPPING=1\nEXTEND_TIMEOUT_USEC={patience_us}\nSTATUS=finishing")

    def _wind_up(self, parts: Parts, writer: DatabaseWriter) -> None:
        """Stop pipeline, sender and, last, the writer that they need."""
        crashed = self._crash is not None
        if parts.sender is not None:
            parts.sender.cancel()
        parts.pipeline.stop(0 if crashed or self._outages.is_shut_down else self._config.drain_s)
        if parts.sender is not None:
            parts.sender.stop(0 if crashed else _SENDER_S)
        if not crashed:
            writer.stop()

    def _status(self, parts: Parts, *, once: bool) -> int:
        """Log how the run ended; return the exit status."""
        if self._crash:
            name, error = self._crash
            event("crashed", level=logging.ERROR, thread=name, error=describe_unexpected(error))
            return 1
        event("stopped", ended=self._in_flight.ended, left=self._in_flight.count)
        is_incomplete = parts.intake.unusable or self._in_flight.count or self._stop.is_set()
        return 1 if once and is_incomplete else 0

    def _on_crash(self, name: str, error: BaseException) -> None:
        """Note the first thread that died, and stop the service."""
        if self._crash is None:
            self._crash = (name, error)
        self._stop.set()
        self._outages.shut_down()


def _log_sandbox() -> None:
    """Say what holds the decoding processes, and warn of what is missing."""
    found = confinement.probe()
    event(
        "sandbox",
        level=logging.WARNING if found.missing else logging.INFO,
        **asdict(found),
        missing=",".join(found.missing) or "none",
    )
