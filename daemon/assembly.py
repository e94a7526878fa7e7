"""Assembly of the daemon's parts for one home and one model, with the optional services.

The PACS listener and the monitoring port.
"""

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

from sqlalchemy import Engine

from lungwatch.bundle import SiteCalibration, other_builds, read_calibration
from lungwatch.daemon.config import Config
from lungwatch.daemon.home import Home
from lungwatch.daemon.intake.claims import Claimer
from lungwatch.daemon.intake.eligibility import CompletenessCheck
from lungwatch.daemon.intake.intake import Intake
from lungwatch.daemon.intake.watch import Watcher
from lungwatch.daemon.logs import event
from lungwatch.daemon.monitor.drift import DriftWatch, examine_drift
from lungwatch.daemon.monitor.health import HealthCheck, Phase, Probes, disk_usage, free_mb_of
from lungwatch.daemon.pacs import make_listener
from lungwatch.daemon.pacs.outbox import Sender
from lungwatch.daemon.pipeline.filing import Filing
from lungwatch.daemon.pipeline.model import BundlePolicy, Classifier, find_bundle
from lungwatch.daemon.pipeline.pipeline import Pipeline
from lungwatch.daemon.pipeline.record import Recorder
from lungwatch.daemon.retry import Clock, Outages
from lungwatch.daemon.stage import DatabaseWriter, InFlight, Progress, TimeLimited
from lungwatch.db.engine import open_engine
from lungwatch.db.queries import is_known, queued
from lungwatch.db.results import Store
from lungwatch.db.statistics import health_counts, metric_counts

_LOCAL_STABILITY_S = 1.0

_REMOTE_STABILITY_S = 5.0

_QUEUED_AT_ONCE = 100


@dataclass(frozen=True, kw_only=True)
class Common:
    """What every part of one daemon shares.

    Attributes
    ----------
    stopped
        Set once nothing more is to be claimed.
    on_crash
        Called with the name of a thread that died, and with what killed it.
    phase
        Returns where the service is in its life.
    rescores
        Whether only what this model was asked to score anew is done, and no drop taken.
    """

    config: Config
    home: Home
    clock: Clock
    outages: Outages
    vitals: Progress
    stopped: threading.Event
    on_crash: Callable[[str, BaseException], None]
    phase: Callable[[], Phase]
    rescores: bool = False


@dataclass(frozen=True, kw_only=True)
class ModelInUse:
    """The model as the record knows it.

    Attributes
    ----------
    row
        Its row's number in the database.
    calibration
        The site's, which the classifier decides by; None if the bundle's own is in force.
    """

    classifier: Classifier
    row: int
    calibration: SiteCalibration | None = None

    @property
    def id(self) -> str:
        """Name and version, as people write it."""
        return self.classifier.contract.id


@dataclass(frozen=True, kw_only=True)
class Assembly:
    """The parts that a service starts, watches and stops.

    Attributes
    ----------
    sender
        None without a destination to send to.
    """

    watcher: Watcher
    intake: Intake
    in_flight: InFlight
    pipeline: Pipeline
    writer: DatabaseWriter
    sender: Sender | None


def load_model(config: Config, home: Home, store: Store, clock: Clock) -> ModelInUse:
    """Load the configured model and enter it into the record.

    Raises
    ------
    LungwatchError
        If it cannot be found, is not trusted, or is not what it says, or the site's calibration
        of it is damaged or belongs to another file.
    """
    classifier = Classifier.load(
        find_bundle(config.model, home.root),
        threads=config.inference_threads,
        trust=BundlePolicy.of(config),
    )
    contract = classifier.contract
    if classifier.gate is None:
        event(
            "not_gated",
            level=logging.WARNING,
            model=contract.id,
            detail="the model has no content gate: whatever the file says is a chest is scored",
        )
    row = store.register_model(
        name=contract.name,
        version=contract.version,
        sha256=classifier.sha256,
        contract_json=contract.to_json(),
        now=clock.now(),
    )
    site = read_calibration(home.calibrations, contract.id, classifier.sha256)
    if site is None:
        for path in other_builds(home.calibrations, contract.id, classifier.sha256):
            event(
                "calibration_not_used",
                level=logging.WARNING,
                model=contract.id,
                file=path.name,
                detail="it belongs to another file of this name and version",
            )
        return ModelInUse(classifier=classifier, row=row)
    event("calibrated", model=contract.id, calibration=site.id)
    return ModelInUse(classifier=classifier.calibrated(site), row=row, calibration=site)


def assemble(common: Common, engine: Engine, store: Store, model: ModelInUse) -> Assembly:
    """Make the parts; the drop folder is being watched when this returns.

    Raises
    ------
    LungwatchError
        If the configuration names what cannot be used.
    """
    config, home, clock = common.config, common.home, common.clock
    writer = DatabaseWriter(common.outages, common.on_crash, common.vitals)
    sender = _make_sender(common, engine, writer)
    filing = Filing(home, store, writer, clock)
    in_flight = InFlight(config.max_in_flight)
    pipeline = Pipeline(
        home=home,
        config=config,
        classifier=model.classifier,
        store=store,
        writer=writer,
        filing=filing,
        finisher=Recorder(
            home=home,
            store=store,
            writer=writer,
            filing=filing,
            clock=clock,
            contract=model.classifier.contract,
            calibration=None if model.calibration is None else model.calibration.id,
            drift=model.classifier.drift,
            side_by_side=config.overlay_side_by_side,
        ),
        in_flight=in_flight,
        outages=common.outages,
        vitals=common.vitals,
        clock=clock,
        on_crash=common.on_crash,
    )
    watcher = Watcher(home.incoming, config.observer)
    watcher.start()
    intake = Intake(
        home=home,
        watcher=watcher,
        stability=_stability(config, watcher),
        names=config.name_rules,
        claimer=Claimer(
            home=home,
            store=store,
            writer=writer,
            filing=filing,
            outages=common.outages,
            clock=clock,
            model_id=model.row,
            max_attempts=config.max_attempts,
            is_known=lambda sha256: is_known(engine, sha256),
        ),
        in_flight=in_flight,
        outages=common.outages,
        vitals=common.vitals,
        clock=clock,
        rescan_s=config.rescan_s,
        open_timeout_s=config.open_timeout_s,
        min_free_mb=config.min_free_mb,
        stopped=common.stopped,
        queued=lambda: _queued(engine, home, model.row, own_only=common.rescores),
        submit=pipeline.submit,
        takes_drops=not common.rescores,
    )
    return Assembly(
        watcher=watcher,
        intake=intake,
        in_flight=in_flight,
        pipeline=pipeline,
        writer=writer,
        sender=sender,
    )


def _make_sender(common: Common, engine: Engine, writer: DatabaseWriter) -> Sender | None:
    if not common.config.pacs_destinations:
        return None
    return Sender(
        config=common.config,
        home=common.home,
        engine=engine,
        writer=writer,
        outages=common.outages,
        clock=common.clock,
        on_crash=common.on_crash,
        vitals=common.vitals,
    )


def _stability(config: Config, watcher: Watcher) -> CompletenessCheck:
    chosen_s = _REMOTE_STABILITY_S if watcher.is_polling else _LOCAL_STABILITY_S
    return CompletenessCheck(
        stability_s=config.stability_s or chosen_s,
        open_timeout_s=config.open_timeout_s,
    )


def _queued(engine: Engine, home: Home, model_id: int, *, own_only: bool) -> list[tuple[Path, str]]:
    rows = queued(engine, _QUEUED_AT_ONCE, model_id, own_only=own_only)
    found = ((home.absolute(row.path), row.source_name) for row in rows if row.path)
    return [(path, name) for path, name in found if path.is_file()]


_BUSY_TIMEOUT_S = 1.0

_LIMIT_S = 3.0  # fewer than a scrape or a health check is given


class OptionalService(Protocol):
    """A part with threads of its own that the pipeline does without."""

    def start(self) -> None:
        """Begin."""

    def stop(self) -> None:
        """End, with its threads."""


def make_services(
    common: Common, model: ModelInUse, assembly: Assembly
) -> tuple[OptionalService | None, OptionalService | None]:
    """Make the listener and the monitor, each None if not asked for.

    A port is taken here, not at `start`.

    Raises
    ------
    LungwatchError
        If a port cannot be had or an extra is not installed.
    """
    config = common.config
    listener = None
    if config.pacs_port:
        listener = make_listener(config, common.home, common.on_crash, common.vitals)
    monitor = None
    if config.metrics_port or config.metrics_textfile:
        monitor = _make_monitor(common, model, assembly)
    return listener, monitor


def _make_monitor(common: Common, model: ModelInUse, assembly: Assembly) -> OptionalService:
    from lungwatch.daemon.monitor.metrics import (  # noqa: PLC0415 - loads its library
        WINDOW,
        Metrics,
        Monitor,
    )

    config, home, intake = common.config, common.home, assembly.intake
    # Connections of its own: the pipeline's must not wait for one that hangs.
    engine = open_engine(config.database_url, busy_timeout_s=_BUSY_TIMEOUT_S)
    read_signs = TimeLimited(partial(health_counts, engine, writable=True), limit_s=_LIMIT_S)
    health = HealthCheck(
        Probes(
            phase=common.phase,
            signs=read_signs,
            free_mb=TimeLimited(lambda: free_mb_of(home), limit_s=_LIMIT_S),
            waiting=lambda: intake.waiting,
            oldest_waiting=lambda: intake.waiting_files.oldest_at,
            left_alone=lambda: intake.left_alone,
            skipped=lambda: intake.skipped.by_pattern,
            in_hand=lambda: assembly.in_flight.count,
            queues=lambda: {n: stage.waiting for n, stage in common.vitals.snapshot().items()},
            outages=lambda: common.outages.current,
            stuck=lambda: {
                one.stage: round(one.seconds, 1)
                for one in common.vitals.stuck(common.clock.monotonic())
            },
        ),
        model=model.id,
        min_free_mb=config.min_free_mb,
        clock=common.clock,
    )
    metrics = Metrics(
        health=health,
        read_signs=read_signs,
        read_figures=TimeLimited(
            partial(metric_counts, engine, model.row, WINDOW), limit_s=_LIMIT_S
        ),
        read_drift=TimeLimited(
            DriftWatch(
                partial(
                    examine_drift,
                    engine,
                    model.classifier.sha256,
                    model.classifier.drift,
                    reference=config.drift_reference,
                    since=config.drift_since,
                ),
                common.clock,
            ),
            limit_s=_LIMIT_S,
        ),
        read_disks=TimeLimited(lambda: disk_usage(home, config.database_url), limit_s=_LIMIT_S),
        model=model.id,
        gate=config.gate if model.classifier.gate is not None else "none",
        vitals=common.vitals,
        clock=common.clock,
    )
    common.vitals.on_finished = metrics.observe

    def close() -> None:
        metrics.close()
        engine.dispose()

    return Monitor(
        metrics,
        health,
        common.on_crash,
        on_stop=close,
        vitals=common.vitals,
        port=config.metrics_port,
        textfile=config.metrics_textfile,
    )
