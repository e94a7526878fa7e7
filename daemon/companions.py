"""Optional services beside the pipeline: the PACS listener and the status port."""

from functools import partial
from typing import Protocol

from lungwatch.daemon.assembly import Assembly, Common, ModelInUse
from lungwatch.daemon.bounded import Bounded
from lungwatch.daemon.dicomnet import make_listener
from lungwatch.daemon.disks import disks
from lungwatch.daemon.health import HealthCheck, Probes, free_mb_of
from lungwatch.db.engine import open_engine
from lungwatch.db.monitoring import figures, signs

_BUSY_TIMEOUT_S = 1.0
_LIMIT_S = 3.0  # fewer than a scrape or a health check is given


class Companion(Protocol):
    """A part with threads of its own that the pipeline does without."""

    def start(self) -> None:
        """Begin."""

    def stop(self) -> None:
        """End, with its threads."""


def make_companions(
    common: Common, model: ModelInUse, assembly: Assembly
) -> tuple[Companion | None, Companion | None]:
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


def _make_monitor(common: Common, model: ModelInUse, assembly: Assembly) -> Companion:
    from lungwatch.daemon.metrics import WINDOW, Metrics  # noqa: PLC0415 - loads its library
    from lungwatch.daemon.monitor import Monitor  # noqa: PLC0415

    config, home, intake = common.config, common.home, assembly.intake
    # Connections of its own: the pipeline's must not wait for one that hangs.
    engine = open_engine(config.database_url, busy_timeout_s=_BUSY_TIMEOUT_S)
    read_signs = Bounded(partial(signs, engine, writable=True), limit_s=_LIMIT_S)
    health = HealthCheck(
        Probes(
            phase=common.phase,
            signs=read_signs,
            free_mb=Bounded(lambda: free_mb_of(home), limit_s=_LIMIT_S),
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
        read_figures=Bounded(partial(figures, engine, model.row, WINDOW), limit_s=_LIMIT_S),
        read_disks=Bounded(lambda: disks(home, config.database_url), limit_s=_LIMIT_S),
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
