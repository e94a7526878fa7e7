"""Checks of `lungwatch doctor`: everything that a run needs, tried for real."""

import importlib.util
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import cv2
from sqlalchemy import text

from lungwatch.bundle import other_builds, read_bundle, read_calibration
from lungwatch.daemon.config import Config, parse_destination
from lungwatch.daemon.home import Home
from lungwatch.daemon.intake.eligibility import NameRules
from lungwatch.daemon.intake.watch import Watcher
from lungwatch.daemon.monitor.drift import examine_drift
from lungwatch.daemon.pacs.scu import StorageScu, TlsFiles, UnreachableError
from lungwatch.daemon.pipeline.model import BundlePolicy, Classifier, find_bundle
from lungwatch.daemon.running import Holder, age_s, ask_health, backlog_of, holder_of, read_signs
from lungwatch.daemon.service import Service
from lungwatch.db.deliveries import DestinationStatus, destination_statuses
from lungwatch.db.engine import open_engine
from lungwatch.db.maintenance import check_current, open_database, open_existing
from lungwatch.db.queries import ResultFilter, list_results
from lungwatch.errors import (
    DatabaseError,
    HomeError,
    LungwatchError,
    NotFoundError,
    describe,
    describe_unexpected,
)
from lungwatch.preprocess import golden_pixels


@dataclass(frozen=True, kw_only=True)
class Check:
    """The outcome of one check.

    Attributes
    ----------
    ok
        None for a note that is neither good nor bad, such as an extra that is not installed.
    detail
        What was found and, if not ok, what to do.
    data
        The same for programs, where it is more than a sentence.
    """

    name: str
    ok: bool | None
    detail: str
    data: Mapping[str, object] | None = None


_HOUR_S = 3600.0

_DAY_S = 24 * _HOUR_S


@dataclass(frozen=True, kw_only=True)
class DestinationHealth:
    """What was found out about one destination.

    Attributes
    ----------
    ok
        It answers, and nothing failed for good.
    detail
        What was found and, if not ok, what to do.
    """

    destination: str
    ok: bool
    detail: str


def destination_health(config: Config, now: datetime) -> Iterator[DestinationHealth]:
    """Ask every configured destination for a sign of life, and count what waits for it.

    Raises
    ------
    MissingExtraError
        If what sending needs is not installed.
    """
    queues = {queue.destination: queue for queue in _queues(config)}
    user: StorageScu | None = None
    for written in config.pacs_destinations:
        user = user or StorageScu(config.pacs_ae_title, TlsFiles.of(config))
        try:
            user.echo(parse_destination(written))
            reached, found = True, "answers C-ECHO"
        except UnreachableError as error:
            reached, found = False, f"not reached ({error}); what waits is sent when it is"
        queue = queues.pop(written, None)
        ended = _ended(queue)
        yield DestinationHealth(
            destination=written,
            ok=reached and not ended,
            detail="; ".join(part for part in (found, _waiting(queue, now), ended) if part),
        )
    for queue in queues.values():
        if queue.queued:
            yield DestinationHealth(
                destination=queue.destination,
                ok=False,
                detail=f"{_waiting(queue, now)}, but it is no longer in 'pacs.destinations'",
            )


def _queues(config: Config) -> list[DestinationStatus]:
    try:
        engine = open_existing(config.database_url)
    except (NotFoundError, DatabaseError):  # none yet, or what the check of it tells
        return []
    try:
        return destination_statuses(engine)
    finally:
        engine.dispose()


def _waiting(queue: DestinationStatus | None, now: datetime) -> str:
    if queue is None or queue.oldest_at is None:
        return "nothing waits"
    return f"{queue.queued} objects wait, the oldest for {_age(now - queue.oldest_at)}"


def _ended(queue: DestinationStatus | None) -> str:
    if queue is None or not queue.failed + queue.invalid:
        return ""
    return (
        f"{queue.failed} were refused, {queue.invalid} were invalid: see `lungwatch pacs queue`, "
        "then `lungwatch pacs send --failed`"
    )


def _age(age: timedelta) -> str:
    seconds = max(0.0, age.total_seconds())
    if seconds >= _DAY_S:
        return f"{seconds / _DAY_S:.1f} days"
    if seconds >= _HOUR_S:
        return f"{seconds / _HOUR_S:.1f} h"
    return f"{seconds / 60:.0f} min"


def check_running(config: Config) -> Iterator[Check]:
    """Yield the daemon, its health, and the work that waits, each told within seconds."""
    home = Home(config.home)
    holder = holder_of(home)
    yield _daemon(holder)
    if holder is not None and config.metrics_port:
        yield _health(config.metrics_port)
    yield _drop_folder(home, config.name_rules)
    yield from _record(config)


def _daemon(holder: Holder | None) -> Check:
    if holder is None:
        return Check(name="daemon", ok=None, detail="no process holds the home")
    detail = f"process {holder.pid} holds the home, up for {holder.uptime_s:.0f} s"
    if holder.is_stopped:
        detail += "; a signal has stopped it: kill -CONT, or restart the service"
    return Check(name="daemon", ok=not holder.is_stopped, detail=detail, data=asdict(holder))


def _health(port: int) -> Check:
    try:
        found = ask_health(port)
    except OSError as error:
        why = str(error) or "it does not answer in time"
        return Check(name="health", ok=False, detail=f"port {port}: {error.strerror or why}")
    reasons: Any = found.get("reasons") or []
    said = "; ".join(str(reason.get("text")) for reason in reasons)
    status = str(found["status"])
    return Check(
        name="health",
        ok={"ok": True, "degraded": None}.get(status, False),
        detail=f"{status}: {said}" if said else status,
        data=found,
    )


def _drop_folder(home: Home, names: NameRules) -> Check:
    try:
        backlog = backlog_of(home, names, datetime.now(UTC))
    except OSError as error:
        return Check(name="waiting", ok=False, detail=error.strerror or "no answer in time")
    detail = f"{backlog.files} files in incoming/"
    if backlog.oldest_s is not None:
        detail += f", the oldest for {backlog.oldest_s:.0f} s"
    if backlog.skipped:
        parts = ", ".join(f"{count} {name}" for name, count in sorted(backlog.skipped.items()))
        detail += f"; {sum(backlog.skipped.values())} skipped for their names: {parts}"
    return Check(name="waiting", ok=None, detail=detail, data=asdict(backlog))


def _record(config: Config) -> Iterator[Check]:
    try:
        signs = read_signs(config)
    except TimeoutError:
        yield Check(name="last result", ok=False, detail="the database does not answer in time")
        return
    except LungwatchError as error:
        yield Check(name="last result", ok=None, detail=describe(error))
        return
    if signs is None:
        yield Check(name="last result", ok=None, detail="none yet")
        return
    last = signs.last_done.isoformat(timespec="seconds") if signs.last_done else None
    yield Check(
        name="last result",
        ok=None,
        detail=f"{last or 'none yet'}; {signs.queued} to be tried again",
        data={"last_done": last, "queued": signs.queued},
    )
    oldest_s = age_s(signs.oldest_delivery)
    detail = f"{signs.outbox_waiting} objects to be sent"
    if oldest_s is not None:
        detail += f", the oldest for {oldest_s:.0f} s"
    detail += f"; {signs.outbox_ended} refused or invalid"
    data = {
        "waiting": signs.outbox_waiting,
        "oldest_s": oldest_s,
        "refused_or_invalid": signs.outbox_ended,
    }
    yield Check(name="outbox", ok=None, detail=detail, data=data)


_MAX_CLOCK_DIFFERENCE_S = 5.0

_OPTIONAL = {
    "train": "tensorflow",
    "postgres": "psycopg",
    "pacs": "pynetdicom",
}


def run_checks(config: Config) -> Iterator[Check]:
    """Yield one outcome after the other; a failing check does not end the others.

    Parameters
    ----------
    config
        A configuration that could be read.
    """
    home = Home(config.home)
    yield _try("folders", lambda: _folders(home))
    yield _try("space", lambda: _space(home, config.min_free_mb))
    yield _try("watching", lambda: _watching(home, config))
    yield _try("database", lambda: _database(config.database_url))
    yield _trusted_keys(config)
    loaded: list[Classifier] = []
    yield _try("model", lambda: _model(config, home, loaded))
    yield from (_content_gate(config, classifier) for classifier in loaded)
    yield from (_calibration(home, classifier) for classifier in loaded)
    yield _try("clock", lambda: _clock(home))
    yield _try("synthetic X-ray", lambda: _synthetic(config, home))
    yield from (_drift(config, classifier) for classifier in loaded)
    yield from check_running(config)
    yield from _destinations(config)
    for extra, module in _OPTIONAL.items():
        installed = importlib.util.find_spec(module) is not None
        yield Check(
            name=f"extra '{extra}'",
            ok=True if installed else None,
            detail="installed"
            if installed
            else f"not installed (pip install 'lungwatch[{extra}]')",
        )


def _try(name: str, check: Callable[[], str]) -> Check:
    try:
        return Check(name=name, ok=True, detail=check())
    except LungwatchError as error:
        return Check(name=name, ok=False, detail=str(error))
    # A check-up reports whatever is wrong; it must not be what fails.
    except Exception as error:
        return Check(name=name, ok=False, detail=describe_unexpected(error))


def _folders(home: Home) -> str:
    home.prepare()
    return f"{home.root}: present, writable, on one file system"


def _space(home: Home, min_free_mb: int) -> str:
    free_mb = home.free_mb()
    if free_mb < min_free_mb:
        raise HomeError(f"{free_mb} MiB free, less than min_free_mb = {min_free_mb}; make room")
    return f"{free_mb} MiB free, the daemon pauses below {min_free_mb}"


def _watching(home: Home, config: Config) -> str:
    watcher = Watcher(home.incoming, config.observer)
    watcher.start()
    watcher.stop()
    return f"{watcher.kind} ({watcher.why})"


def _database(url: str) -> str:
    engine = open_engine(url)
    try:
        if engine.dialect.name == "sqlite":
            file = engine.url.database
            if not file or not Path(file).exists():
                return "no database yet; the first run creates it"
            with engine.connect() as connection:
                found = connection.execute(text("PRAGMA quick_check")).scalar_one()
            if found != "ok":
                raise LungwatchError(f"the database is damaged ({found}); restore the last backup")
        check_current(engine)
        return f"{engine.dialect.name}, schema up to date"
    finally:
        engine.dispose()


def _model(config: Config, home: Home, loaded: list[Classifier]) -> str:
    files = read_bundle(find_bundle(config.model, home.root))
    trust = BundlePolicy.of(config)
    classifier = Classifier.of(files, config.inference_threads, trust)
    loaded.append(classifier)
    return (
        f"{classifier.contract.id}: digest, contract and golden picture verified; "
        f"{trust.provenance(files).text}"
    )


def _content_gate(config: Config, classifier: Classifier) -> Check:
    """Say what looks at the pixels; that the gate answers as it should is the model's check."""
    name, gate = "content gate", classifier.contract.gate
    if gate is None:
        return Check(
            name=name,
            ok=None,
            detail="the model has none: whatever the file says is a chest is scored, with the flag "
            "'not_gated'; see docs/flags.md",
        )
    asked = ", ".join(f"{check.name} from {check.threshold:.2f}" for check in gate.checks)
    done = "refused" if config.gate == "refuse" else "scored and flagged"
    return Check(name=name, ok=True, detail=f"{asked}; what fails is {done}")


def _calibration(home: Home, classifier: Classifier) -> Check:
    name, contract = "calibration", classifier.contract
    try:
        site = read_calibration(home.calibrations, contract.id, classifier.sha256)
    except LungwatchError as error:
        return Check(name=name, ok=False, detail=str(error))
    if site is not None:
        return Check(name=name, ok=True, detail=site.text)
    others = other_builds(home.calibrations, contract.id, classifier.sha256)
    detail = f"the bundle's own, threshold {contract.decision.threshold:.3f}"
    if others:
        detail += f"; {others[0].name} belongs to another file of this name and is not used"
    return Check(name=name, ok=None, detail=f"{detail}; `lungwatch calibrate` makes the site's own")


def _drift(config: Config, classifier: Classifier) -> Check:
    """Warn of drift; it is no fault of the installation, so that it fails nothing."""
    name = "drift"
    try:
        engine = open_existing(config.database_url)
    except LungwatchError:
        return Check(
            name=name, ok=None, detail="not told yet: there is no database that can be read"
        )
    try:
        found = examine_drift(
            engine,
            classifier.sha256,
            classifier.drift,
            reference=config.drift_reference,
            since=config.drift_since,
        )
    except LungwatchError as error:
        return Check(name=name, ok=False, detail=str(error))
    finally:
        engine.dispose()
    told = not found.waiting_for and not found.alarms
    return Check(name=name, ok=True if told else None, detail=found.summary())


def _trusted_keys(config: Config) -> Check:
    name = "trusted keys"
    if not config.trusted_keys:
        return Check(
            name=name,
            ok=None,
            detail="'trusted_keys' is not set: any bundle is run, whoever made it; "
            "see docs/security.md",
        )
    return _try(name, lambda: f"{len(BundlePolicy.of(config).keys or {})} in {config.trusted_keys}")


def _clock(home: Home) -> str:
    # The folder may be a server's with a clock of its own, and ages are compared with ours.
    with tempfile.NamedTemporaryFile(dir=home.outbox) as file:
        difference_s = abs(Path(file.name).stat().st_mtime - time.time())
    if difference_s > _MAX_CLOCK_DIFFERENCE_S:
        raise HomeError(
            f"the file system's clock differs from this machine's by {difference_s:.0f} s; "
            "synchronise both"
        )
    return f"the file system's clock agrees within {max(difference_s, 0.1):.1f} s"


def _destinations(config: Config) -> Iterator[Check]:
    try:
        for standing in destination_health(config, datetime.now(UTC)):
            yield Check(name=f"PACS {standing.destination}", ok=standing.ok, detail=standing.detail)
    except LungwatchError as error:
        yield Check(name="PACS", ok=False, detail=str(error))


def _synthetic(config: Config, home: Home) -> str:
    """Send the golden picture through the whole daemon, in a home of its own."""
    with tempfile.TemporaryDirectory(prefix="lungwatch-doctor-") as folder:
        root = Path(folder)
        bundle = find_bundle(config.model, home.root)
        trial = config.replace(
            home=root,
            database_url=f"sqlite:///{root / 'lungwatch.db'}",
            model=str(bundle),
            min_free_mb=0,
            # The picture is a caricature, which a gate may well know from an X-ray.
            gate="flag",
            pacs_destinations=(),
        )
        (root / "incoming").mkdir()
        picture = (golden_pixels() * 255).round().astype("uint8")
        cv2.imwrite(str(root / "incoming" / "golden.png"), picture)
        Service(trial).run(once=True)
        engine = open_database(trial.database_url)
        try:
            (row,) = list_results(engine, ResultFilter())
        finally:
            engine.dispose()
        if row.status != "done" or row.overlay is None or not (root / row.overlay).is_file():
            raise LungwatchError(f"it ended as {row.status} ({row.reason or 'no overlay'})")
        return f"scored, overlaid and filed in {row.duration_ms} ms"
