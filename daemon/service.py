"""The service: start, supervision of its threads, systemd notification, and stop."""

import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Mapping

from sqlalchemy import Engine

from lungwatch.daemon.assembly import Assembly, Common, assemble, load_model, make_services
from lungwatch.daemon.checks import Phase, check_start
from lungwatch.daemon.config import Config
from lungwatch.daemon.home import Home, claim_database
from lungwatch.daemon.logs import event
from lungwatch.daemon.pacs.scu import plan_of
from lungwatch.daemon.pipeline.filing import check_clear, recover
from lungwatch.daemon.retry import Clock, OutageKind, Outages, ShutdownRequested, SystemClock
from lungwatch.daemon.stage import Progress, StuckStage, Worker, progress_limits
from lungwatch.db.engine import check_integrity
from lungwatch.db.maintenance import open_database
from lungwatch.db.results import Store
from lungwatch.errors import describe_unexpected


def notify(message: str) -> None:
    """Tell the service manager something ("READY=1"); nothing happens without one.

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


_PER_PERIOD = 3

_STATUS_S = 5.0


class Watchdog:
    """Feeds the manager's watchdog from the main loop, for as long as nothing is stuck.

    Silence has the manager kill and restart the service. What was in hand is taken up by the
    next process, as after any crash.

    Parameters
    ----------
    vitals
        The record of progress.
    clock
        Only its monotonic time is used.
    is_excused
        Whether something known, such as a full disk, makes everybody wait: a restart would
        not help, and time spent so is nobody's fault.
    dead
        The threads that should live and do not, by name.
    status
        One line for `systemctl status`, without patients' data.
    environ
        For WATCHDOG_USEC and WATCHDOG_PID; the process's own if None.
    """

    def __init__(
        self,
        *,
        vitals: Progress,
        clock: Clock,
        is_excused: Callable[[], bool],
        dead: Callable[[], list[str]],
        status: Callable[[], str],
        environ: Mapping[str, str] | None = None,
    ) -> None:
        self._vitals = vitals
        self._clock = clock
        self._is_excused = is_excused
        self._dead = dead
        self._status = status
        self._period_s = _period_s(os.environ if environ is None else environ)
        self._fed_s = self._said_s = float("-inf")
        self._last_status = ""
        self._stuck: set[str] = set()

    def wait_s(self, most_s: float) -> float:
        """Return how long the main loop may sleep between two ticks."""
        return most_s if self._period_s is None else min(most_s, self._period_s)

    def tick(self) -> None:
        """Look at every stage, then feed the watchdog or not."""
        now_s = self._clock.monotonic()
        if self._is_excused():
            self._vitals.excuse(now_s)
        stuck = self._vitals.stuck(now_s)
        self._report(stuck)
        dead = self._dead()
        if stuck or dead:
            names = ", ".join([one.stage for one in stuck] + dead)
            self._say(f"no progress: {names}", now_s)
            return
        self._say(self._status(), now_s)
        if self._period_s is not None and now_s - self._fed_s >= self._period_s:
            self._fed_s = now_s
            notify("WATCHDOG=1")

    def _report(self, stuck: list[StuckStage]) -> None:
        """Log each stage once when it sticks, and once when it goes on."""
        for one in stuck:
            if one.stage not in self._stuck:
                event("stuck", level=logging.ERROR, stage=one.stage, seconds=round(one.seconds))
        names = {one.stage for one in stuck}
        for stage in sorted(self._stuck - names):
            event("unstuck", level=logging.WARNING, stage=stage)
        self._stuck = names

    def _say(self, status: str, now_s: float) -> None:
        if status != self._last_status and now_s - self._said_s >= _STATUS_S:
            self._last_status, self._said_s = status, now_s
            notify(f"STATUS={status}")


def _period_s(environ: Mapping[str, str]) -> float | None:
    """Return the seconds between two signs of life; None if nobody expects any."""
    try:
        timeout_s = int(environ.get("WATCHDOG_USEC", "")) / 1e6
    except ValueError:
        return None
    # Set for another process, whose environment this one has inherited.
    if environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    return timeout_s / _PER_PERIOD


_HEALTH_S = 1.0

_SENDER_S = 5.0

_STOP_SLACK_S = 15.0


ProgressCallback = Callable[[int, int], None]


class Service:
    """One daemon over one home.

    Parameters
    ----------
    config
        As read by `load_config`.
    clock
        The machine's, unless a test brings its own.
    rescores
        Whether to do only what the model was asked to score anew, with `once`.
    """

    def __init__(
        self, config: Config, clock: Clock | None = None, *, rescores: bool = False
    ) -> None:
        self._config = config
        self._clock = clock or SystemClock()
        self._home = Home(config.home)
        self._stop = threading.Event()
        self._rescores = rescores
        self._crash: tuple[str, BaseException] | None = None
        self._assembly: Assembly | None = None
        self._is_ready = False
        self._outages = Outages()
        self._vitals = Progress(self._clock, progress_limits(config))
        self._drain_timer = threading.Timer(config.drain_s, self._outages.abandon)
        self._drain_timer.daemon = True

    @property
    def phase(self) -> Phase:
        """Where it is in its life."""
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
            The exit status: 0, or 1 if a thread died or, with `once`, a file was left alone
            or the work was cut short.

        Raises
        ------
        LungwatchError
            If the start is not possible; the message says what to do.
        """
        check_start(self._config)
        with self._home.locked():
            # A lease that we hold for a moment may be broken by a writer (see writercheck);
            # the kernel tells by a signal whose default is to kill.
            signal.signal(signal.SIGIO, signal.SIG_IGN)
            try:
                # A server that boots later than this machine is no reason to give up.
                notify("STATUS=opening the database")
                engine = self._open() if once else self._outages.ride_out(self._open)
            except ShutdownRequested:
                event("stopped", ended=0, left=0)
                return 0
            try:
                return self._run(engine, once=once, on_progress=on_progress)
            finally:
                self._drain_timer.cancel()
                engine.dispose()

    def _open(self) -> Engine:
        """Open the database, if it is whole and this home's."""
        engine = open_database(self._config.database_url)
        try:
            check_integrity(engine)
            claim_database(self._home, engine, self._clock.now())
        except BaseException:
            engine.dispose()
            raise
        return engine

    def stop(self) -> None:
        """Stop claiming and end when what is in flight is done.

        For any thread, not for a signal handler: that could interrupt the very lock that an
        event takes, and wait for it for ever.
        """
        if self._assembly is None:
            self._outages.abandon()  # nothing is in hand yet
        elif not self._stop.is_set():
            # What waits for a trouble's end gets the time of the drain, and no more.
            self._drain_timer.start()
        self._stop.set()
        if self._assembly is not None:
            self._assembly.intake.stop()
            if self._assembly.sender is not None:
                self._assembly.sender.cancel()

    def _run(self, engine: Engine, *, once: bool, on_progress: ProgressCallback | None) -> int:
        common = Common(
            config=self._config,
            home=self._home,
            clock=self._clock,
            outages=self._outages,
            vitals=self._vitals,
            stopped=self._stop,
            on_crash=self._on_crash,
            phase=lambda: self.phase,
            rescores=self._rescores,
        )
        store = Store(engine, plan_of(self._config))
        model = load_model(self._config, self._home, store, self._clock)
        if self._rescores:
            check_clear(self._home, engine, model.row)
        recover(self._home, engine, store, self._clock)
        parts = self._assembly = assemble(common, engine, store, model)
        # Before the threads: a port that cannot be had is a reason not to start.
        listener, monitor = (None, None) if once else make_services(common, model, parts)
        parts.writer.start()
        parts.pipeline.start()
        try:
            for companion in (monitor, listener):
                if companion is not None:
                    companion.start()
            self._is_ready = True
            event("ready", observer=parts.watcher.kind, why=parts.watcher.why, model=model.id)
            notify("READY=1")
            if once:
                self._work_off(parts, on_progress)
            else:
                self._serve(parts)
        except ShutdownRequested:
            pass  # stopped while a trouble lasted: the next start goes on
        finally:
            self._say_stopping()
            if listener is not None:
                listener.stop()
            parts.watcher.stop()
            self._wind_up(parts)
            # Last: whoever asks during the drain is told of it.
            if monitor is not None:
                monitor.stop()
        return self._status(parts, once=once)

    def _serve(self, parts: Assembly) -> None:
        """Let the intake run on its own thread and see that everything lives."""
        thread = Worker("intake", parts.intake.run, self._on_crash)
        thread.start()
        if parts.sender is not None:
            parts.sender.start()

        def status() -> str:
            ended, in_hand = parts.in_flight.ended, parts.in_flight.count
            counts = f"{ended} ended, {in_hand} in hand, {parts.intake.waiting} waiting"
            troubles = ", ".join(sorted(self._outages.current))
            return f"{counts}; held up: {troubles}" if troubles else counts

        watchdog = Watchdog(
            vitals=self._vitals,
            clock=self._clock,
            # The loss of the drop folder keeps no stage waiting.
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

    def _work_off(self, parts: Assembly, on_progress: ProgressCallback | None) -> None:
        """Scan on this thread until there is nothing left to take and nothing in flight."""
        intake, in_flight = parts.intake, parts.in_flight
        intake.resume()
        while not self._stop.is_set():
            # Asked before the look: an archive that ends after it leaves more to take.
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
        intake.skipped.tell_all()
        if parts.sender is not None:
            parts.sender.recover()
            parts.sender.work_off()

    def _say_stopping(self) -> None:
        # The manager's patience is to outlast the drain, however long that is set.
        patience_us = round((self._config.drain_s + _SENDER_S + _STOP_SLACK_S) * 1e6)
        notify(f"STOPPING=1\nEXTEND_TIMEOUT_USEC={patience_us}\nSTATUS=finishing")

    def _wind_up(self, parts: Assembly) -> None:
        """End what is in hand, the writer last: the others need it."""
        crashed = self._crash is not None
        if parts.sender is not None:
            parts.sender.cancel()
        parts.pipeline.stop(0 if crashed or self._outages.is_abandoned else self._config.drain_s)
        if parts.sender is not None:
            parts.sender.stop(0 if crashed else _SENDER_S)
        if not crashed:
            parts.writer.stop()

    def _status(self, parts: Assembly, *, once: bool) -> int:
        """Say how it ended; returns the exit status."""
        if self._crash:
            name, error = self._crash
            event("crashed", level=logging.ERROR, thread=name, error=describe_unexpected(error))
            return 1
        in_flight = parts.in_flight
        event("stopped", ended=in_flight.ended, left=in_flight.count)
        has_left_some = parts.intake.left_alone or in_flight.count or self._stop.is_set()
        return 1 if once and has_left_some else 0

    def _on_crash(self, name: str, error: BaseException) -> None:
        """Note the first death of a thread; nothing limps on after it."""
        if self._crash is None:
            self._crash = (name, error)
        self._stop.set()
        self._outages.abandon()
