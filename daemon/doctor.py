"""Inspections of `lungwatch doctor`: everything that a run needs, tried for real."""

import importlib.util
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import cv2
from sqlalchemy import text

from lungwatch.bundle import other_builds, read_bundle, read_calibration
from lungwatch.daemon.config import Config, parse_destination
from lungwatch.daemon.home import Home, age_s, ask_health, backlog_of, holder_of, read_health_counts
from lungwatch.daemon.intake.watch import Watcher
from lungwatch.daemon.monitor.drift import examine_drift
from lungwatch.daemon.pacs.scu import StorageScu, UnreachableError
from lungwatch.daemon.pipeline import confinement
from lungwatch.daemon.pipeline.model import BundlePolicy, Classifier, find_bundle
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
)
from lungwatch.preprocess import golden_pixels

_MAX_CLOCK_DIFFERENCE_S = 5.0
_HOUR_S = 3600.0
_DAY_S = 24 * _HOUR_S
_EXTRAS = {"train": "tensorflow", "postgres": "psycopg", "pacs": "pynetdicom"}


@dataclass(frozen=True, kw_only=True)
class CheckOutcome:
    """Outcome of one check.

    Attributes
    ----------
    name
        In `/health` the code of the reason, which does not change between versions.
    ok
        False for a failure, which in `/health` means that new files are not being screened. None
        for a note, such as an extra that is not installed, which in `/health` means that somebody
        should look.
    detail
        What was found and, if not ok, what to do.
    data
        The same for programs, where it is more than a sentence.
    """

    name: str
    ok: bool | None
    detail: str
    data: Mapping[str, object] | None = None


class Installation:
    """A configured home, as the start and `lungwatch doctor` examine it from outside.

    Attributes
    ----------
    classifier
        The model, once the check of it has loaded it.
    process
        Processes what lies in the drop folder of a configuration; None leaves the trial out. Passed
        in, because the service itself runs the checks of the start.
    """

    def __init__(self, config: Config, process: Callable[[Config], object] | None = None) -> None:
        self.config = config
        self.process = process
        self.home = Home(config.home)
        self.classifier: Classifier | None = None


def inspect_folders(installation: Installation) -> str | Iterator[CheckOutcome]:
    """Look at the folders; the start makes those that are missing."""
    home = installation.home
    if not home.root.is_dir():
        if not os.access(_existing(home.root), os.W_OK | os.X_OK):
            raise HomeError(f"cannot create {home.root}; create it, or give this user the right to")
        detail = f"there is no {home.root} yet; the first start makes it"
        return iter((CheckOutcome(name="folders", ok=None, detail=detail),))
    missing = home.check_folders()
    if missing and not os.access(home.root, os.W_OK | os.X_OK):
        raise HomeError(f"cannot create {missing[0]}; create it, or give this user the right to")
    names = ", ".join(folder.name for folder in missing)
    later = f"; the next start makes {names}" if missing else ""
    return f"{home.root}: present, writable, on one file system{later}"


def _existing(path: Path) -> Path:
    """Return a path, or the nearest folder above it that exists."""
    return path if path.exists() else _existing(path.parent)


def inspect_access(installation: Installation) -> str | Iterator[CheckOutcome]:
    """Look for what others may read."""
    found = installation.home.open_paths()
    if found and not installation.home.work.exists():
        detail = "others may read the home; the first start closes it"
        return iter((CheckOutcome(name="access", ok=None, detail=detail),))
    if found:
        names = ", ".join(str(path) for path in found)
        raise HomeError(f"others may read or write {names}: run `{'; '.join(found.values())}`")
    return "closed to all but its user; droppers may add files alone"


def space_problem(free_mb: int, min_free_mb: int) -> str:
    """Say that too little disk space is free; empty if there is enough."""
    if free_mb >= min_free_mb:
        return ""
    return f"{free_mb} MiB free, less than min_free_mb = {min_free_mb}"


def inspect_space(installation: Installation) -> str:
    """Compare the free space with the limit."""
    home, min_free_mb = installation.home, installation.config.min_free_mb
    free_mb = Home(_existing(home.root)).free_mb()
    if problem := space_problem(free_mb, min_free_mb):
        raise HomeError(f"{problem} in {home.root}: make room or lower the limit")
    return f"{free_mb} MiB free, the daemon pauses below {min_free_mb}"


def inspect_watching(installation: Installation) -> str | Iterator[CheckOutcome]:
    """Start and stop an observer."""
    if not installation.home.incoming.is_dir():
        return iter((CheckOutcome(name="watching", ok=None, detail="no drop folder yet"),))
    watcher = Watcher(installation.home.incoming, installation.config.observer)
    watcher.start()
    watcher.stop()
    return f"{watcher.kind} ({watcher.why})"


def inspect_sandbox(installation: Installation) -> str | Iterator[CheckOutcome]:
    """Confine a process as a decoding process is."""
    found = confinement.probe()
    if installation.config.require_sandbox:
        confinement.check_required(found)
    detail = confinement.described(found)
    if found.missing:
        return iter((CheckOutcome(name="sandbox", ok=None, detail=detail),))
    return detail


def inspect_database(installation: Installation) -> str:
    """Check integrity and schema."""
    engine = open_engine(installation.config.database_url, keeps_journal=True)
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


def inspect_trusted_keys(installation: Installation) -> Iterator[CheckOutcome]:
    """Read the trusted keys."""
    config = installation.config
    if config.trusted_keys:
        detail = f"{len(BundlePolicy.of(config).keys or {})} in {config.trusted_keys}"
    else:
        detail = (
            "'trusted_keys' is not set: any bundle is run, whoever made it; see docs/security.md"
        )
    yield CheckOutcome(name="trusted keys", ok=True if config.trusted_keys else None, detail=detail)


def inspect_model(installation: Installation) -> str:
    """Load the model, and keep it for the checks that follow."""
    config = installation.config
    files = read_bundle(find_bundle(config.model, installation.home.root))
    policy = BundlePolicy.of(config)
    classifier = Classifier.of(files, config.inference_threads, policy)
    installation.classifier = classifier
    return (
        f"{classifier.contract.id}: digest, contract and golden picture verified; "
        f"{policy.provenance(files).text}"
    )


def inspect_gate(installation: Installation) -> Iterator[CheckOutcome]:
    """Say what is checked in the pixels; the model's check proves that the gate answers right."""
    if installation.classifier is None:
        return
    gate = installation.classifier.contract.gate
    if gate is None:
        detail = (
            "the model has none: whatever the file says is a chest is scored, with the flag "
            "'not_gated'; see docs/flags.md"
        )
    else:
        asked = ", ".join(f"{check.name} from {check.threshold:.2f}" for check in gate.checks)
        done = "refused" if installation.config.gate == "refuse" else "scored and flagged"
        detail = f"{asked}; what fails is {done}"
    yield CheckOutcome(name="content gate", ok=None if gate is None else True, detail=detail)


def inspect_calibration(installation: Installation) -> Iterator[CheckOutcome]:
    """Read the site's calibration."""
    classifier, folder = installation.classifier, installation.home.calibrations
    if classifier is None:
        return
    contract = classifier.contract
    site = read_calibration(folder, contract.id, classifier.sha256)
    if site is not None:
        yield CheckOutcome(name="calibration", ok=True, detail=site.text)
        return
    others = other_builds(folder, contract.id, classifier.sha256)
    detail = f"the bundle's own, threshold {contract.decision.threshold:.3f}"
    if others:
        detail += f"; {others[0].name} belongs to another file of this name and is not used"
    detail += "; `lungwatch calibrate` makes the site's own"
    yield CheckOutcome(name="calibration", ok=None, detail=detail)


def inspect_clock(installation: Installation) -> str | Iterator[CheckOutcome]:
    """Compare the clock of the file system with this machine's."""
    if not installation.home.outbox.is_dir():
        detail = "not told yet: the first start makes the folders"
        return iter((CheckOutcome(name="clock", ok=None, detail=detail),))
    # The folder may be a server's with a clock of its own, and ages are compared with ours.
    # A file without a name (O_TMPFILE): nothing appears in the folder.
    with tempfile.TemporaryFile(dir=installation.home.outbox) as file:
        difference_s = abs(os.fstat(file.fileno()).st_mtime - time.time())
    if difference_s > _MAX_CLOCK_DIFFERENCE_S:
        raise HomeError(
            f"the file system's clock differs from this machine's by {difference_s:.0f} s; "
            "synchronise both"
        )
    return f"the file system's clock agrees within {max(difference_s, 0.1):.1f} s"


def inspect_trial(installation: Installation) -> str | Iterator[CheckOutcome]:
    """Send the golden picture through the whole daemon, in a home of its own."""
    if installation.process is None:
        return iter(())
    with tempfile.TemporaryDirectory(prefix="lungwatch-doctor-") as folder:
        root = Path(folder)
        trial = installation.config.replace(
            home=root,
            database_url=f"sqlite:///{root / 'lungwatch.db'}",
            model=str(find_bundle(installation.config.model, installation.home.root)),
            min_free_mb=0,
            gate="flag",  # the golden picture is synthetic, and a gate may refuse it
            pacs_destinations=(),
        )
        (root / "incoming").mkdir()
        picture = (golden_pixels() * 255).round().astype("uint8")
        cv2.imwrite(str(root / "incoming" / "golden.png"), picture)
        installation.process(trial)
        engine = open_database(trial.database_url)
        try:
            (row,) = list_results(engine, ResultFilter())
        finally:
            engine.dispose()
        if row.status != "done" or row.overlay is None or not (root / row.overlay).is_file():
            raise LungwatchError(f"it ended as {row.status} ({row.reason or 'no overlay'})")
        return f"scored, overlaid and filed in {row.duration_ms} ms"


def inspect_drift(installation: Installation) -> Iterator[CheckOutcome]:
    """Warn of drift, which is no fault of the installation and fails nothing."""
    config, classifier = installation.config, installation.classifier
    if classifier is None:
        return
    try:
        engine = open_existing(config.database_url)
    except LungwatchError:
        detail = "not told yet: there is no database that can be read"
        yield CheckOutcome(name="drift", ok=None, detail=detail)
        return
    try:
        found = examine_drift(
            engine,
            classifier.sha256,
            classifier.drift,
            reference=config.drift_reference,
            since=config.drift_since,
        )
    finally:
        engine.dispose()
    is_good = not found.waiting_for and not found.alarms
    yield CheckOutcome(name="drift", ok=True if is_good else None, detail=found.summary())


def inspect_daemon(installation: Installation) -> Iterator[CheckOutcome]:
    """Find the process that holds the home."""
    holder = holder_of(installation.home)
    if holder is None:
        yield CheckOutcome(name="daemon", ok=None, detail="no process holds the home")
        return
    detail = f"process {holder.pid} holds the home, up for {holder.uptime_s:.0f} s"
    if holder.is_stopped:
        detail += "; a signal has stopped it: kill -CONT, or restart the service"
    yield CheckOutcome(name="daemon", ok=not holder.is_stopped, detail=detail, data=asdict(holder))


def inspect_health(installation: Installation) -> Iterator[CheckOutcome]:
    """Ask the status port."""
    port = installation.config.metrics_port
    if not port or holder_of(installation.home) is None:
        return
    try:
        found = ask_health(port)
    except OSError as error:
        why = error.strerror or str(error) or "it does not answer in time"
        yield CheckOutcome(name="health", ok=False, detail=f"port {port}: {why}")
        return
    reasons: Any = found.get("reasons") or []
    said = "; ".join(str(reason.get("text")) for reason in reasons)
    status = str(found["status"])
    yield CheckOutcome(
        name="health",
        ok={"ok": True, "degraded": None}.get(status, False),
        detail=f"{status}: {said}" if said else status,
        data=found,
    )


def inspect_waiting(installation: Installation) -> Iterator[CheckOutcome]:
    """Count the files in the drop folder."""
    try:
        found = backlog_of(installation.home, installation.config.name_rules, datetime.now(UTC))
    except OSError as error:
        yield CheckOutcome(name="waiting", ok=False, detail=error.strerror or "no answer in time")
        return
    detail = f"{found.files} files in incoming/"
    if found.oldest_s is not None:
        detail += f", the oldest for {found.oldest_s:.0f} s"
    if found.skipped:
        parts = ", ".join(f"{count} {name}" for name, count in sorted(found.skipped.items()))
        detail += f"; {sum(found.skipped.values())} skipped for their names: {parts}"
    yield CheckOutcome(name="waiting", ok=None, detail=detail, data=asdict(found))


def inspect_results(installation: Installation) -> Iterator[CheckOutcome]:
    """Count what the database and the outbox hold."""
    try:
        counts = read_health_counts(installation.config)
    except TimeoutError:
        detail = "the database does not answer in time"
        yield CheckOutcome(name="last result", ok=False, detail=detail)
        return
    except LungwatchError as error:
        yield CheckOutcome(name="last result", ok=None, detail=describe(error))
        return
    if counts is None:
        yield CheckOutcome(name="last result", ok=None, detail="none yet")
        return
    last = counts.last_done.isoformat(timespec="seconds") if counts.last_done else None
    yield CheckOutcome(
        name="last result",
        ok=None,
        detail=f"{last or 'none yet'}; {counts.queued} to be tried again",
        data={"last_done": last, "queued": counts.queued},
    )
    oldest_s = age_s(counts.oldest_delivery)
    age = "" if oldest_s is None else f", the oldest for {oldest_s:.0f} s"
    yield CheckOutcome(
        name="outbox",
        ok=None,
        detail=f"{counts.outbox_waiting} objects to be sent{age}; "
        f"{counts.outbox_ended} refused or invalid",
        data={
            "waiting": counts.outbox_waiting,
            "oldest_s": oldest_s,
            "refused_or_invalid": counts.outbox_ended,
        },
    )


def inspect_destinations(installation: Installation) -> Iterator[CheckOutcome]:
    """Ask every destination for a sign of life (C-ECHO), and count what waits for it."""
    config = installation.config
    queues = {queue.destination: queue for queue in _queues(config.database_url)}
    scu: StorageScu | None = None
    for name in config.pacs_destinations:
        scu = scu or StorageScu(config)
        try:
            scu.echo(parse_destination(name))
            is_reached, found = True, "answers C-ECHO"
        except UnreachableError as error:
            is_reached, found = False, f"not reached ({error}); what waits is sent when it is"
        queue = queues.pop(name, None)
        parts = [found, _describe_waiting(queue)]
        if has_failed := queue is not None and queue.failed + queue.invalid > 0:
            parts.append(
                f"{queue.failed} were refused, {queue.invalid} were invalid: see `lungwatch pacs "
                "queue`, then `lungwatch pacs send --failed`"
            )
        is_good = is_reached and not has_failed
        yield CheckOutcome(name=f"PACS {name}", ok=is_good, detail="; ".join(parts))
    for queue in queues.values():
        if queue.queued:
            detail = f"{_describe_waiting(queue)}, but it is no longer in 'pacs.destinations'"
            yield CheckOutcome(name=f"PACS {queue.destination}", ok=False, detail=detail)


def _queues(database_url: str) -> list[DestinationStatus]:
    try:
        engine = open_existing(database_url)
    except (NotFoundError, DatabaseError):  # none yet, or what the check of it tells
        return []
    try:
        return destination_statuses(engine)
    finally:
        engine.dispose()


def _describe_waiting(queue: DestinationStatus | None) -> str:
    if queue is None or queue.oldest_at is None:
        return "nothing waits"
    seconds = max(0.0, (datetime.now(UTC) - queue.oldest_at).total_seconds())
    if seconds >= _DAY_S:
        age = f"{seconds / _DAY_S:.1f} days"
    elif seconds >= _HOUR_S:
        age = f"{seconds / _HOUR_S:.1f} h"
    else:
        age = f"{seconds / 60:.0f} min"
    return f"{queue.queued} objects wait, the oldest for {age}"


def inspect_extras(installation: Installation) -> Iterator[CheckOutcome]:
    """Look for the libraries of each extra."""
    del installation
    for extra, module in _EXTRAS.items():
        if importlib.util.find_spec(module) is not None:
            yield CheckOutcome(name=f"extra '{extra}'", ok=True, detail="installed")
        else:
            detail = f"not installed (pip install 'lungwatch[{extra}]')"
            yield CheckOutcome(name=f"extra '{extra}'", ok=None, detail=detail)
