"""The daemon as a whole: put together, started in order, watched, stopped."""

import logging
import signal
import threading
from collections.abc import Callable
from pathlib import Path

from sqlalchemy import Engine

from lungwatch.daemon.claiming import Claimer
from lungwatch.daemon.clock import Clock, SystemClock
from lungwatch.daemon.config import Config
from lungwatch.daemon.filing import Filing
from lungwatch.daemon.finishing import Finisher
from lungwatch.daemon.home import Home
from lungwatch.daemon.inflight import InFlight
from lungwatch.daemon.intake import Intake
from lungwatch.daemon.logs import event
from lungwatch.daemon.model import Classifier, find_bundle
from lungwatch.daemon.notify import notify
from lungwatch.daemon.pipeline import Pipeline
from lungwatch.daemon.recovery import recover
from lungwatch.daemon.stability import Stability
from lungwatch.daemon.watcher import Watcher
from lungwatch.daemon.worker import Worker
from lungwatch.daemon.writer import Writer
from lungwatch.db.migrate import open_database
from lungwatch.db.queries import queued
from lungwatch.db.store import Store
from lungwatch.errors import HomeError, LungwatchError

_LOCAL_STABILITY_S = 1.0
_REMOTE_STABILITY_S = 5.0
_HEALTH_S = 1.0
_QUEUED_AT_ONCE = 100

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
                return self._run(engine, once=once, on_progress=on_progress)
            finally:
                engine.dispose()

    def stop(self) -> None:
        """Stop claiming and end when what is in flight is done.

        For any thread, not for a signal handler: that could interrupt the very lock that an
        event takes, and wait for it for ever.
        """
        self._stop.set()
        if self._intake is not None:
            self._intake.stop()

    def _run(self, engine: Engine, *, once: bool, on_progress: Progress | None) -> int:
        config, home, clock = self._config, self._home, self._clock
        classifier = Classifier.load(
            find_bundle(config.model, home.root), threads=config.inference_threads
        )
        contract = classifier.contract
        store = Store(engine)
        model_id = store.register_model(
            name=contract.name,
            version=contract.version,
            sha256=classifier.sha256,
            contract_json=contract.to_json(),
            now=clock.now(),
        )
        recover(home, engine, store, clock)

        writer = Writer(self._on_crash)
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
                clock=clock,
                model_id=model_id,
                max_attempts=config.max_attempts,
            ),
            in_flight=in_flight,
            clock=clock,
            rescan_s=config.rescan_s,
            min_free_mb=config.min_free_mb,
            stopped=self._stop,
            queued=lambda: self._queued(engine, model_id),
            submit=pipeline.submit,
        )
        self._intake = intake
        writer.start()
        pipeline.start()
        try:
            event("ready", observer=watcher.kind, why=watcher.why, model=contract.id)
            notify("READY=1")
            if once:
                self._work_off(intake, in_flight, on_progress)
            else:
                self._serve(intake, watcher)
        finally:
            notify("STOPPING=1")
            watcher.stop()
            pipeline.stop(0 if self._crash else config.drain_s)
            if not self._crash:
                writer.stop()
        if self._crash:
            name, error = self._crash
            event("crashed", level=logging.ERROR, thread=name, error=describe(error))
            return 1
        event("stopped", ended=in_flight.ended, left=in_flight.count)
        has_left_some = intake.left_alone or in_flight.count or self._stop.is_set()
        return 1 if once and has_left_some else 0

    def _serve(self, intake: Intake, watcher: Watcher) -> None:
        """Let the intake run on its own thread and see that everything lives."""
        thread = Worker("intake", intake.run, self._on_crash)
        thread.start()
        try:
            while not self._stop.wait(_HEALTH_S):
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
                return
            if not had_work:
                in_flight.wait_empty(_HEALTH_S)
            else:
                self._stop.wait(0.1)

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
