"""The daemon as a whole: put together, started in order, watched, stopped."""

import logging
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy import Engine

from lungwatch.daemon.claiming import Claimer
from lungwatch.daemon.clock import Clock, SystemClock
from lungwatch.daemon.config import Config
from lungwatch.daemon.dicomnet import make_listener
from lungwatch.daemon.filing import Filing
from lungwatch.daemon.finishing import Finisher
from lungwatch.daemon.home import Home
from lungwatch.daemon.inflight import InFlight
from lungwatch.daemon.intake import Intake
from lungwatch.daemon.logs import event
from lungwatch.daemon.model import Classifier, find_bundle
from lungwatch.daemon.notify import notify
from lungwatch.daemon.outage import Abandoned, OutageKind, Outages
from lungwatch.daemon.outbox.plan import plan_of
from lungwatch.daemon.outbox.sender import Sender
from lungwatch.daemon.pipeline import Pipeline
from lungwatch.daemon.recovery import recover
from lungwatch.daemon.stability import Stability
from lungwatch.daemon.vitals import Vitals, limits_of
from lungwatch.daemon.watchdog import Watchdog
from lungwatch.daemon.watcher import Watcher
from lungwatch.daemon.worker import Worker
from lungwatch.daemon.writer import Writer
from lungwatch.db.integrity import check_intact
from lungwatch.db.migrate import open_database
from lungwatch.db.queries import queued
from lungwatch.db.store import Store
from lungwatch.errors import HomeError, LungwatchError

if TYPE_CHECKING:
    from lungwatch.daemon.dicomnet.listener import Listener
    from lungwatch.daemon.metrics import Metrics
    from lungwatch.daemon.monitor import Monitor

_LOCAL_STABILITY_S = 1.0
_REMOTE_STABILITY_S = 5.0
_HEALTH_S = 1.0
_QUEUED_AT_ONCE = 100
_SENDER_S = 5.0
_STOP_SLACK_S = 15.0

Progress = Callable[[int, int], None]


class Service:
    """One daemon over one home.

    Parameters
    ----------
    config
        As read by `load_config`.
    clock
        The machine's, unless a test brings its own.
    """

    def __init__(self, config: Config, clock: Clock | None = None) -> None:
        self._config = config
        self._clock = clock or SystemClock()
        self._home = Home(config.home)
        self._stop = threading.Event()
        self._crash: tuple[str, BaseException] | None = None
        self._intake: Intake | None = None
        self._outages = Outages()
        self._vitals = Vitals(self._clock, limits_of(config), self._on_finished)
        self._metrics: Metrics | None = None
        self._drain_timer = threading.Timer(config.drain_s, self._outages.abandon)
        self._drain_timer.daemon = True
        self._sender: Sender | None = None

    def run(self, *, once: bool = False, on_progress: Progress | None = None) -> int:
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
        self._home.prepare()
        with self._home.locked():
            # A lease that we hold for a moment may be broken by a writer (see writercheck);
            # the kernel tells by a signal whose default is to kill.
            signal.signal(signal.SIGIO, signal.SIG_IGN)
            self._check_space()
            engine = open_database(self._config.database_url)
            try:
                check_intact(engine)
                return self._run(engine, once=once, on_progress=on_progress)
            finally:
                self._drain_timer.cancel()
                engine.dispose()

    def stop(self) -> None:
        """Stop claiming and end when what is in flight is done.

        For any thread, not for a signal handler: that could interrupt the very lock that an
        event takes, and wait for it for ever.
        """
        if not self._stop.is_set():
            # What waits for a trouble's end gets the time of the drain, and no more.
            self._drain_timer.start()
        self._stop.set()
        if self._intake is not None:
            self._intake.stop()
        if self._sender is not None:
            self._sender.cancel()

    def _run(self, engine: Engine, *, once: bool, on_progress: Progress | None) -> int:
        config, home, clock = self._config, self._home, self._clock
        classifier = Classifier.load(
            find_bundle(config.model, home.root), threads=config.inference_threads
        )
        contract = classifier.contract
        store = Store(engine, plan_of(config))
        model_id = store.register_model(
            name=contract.name,
            version=contract.version,
            sha256=classifier.sha256,
            contract_json=contract.to_json(),
            now=clock.now(),
        )
        recover(home, engine, store, clock)

        writer = Writer(self._outages, self._on_crash, self._vitals)
        sender = self._make_sender(engine, writer)
        filing = Filing(home, store, writer, clock)
        in_flight = InFlight(config.max_in_flight)
        pipeline = Pipeline(
            home=home,
            config=config,
            classifier=classifier,
            store=store,
            writer=writer,
            filing=filing,
            finisher=Finisher(
                home=home,
                store=store,
                writer=writer,
                filing=filing,
                clock=clock,
                contract=contract,
            ),
            in_flight=in_flight,
            outages=self._outages,
            vitals=self._vitals,
            clock=clock,
            on_crash=self._on_crash,
        )
        watcher = Watcher(home.incoming, config.observer)
        watcher.start()
        intake = Intake(
            home=home,
            watcher=watcher,
            stability=self._stability(watcher),
            claimer=Claimer(
                home=home,
                store=store,
                writer=writer,
                filing=filing,
                outages=self._outages,
                clock=clock,
                model_id=model_id,
                max_attempts=config.max_attempts,
            ),
            in_flight=in_flight,
            outages=self._outages,
            vitals=self._vitals,
            clock=clock,
            rescan_s=config.rescan_s,
            min_free_mb=config.min_free_mb,
            stopped=self._stop,
            queued=lambda: self._queued(engine, model_id),
            submit=pipeline.submit,
        )
        self._intake = intake
        self._sender = sender
        # Before the threads: a port that cannot be had is a reason not to start.
        parts = [] if once else self._parts(engine, model_id, contract.id, in_flight, intake)
        writer.start()
        pipeline.start()
        try:
            for part in parts:
                part.start()
            event("ready", observer=watcher.kind, why=watcher.why, model=contract.id)
            notify("READY=1")
            if once:
                self._work_off(intake, in_flight, on_progress)
            else:
                self._serve(intake, watcher, pipeline, in_flight)
        except Abandoned:
            pass  # stopped while a trouble lasted: the next start goes on
        finally:
            self._say_stopping()
            for part in parts:
                part.stop()
            watcher.stop()
            self._wind_up(pipeline, writer)
        if self._crash:
            name, error = self._crash
            event("crashed", level=logging.ERROR, thread=name, error=describe(error))
            return 1
        event("stopped", ended=in_flight.ended, left=in_flight.count)
        has_left_some = intake.left_alone or in_flight.count or self._stop.is_set()
        return 1 if once and has_left_some else 0

    def _parts(
        self, engine: Engine, model_id: int, model: str, in_flight: InFlight, intake: Intake
    ) -> "list[Listener | Monitor]":
        """Make what runs beside the pipeline, where it is configured."""
        config = self._config
        parts: list[Listener | Monitor] = []
        if config.pacs_port:
            parts.append(make_listener(config, self._home, self._on_crash))
        if config.metrics_port or config.metrics_textfile:
            parts.append(self._make_monitor(engine, model_id, model, in_flight, intake))
        return parts

    def _wind_up(self, pipeline: Pipeline, writer: Writer) -> None:
        """End what is in hand, the writer last: the others need it."""
        crashed = self._crash is not None
        if self._sender is not None:
            self._sender.cancel()
        pipeline.stop(0 if crashed or self._outages.is_abandoned else self._config.drain_s)
        if self._sender is not None:
            self._sender.stop(0 if crashed else _SENDER_S)
        if not crashed:
            writer.stop()

    def _say_stopping(self) -> None:
        # The manager's patience is to outlast the drain, however long that is set.
        patience_us = round((self._config.drain_s + _SENDER_S + _STOP_SLACK_S) * 1e6)
        notify(f"STOPPING=1\nEXTEND_TIMEOUT_USEC={patience_us}\nSTATUS=finishing")

    def _serve(
        self, intake: Intake, watcher: Watcher, pipeline: Pipeline, in_flight: InFlight
    ) -> None:
        """Let the intake run on its own thread and see that everything lives."""
        thread = Worker("intake", intake.run, self._on_crash)
        thread.start()
        if self._sender is not None:
            self._sender.start()

        def status() -> str:
            counts = f"{in_flight.ended} ended, {in_flight.count} in hand, {intake.waiting} waiting"
            troubles = ", ".join(sorted(self._outages.current))
            return f"{counts}; held up: {troubles}" if troubles else counts

        watchdog = Watchdog(
            vitals=self._vitals,
            clock=self._clock,
            # The loss of the drop folder keeps no stage waiting.
            is_excused=lambda: bool(self._outages.current - {OutageKind.DROP_FOLDER}),
            dead=lambda: pipeline.dead + ([] if thread.is_alive() else [thread.name]),
            status=status,
        )
        try:
            while not self._stop.wait(watchdog.wait_s(_HEALTH_S)):
                watchdog.tick()
                if not watcher.is_alive:
                    self._on_crash("watcher", RuntimeError("the observer's thread ended"))
        finally:
            intake.stop()
            thread.join()

    def _work_off(self, intake: Intake, in_flight: InFlight, on_progress: Progress | None) -> None:
        """Scan on this thread until there is nothing left to take and nothing in flight."""
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
        if self._sender is not None:
            self._sender.recover()
            self._sender.work_off()

    def _make_sender(self, engine: Engine, writer: Writer) -> Sender | None:
        if not self._config.pacs_destinations:
            return None
        return Sender(
            config=self._config,
            home=self._home,
            engine=engine,
            writer=writer,
            outages=self._outages,
            clock=self._clock,
            on_crash=self._on_crash,
            vitals=self._vitals,
        )

    def _make_monitor(
        self, engine: Engine, model_id: int, model: str, in_flight: InFlight, intake: Intake
    ) -> "Monitor":
        from lungwatch.daemon.metrics import Metrics  # noqa: PLC0415 - loads its library
        from lungwatch.daemon.monitor import Monitor  # noqa: PLC0415

        config = self._config
        self._metrics = metrics = Metrics(
            engine=engine,
            model_id=model_id,
            model=model,
            home=self._home.root,
            vitals=self._vitals,
            in_flight=lambda: in_flight.count,
            waiting=lambda: intake.waiting,
            clock=self._clock,
        )
        return Monitor(
            metrics,
            self._problems,
            self._on_crash,
            port=config.metrics_port,
            textfile=config.metrics_textfile,
        )

    def _problems(self) -> list[str]:
        """Say what is wrong with the running daemon, without anything of a patient."""
        found = [f"stuck: {s.stage}" for s in self._vitals.stuck(self._clock.monotonic())]
        found += [f"held up: {trouble}" for trouble in sorted(self._outages.current)]
        if self._home.free_mb() < self._config.min_free_mb:
            found.append("less than min_free_mb free")
        return found

    def _on_finished(self, stage: str, seconds: float) -> None:
        if self._metrics is not None:
            self._metrics.observe(stage, seconds)

    def _queued(self, engine: Engine, model_id: int) -> list[tuple[Path, str]]:
        rows = queued(engine, _QUEUED_AT_ONCE, model_id)
        found = ((self._home.absolute(row.path), row.source_name) for row in rows if row.path)
        return [(path, name) for path, name in found if path.is_file()]

    def _stability(self, watcher: Watcher) -> Stability:
        chosen_s = _REMOTE_STABILITY_S if watcher.is_polling else _LOCAL_STABILITY_S
        return Stability(
            stability_s=self._config.stability_s or chosen_s,
            open_timeout_s=self._config.open_timeout_s,
        )

    def _check_space(self) -> None:
        free_mb = self._home.free_mb()
        if free_mb < self._config.min_free_mb:
            raise HomeError(
                f"only {free_mb} MiB are free in {self._home.root}, less than min_free_mb = "
                f"{self._config.min_free_mb}; make room or lower the limit"
            )

    def _on_crash(self, name: str, error: BaseException) -> None:
        """Note the first death of a thread; nothing limps on after it."""
        if self._crash is None:
            self._crash = (name, error)
        self._stop.set()
        self._outages.abandon()


def describe(error: BaseException) -> str:
    """Say what an unexpected error is, without the texts that may quote patients' data."""
    if isinstance(error, LungwatchError):
        return str(error)
    if isinstance(error, OSError):
        return error.strerror or type(error).__name__
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    where = ""
    if trace is not None:
        where = f" at {Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}"
    return type(error).__name__ + where
