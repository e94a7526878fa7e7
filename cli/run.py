"""Commands that process files: `run`, `retry`, `rescore`, `doctor`, `reconcile`."""

import logging
import os
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TypedDict, Unpack

import click

from lungwatch.cli.keeping import note, noting_failure
from lungwatch.cli.options import filter_options, home_options, json_option
from lungwatch.cli.output import cell_text, print_json, print_table
from lungwatch.errors import HomeError, LungwatchError

if TYPE_CHECKING:
    from click._termui_impl import ProgressBar

    from lungwatch.daemon.config import Config
    from lungwatch.daemon.home import Home
    from lungwatch.daemon.service import Service


_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


@click.command()
@home_options
@click.option("--once", is_flag=True, help="Process what is in the drop folder, then exit.")
def run(home: Path | None, config_path: Path | None, once: bool) -> None:
    """Screen every X-ray that is dropped into HOME/incoming.

    Research use only; not a medical device.
    """
    from lungwatch.daemon.configfile import load_config

    _leave(_run(load_config(config_path, home), once=once))


def run_to_end(config: "Config", *, rescores: bool) -> None:
    """Process what was asked for, with progress; a first signal ends it after what is in hand.

    Raises
    ------
    LungwatchError
        If the start is not possible.
    """
    status = _run(config, once=True, rescores=rescores)
    if status:
        _leave(status)


def _run(config: "Config", *, once: bool, rescores: bool = False) -> int:
    from lungwatch.daemon.logs import configure
    from lungwatch.daemon.service import Service

    has_bar = once and sys.stderr.isatty()
    configure(quiet=has_bar, log_format=config.log_format)
    service = Service(config, rescores=rescores)
    _stop_on_signal(service.stop)
    return _run_with_bar(service) if has_bar else service.run(once=once)


def _stop_on_signal(stop: Callable[[], None]) -> None:
    """Have a thread act on the signals: a handler may not touch locks, a thread may.

    The first signal drains what is in flight; the second ends at once, which loses nothing.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer)
    for number in _STOP_SIGNALS:
        signal.signal(number, lambda *_: None)  # the number is written to the pipe, no more

    def wait() -> None:
        os.read(reader, 1)
        stop()
        os._exit(128 + os.read(reader, 1)[0])

    threading.Thread(target=wait, name="signals", daemon=True).start()


def _leave(status: int) -> NoReturn:
    """End the process, without Python's own clean-up if a drain has left work behind.

    A thread that is inside onnxruntime when the interpreter goes would abort the process.
    """
    from lungwatch.daemon.stage import Worker

    if any(isinstance(thread, Worker) for thread in threading.enumerate()):
        logging.shutdown()
        sys.stdout.flush()
        os._exit(status)
    sys.exit(status)


def _run_with_bar(service: "Service") -> int:
    bar: ProgressBar[int]
    with click.progressbar(length=1, label="Screening", show_pos=True, file=sys.stderr) as bar:

        def show(ended: int, known: int) -> None:
            bar.length = max(known, 1)
            bar.update(ended - bar.pos)

        return service.run(once=True, on_progress=show)


@click.command()
@home_options
@click.argument("ids", nargs=-1, metavar="[ID_OR_HASH]...")
@click.option("--failed", is_flag=True, help="All that failed, through no fault of the file.")
def retry(home: Path | None, config_path: Path | None, ids: tuple[str, ...], failed: bool) -> None:
    """Put files through again that were rejected or have failed.

    They keep their place in quarantine until the daemon takes them up; without a running
    daemon, `lungwatch run --once` does.
    """
    from lungwatch.daemon.configfile import load_config
    from lungwatch.daemon.home import Home, check_database
    from lungwatch.db.audit import AuditEvent
    from lungwatch.db.maintenance import open_database
    from lungwatch.db.queries import ResultFilter, get_result, list_results
    from lungwatch.db.results import Store
    from lungwatch.errors import LungwatchError

    if bool(ids) == failed:
        raise click.UsageError("give either IDs or --failed")
    config = load_config(config_path, home)
    engine = open_database(config.database_url)
    try:
        check_database(Home(config.home), engine)
        if failed:
            rows = list_results(engine, ResultFilter(status="failed", limit=None))
        else:
            # Named twice, by number and hash perhaps, it is one result.
            rows = list({row.id: row for row in (get_result(engine, one) for one in ids)}.values())
        for row in rows:
            if row.status not in ("failed", "rejected"):
                raise LungwatchError(
                    f"result {row.id} is {row.status}; only failed and rejected ones can"
                )
            if row.file is None or not (config.home / row.file).is_file():
                raise LungwatchError(
                    f"the file of result {row.id} is no longer in quarantine; drop it again"
                )
        store = Store(engine)
        for row in rows:
            target = f"result {row.id}"
            with noting_failure(engine, "retry", [target]):
                store.request_retry(
                    result_id=row.id,
                    now=datetime.now(UTC),
                    deeds=[AuditEvent(action="retry", target=target)],
                )
    finally:
        engine.dispose()
    click.echo(f"{len(rows)} put forward to be tried again")


_ACTION = "rescore"


class Chosen(TypedDict):
    """What `filter_options` passes, less the model and the state."""

    since: datetime | None
    until: datetime | None
    made_since: datetime | None
    label: str | None
    flag: str | None
    min_score: float | None
    max_score: float | None
    patient: str | None
    accession: str | None
    study: str | None
    limit: int | None


@click.command()
@home_options
@click.option(
    "--model",
    "bundle",
    help="Bundle that scores, by name or path; the configured one if not given.",
)
@filter_options(without=("model", "status"))
@click.option("--no-send", is_flag=True, help="Send nothing of it to the PACS.")
@click.option("--dry-run", is_flag=True, help="Say how many there are, change nothing.")
@json_option
def rescore(
    *,
    home: Path | None,
    config_path: Path | None,
    bundle: str | None,
    no_send: bool,
    dry_run: bool,
    as_json: bool,
    **chosen: Unpack[Chosen],
) -> None:
    """Score the X-rays in HOME/done with another model, and keep the results that are there.

    Each gets a further row; `results list --made-since` finds them, `results compare` tells how
    the models differ. Without a running daemon the work is done here, and what is cut off goes on
    when the command is given again. A running daemon takes the requests up if its model is the
    one asked for.
    """
    from lungwatch.daemon.configfile import load_config
    from lungwatch.daemon.home import Home, check_database
    from lungwatch.daemon.pipeline.model import BundlePolicy, Classifier, find_bundle
    from lungwatch.db.audit import AuditEvent
    from lungwatch.db.maintenance import open_database
    from lungwatch.db.queries import ResultFilter
    from lungwatch.db.rescoring import count_unfinished, queue_rescoring, rescorable
    from lungwatch.db.results import Store

    config = load_config(config_path, home)
    place = Home(config.home)
    if not place.incoming.is_dir():
        raise HomeError(f"there is no lungwatch home at {place.root}; run `lungwatch run` first")
    folder = find_bundle(bundle or config.model, config.home)
    classifier = Classifier.load(folder, trust=BundlePolicy.of(config))
    contract = classifier.contract
    is_running = _is_locked(place)
    if no_send and is_running:
        raise LungwatchError("a daemon is running, which sends what it is configured to; stop it")
    engine = open_database(config.database_url)
    try:
        check_database(place, engine)
        now = datetime.now(UTC)
        model_id = Store(engine).register_model(
            name=contract.name,
            version=contract.version,
            sha256=classifier.sha256,
            contract_json=contract.to_json(),
            now=now,
        )
        images = rescorable(engine, ResultFilter(**chosen), model_id)
        count = len(images)
        if not dry_run:
            deed = AuditEvent(
                action=_ACTION, target=f"model {contract.id}", detail={"results": len(images)}
            )
            count = queue_rescoring(engine, images, model_id, now, deed)
        waiting = count_unfinished(engine, model_id)
        done_here = not (dry_run or is_running) and waiting > 0
        if done_here:
            _work(config, folder, sends=not no_send)
        left = count_unfinished(engine, model_id)
    finally:
        engine.dispose()
    if as_json:
        print_json(
            {
                "model": contract.id,
                "chosen": count,
                "made": waiting - left if done_here else 0,
                "left": left,
                "daemon_running": is_running,
                "dry_run": dry_run,
                "at": now,
            }
        )
    else:
        _say(contract.id, count, waiting, left, dry_run=dry_run, is_running=is_running)
    if done_here and left:
        raise LungwatchError(f"{left} are left; give the command again to go on")


def _is_locked(place: "Home") -> bool:
    try:
        with place.locked():
            return False
    except HomeError:
        return True


def _work(config: "Config", folder: Path, *, sends: bool) -> None:
    """Run the daemon's own pipeline over what was asked for, and over nothing else."""
    trial = config.replace(model=str(folder))
    if not sends:
        trial = trial.replace(pacs_destinations=())
    run_to_end(trial, rescores=True)


def _say(
    model: str, count: int, waiting: int, left: int, *, dry_run: bool, is_running: bool
) -> None:
    if dry_run:
        text = f"{count} X-rays in done/ have no result of {model}"
    elif is_running:
        text = (
            f"{count} queued for {model}; the running daemon takes them up if that is its model, "
            f"else stop it and give the command again ({left} waiting)"
        )
    else:
        text = f"{waiting - left} scored with {model}"
    click.echo(cell_text(text))


_MARKS = {True: ("ok", "green"), False: ("FAILED", "red"), None: ("-", "yellow")}


@click.command()
@home_options
@json_option
def doctor(home: Path | None, config_path: Path | None, as_json: bool) -> None:
    """Check configuration, folders, database, model and clock, and run a synthetic X-ray.

    Exits with 1 if a check fails. Research use only; not a medical device.
    """
    from lungwatch.daemon.checks import run_checks
    from lungwatch.daemon.configfile import load_config

    # The synthetic run would log its own events between the lines.
    logging.getLogger("lungwatch").addHandler(logging.NullHandler())
    logging.getLogger("lungwatch").propagate = False
    checks = []
    for check in run_checks(load_config(config_path, home)):
        checks.append(check)
        if not as_json:
            mark, colour = _MARKS[check.ok]
            told = cell_text(f"{check.name}: {check.detail}")
            click.echo(f"{click.style(f'{mark:>6}', fg=colour)}  {told}")
    if as_json:
        print_json([asdict(check) for check in checks])
    sys.exit(1 if any(check.ok is False for check in checks) else 0)


@click.command()
@home_options
@click.option("--dry-run", is_flag=True, help="List what differs, change nothing.")
@json_option
def reconcile(home: Path | None, config_path: Path | None, dry_run: bool, as_json: bool) -> None:
    """Prove, file by file, that folders and database agree; mend what does not.

    Every file in done/ and quarantine/ is hashed and compared with its row, every row with
    its file. While a daemon is running, nothing is changed. Exits with 1 if differences
    remain.
    """
    from lungwatch.daemon.configfile import load_config
    from lungwatch.daemon.home import Home, check_database
    from lungwatch.daemon.reconcile import Reconciler
    from lungwatch.db.maintenance import open_database
    from lungwatch.errors import HomeError

    config = load_config(config_path, home)
    place = Home(config.home)
    if not place.incoming.is_dir():
        raise HomeError(f"there is no lungwatch home at {place.root}; run `lungwatch run` first")
    with ExitStack() as stack:
        try:
            stack.enter_context(place.locked())
            is_running = False
        except HomeError:
            is_running = True
        engine = open_database(config.database_url)
        stack.callback(engine.dispose)
        check_database(place, engine)
        bar = stack.enter_context(
            click.progressbar(
                length=0, label="Hashing", file=sys.stderr, hidden=not sys.stderr.isatty()
            )
        )

        def count() -> None:
            bar.length = (bar.length or 0) + 1
            bar.update(1)

        mends = not dry_run and not is_running
        if mends:
            stack.enter_context(noting_failure(engine, "reconcile", ["home"]))
        report = Reconciler(place, engine, mend=mends, is_running=is_running, on_file=count).run()
        mended = sum(item.mended for item in report.differences)
        if mended:
            kinds = Counter(str(item.kind) for item in report.differences if item.mended)
            note(engine, "reconcile", targets=["home"], detail={"mended": mended, **kinds})

    if as_json:
        print_json({**asdict(report), "agrees": report.agrees, "daemon_running": is_running})
        sys.exit(0 if report.agrees else 1)
    if report.differences:
        print_table(
            ("difference", "result", "path", "mended", "remedy"),
            [
                (item.kind, item.result_id, item.path, "yes" if item.mended else "no", item.remedy)
                for item in report.differences
            ],
        )
    compared = (
        f"{report.results} results, {report.files} files and {report.overlays} overlays compared"
    )
    if is_running:
        compared += f"; a daemon is running, {report.in_flight} on their way"
    left = sum(not item.mended for item in report.differences)
    mended = len(report.differences) - left
    verdict = "folders and database agree" if report.agrees else f"{left} differences remain"
    click.echo(f"{compared}: {verdict}" + (f" ({mended} mended)" if mended else ""))
    sys.exit(0 if report.agrees else 1)
