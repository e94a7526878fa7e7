"""Assembly of the daemon's parts for one home and one model, and of its optional services."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Protocol

from sqlalchemy import Engine

from lungwatch.bundle import other_builds, read_calibration
from lungwatch.daemon.home import Home
from lungwatch.daemon.intake.claims import Claimer
from lungwatch.daemon.intake.intake import Intake
from lungwatch.daemon.intake.watch import Watcher
from lungwatch.daemon.logs import event
from lungwatch.daemon.monitor.drift import DriftWatch, examine_drift
from lungwatch.daemon.monitor.health import HealthCheck, Phase, Probes, free_mb_of
from lungwatch.daemon.pacs import make_listener
from lungwatch.daemon.pacs.commitment_scp import CommitmentScp
from lungwatch.daemon.pacs.outbox import Sender
from lungwatch.daemon.pipeline.filing import Filing
from lungwatch.daemon.pipeline.model import BundlePolicy, Classifier, ModelInUse, find_bundle
from lungwatch.daemon.pipeline.pipeline import Pipeline
from lungwatch.daemon.retention import disk_usage
from lungwatch.daemon.retry import TimeLimited
from lungwatch.daemon.stage import Context, Lane
from lungwatch.daemon.timekeeping import ClockWatch
from lungwatch.db.engine import open_engine
from lungwatch.db.queries import digest_at, is_known, queued
from lungwatch.db.statistics import health_counts, metric_counts

_QUEUED_AT_ONCE = 100
_BUSY_TIMEOUT_S = 1.0
_LIMIT_S = 3.0  # fewer than a scrape or a health check is given


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The parts that a service starts, watches and stops.

    Attributes
    ----------
    sender
        None without destinations.
    """

    watcher: Watcher
    intake: Intake
    pipeline: Pipeline
    sender: Sender | None
    clock_watch: ClockWatch


def load_model(context: Context) -> ModelInUse:
    """Load the configured model and enter it into the database.

    Raises
    ------
    LungwatchError
        If it cannot be found, is not trusted, or is not what it says, or the site's calibration
        of it is damaged or belongs to another file.
    """
    config, home = context.config, context.home
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
            detail="the model has no content gate: every file labelled as a chest is scored",
        )
    row = context.store.register_model(
        name=contract.name,
        version=contract.version,
        sha256=classifier.sha256,
        contract_json=contract.to_json(),
        now=context.clock.now(),
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


def assemble(context: Context, engine: Engine, model: ModelInUse, *, rescores: bool) -> Parts:
    """Make the parts; the drop folder is being watched when this returns.

    Parameters
    ----------
    rescores
        Whether only results that this model was asked for are made, and no drop is taken.

    Raises
    ------
    LungwatchError
        If the configuration names what cannot be used.
    """
    config, home = context.config, context.home
    sender = None
    if config.pacs_destinations:
        sender = Sender(
            config=config,
            home=home,
            engine=engine,
            writer=context.writer,
            outages=context.outages,
            clock=context.clock,
            on_crash=context.on_crash,
            progress=context.progress,
        )
    filing = Filing(context)
    pipeline = Pipeline(context, model, filing)
    watcher = Watcher(home.incoming, config.observer)
    watcher.start()
    intake = Intake(
        context,
        watcher,
        Claimer(
            context,
            filing,
            model_id=model.row,
            is_known=lambda sha256: is_known(engine, sha256),
            recorded_at=lambda path: digest_at(engine, path),
        ),
        queued=lambda: _queued(engine, home, model.row, own_only=rescores),
        submit=pipeline.submit,
        takes_drops=not rescores,
    )
    clock_watch = ClockWatch(
        engine,
        home,
        max_pause=timedelta(days=config.retain_max_pause_days),
        clock=context.clock,
        on_crash=context.on_crash,
    )
    return Parts(
        watcher=watcher,
        intake=intake,
        pipeline=pipeline,
        sender=sender,
        clock_watch=clock_watch,
    )


def _queued(engine: Engine, home: Home, model_id: int, *, own_only: bool) -> list[tuple[Path, str]]:
    rows = queued(engine, _QUEUED_AT_ONCE, model_id, own_only=own_only)
    found = ((home.absolute(row.path), row.source_name) for row in rows if row.path)
    return [(path, name) for path, name in found if path.is_file()]


class OptionalService(Protocol):
    """A part of the daemon, with threads of its own, that the pipeline does not need."""

    def start(self) -> None:
        """Start its threads."""

    def stop(self) -> None:
        """Stop its threads."""


def make_services(
    context: Context,
    engine: Engine,
    model: ModelInUse,
    parts: Parts,
    phase: Callable[[], Phase],
) -> tuple[OptionalService | None, OptionalService | None]:
    """Make the listener and the monitor, each None if not asked for.

    A port is taken here, not at `start`.

    Raises
    ------
    LungwatchError
        If a port cannot be bound or an extra is not installed.
    """
    config = context.config
    listener = monitor = None
    if config.pacs_port:
        listener = make_listener(
            config,
            context.home,
            context.on_crash,
            context.progress,
            CommitmentScp(
                config=config,
                home=context.home,
                engine=engine,
                writer=context.writer,
                outages=context.outages,
                clock=context.clock,
                progress=context.progress,
                on_crash=context.on_crash,
                reports=parts.sender.reports if parts.sender is not None else None,
            ),
        )
    if config.metrics_port or config.metrics_textfile:
        monitor = _make_monitor(context, model, parts, phase)
    return listener, monitor


def _lanes(context: Context, intake: Intake) -> dict[str, dict[str, int]]:
    waiting, in_hand = intake.waiting_by_lane, context.in_flight.by_lane
    return {lane.value: {"waiting": waiting[lane], "in_hand": in_hand[lane]} for lane in Lane}


def _make_monitor(
    context: Context, model: ModelInUse, parts: Parts, phase: Callable[[], Phase]
) -> OptionalService:
    from lungwatch.daemon.monitor.metrics import (  # noqa: PLC0415 - loads its library
        WINDOW,
        Metrics,
        Monitor,
    )

    config, home, intake = context.config, context.home, parts.intake
    progress, clock = context.progress, context.clock
    # Own connections: a check that hangs must not delay the pipeline.
    engine = open_engine(config.database_url, busy_timeout_s=_BUSY_TIMEOUT_S)
    read_signs = TimeLimited(partial(health_counts, engine, writable=True), limit_s=_LIMIT_S)
    health = HealthCheck(
        Probes(
            phase=phase,
            signs=read_signs,
            free_mb=TimeLimited(lambda: free_mb_of(home), limit_s=_LIMIT_S),
            waiting=lambda: intake.waiting,
            oldest_waiting=lambda: intake.oldest_waiting_at,
            left_alone=lambda: intake.unusable,
            skipped=lambda: intake.skipped.by_pattern,
            in_hand=lambda: context.in_flight.count,
            queues=lambda: {n: stage.waiting for n, stage in progress.snapshot().items()},
            lanes=lambda: _lanes(context, intake),
            clock=lambda: parts.clock_watch.doubts,
            outages=lambda: context.outages.current,
            stuck=lambda: {
                stage: round(seconds, 1)
                for stage, seconds in progress.stuck(clock.monotonic()).items()
            },
        ),
        model=model.id,
        min_free_mb=config.min_free_mb,
        clock=clock,
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
                clock,
            ),
            limit_s=_LIMIT_S,
        ),
        read_disks=TimeLimited(lambda: disk_usage(home, config.database_url), limit_s=_LIMIT_S),
        model=model.id,
        gate=config.gate if model.classifier.gate is not None else "none",
        progress=progress,
        clock=clock,
    )
    progress.on_finished = metrics.observe

    def close() -> None:
        metrics.close()
        engine.dispose()

    return Monitor(
        metrics,
        health,
        context.on_crash,
        on_stop=close,
        progress=progress,
        port=config.metrics_port,
        textfile=config.metrics_textfile,
    )
