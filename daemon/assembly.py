"""The daemon's parts, put together for one home and one model; nothing is started here."""

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Engine

from lungwatch.daemon.claiming import Claimer
from lungwatch.daemon.clock import Clock
from lungwatch.daemon.config import Config
from lungwatch.daemon.filing import Filing
from lungwatch.daemon.finishing import Finisher
from lungwatch.daemon.health import Phase
from lungwatch.daemon.home import Home
from lungwatch.daemon.inflight import InFlight
from lungwatch.daemon.intake import Intake
from lungwatch.daemon.logs import event
from lungwatch.daemon.model import Classifier, find_bundle
from lungwatch.daemon.outage import Outages
from lungwatch.daemon.outbox.sender import Sender
from lungwatch.daemon.pipeline import Pipeline
from lungwatch.daemon.stability import Stability
from lungwatch.daemon.trust import Trust
from lungwatch.daemon.vitals import Vitals
from lungwatch.daemon.watcher import Watcher
from lungwatch.daemon.writer import Writer
from lungwatch.db.queries import is_known, queued
from lungwatch.db.store import Store
from lungwatch.sitecalibration import SiteCalibration, other_builds, read_calibration

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
    vitals: Vitals
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
    writer: Writer
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
        trust=Trust.of(config),
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
    writer = Writer(common.outages, common.on_crash, common.vitals)
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
        finisher=Finisher(
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


def _make_sender(common: Common, engine: Engine, writer: Writer) -> Sender | None:
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


def _stability(config: Config, watcher: Watcher) -> Stability:
    chosen_s = _REMOTE_STABILITY_S if watcher.is_polling else _LOCAL_STABILITY_S
    return Stability(
        stability_s=config.stability_s or chosen_s,
        open_timeout_s=config.open_timeout_s,
    )


def _queued(engine: Engine, home: Home, model_id: int, *, own_only: bool) -> list[tuple[Path, str]]:
    rows = queued(engine, _QUEUED_AT_ONCE, model_id, own_only=own_only)
    found = ((home.absolute(row.path), row.source_name) for row in rows if row.path)
    return [(path, name) for path, name in found if path.is_file()]
