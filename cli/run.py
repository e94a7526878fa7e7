"""Commands that process files: `run`, `retry`, `rescore`, `doctor`, `reconcile`."""

import contextlib
import logging
import os
import queue
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import click

from lungwatch.cli.main import Site, auditing_failure, home_options, record_event
from lungwatch.cli.options import filter_options, json_option
from lungwatch.cli.output import ProgressBar, cell_text, print_json, print_table
from lungwatch.errors import LungwatchError, describe_unexpected

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from lungwatch.daemon.config import Config
    from lungwatch.daemon.reconcile import Reconciliation
    from lungwatch.db.queries import ResultFilter, ResultRow

_STOP_SIGNALS: tuple[signal.Signals, ...] = (signal.SIGTERM, signal.SIGINT)


@click.command()
@home_options
@click.option("--once", is_flag=True, help="Process the files in the drop folder, then exit.")
@click.option(
    "--new-database",
    is_flag=True,
    help="Make a missing database although the home has been worked in.",
)
def run(site: Site, *, once: bool, new_database: bool) -> None:
    """Screen every X-ray that is dropped into HOME/incoming.

    Research use only; not a medical device.
    """
    if not once:
        # Until they have their meaning, they must not kill a daemon that starts.
        for number in _requests():
            signal.signal(number, signal.SIG_IGN)
    _exit(_run(site.config, once=once, new_database=new_database, reload=site.reload_config))


def _run(
    config: "Config",
    *,
    once: bool,
    rescores: bool = False,
    new_database: bool = False,
    reload: "Callable[[], Config] | None" = None,
) -> int:
    """Run the daemon and return its exit status; with `once`, show progress on a terminal."""
    from lungwatch.daemon import logs
    from lungwatch.daemon.service import Service

    # What the daemon writes is its user's alone, whatever the shell or the unit says.
    os.umask(0o077)
    with contextlib.ExitStack() as stack:
        bar = None
        if once and sys.stderr.isatty():
            bar = stack.enter_context(ProgressBar("screening"))
        # After the bar has taken over stderr, so that warnings are printed above it.
        logs.configure(quiet=bar is not None, log_format=config.log_format, queued=bar is None)
        service = Service(config, rescores=rescores, new_database=new_database)
        actions: dict[int, Callable[[], None]] = {}
        if reload is not None and not once:
            requests: dict[int, Callable[[], None]] = {
                signal.SIGHUP: lambda: service.reload(reload),
                signal.SIGUSR1: service.log_status,
                signal.SIGUSR2: service.rescan,
            }
            actions = {number: requests[number] for number in _requests()}
        _act_on_signals(service.stop, actions)
        try:
            return service.run(once=once, on_progress=bar.update if bar else None)
        except BaseException:
            # The message would wait for a reader that has stalled.
            if not logs.flush():
                os._exit(1)
            raise


def _requests() -> tuple[signal.Signals, ...]:
    """Return the signals that ask for something; SIGHUP ends a daemon on a terminal."""
    if os.isatty(0):
        return (signal.SIGUSR1, signal.SIGUSR2)
    return (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def _act_on_signals(stop: Callable[[], None], actions: Mapping[int, Callable[[], None]]) -> None:
    """Act on signals in threads, which may take locks; a signal handler may not.

    The first signal to stop completes the files in flight; the second ends the process at once.
    Neither loses anything. Other actions have a thread of their own, so that one that takes long
    does not hold a stop up.
    """
    from lungwatch.daemon.logs import event, flush

    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    stops = _STOP_SIGNALS
    if actions and signal.SIGHUP not in actions:
        stops = (*_STOP_SIGNALS, signal.SIGHUP)
    for number in (*stops, *actions):
        signal.signal(number, lambda *_: None)  # Python writes the number to the pipe
    asked: queue.SimpleQueue[int] = queue.SimpleQueue()

    def wait() -> None:
        is_stopping = False
        while True:
            number = os.read(reader, 1)[0]
            if number not in stops:
                asked.put(number)
            elif is_stopping:
                flush()
                os._exit(128 + number)
            else:
                is_stopping = True
                stop()

    def act() -> None:
        while True:
            number = asked.get()
            try:
                actions[number]()
            except Exception as error:
                name = signal.Signals(number).name
                what = describe_unexpected(error)
                event("signal_failed", level=logging.ERROR, signal=name, error=what)

    threading.Thread(target=wait, name="signals", daemon=True).start()
    if actions:
        threading.Thread(target=act, name="requests", daemon=True).start()


def _exit(status: int) -> NoReturn:
    """End the process; without the interpreter's clean-up if worker threads are still running.

    A thread inside onnxruntime while the interpreter shuts down would abort the process.
    """
    from lungwatch.daemon.logs import flush
    from lungwatch.daemon.stage import Worker

    if not flush():
        os._exit(status)  # what else writes to standard error would wait for its reader
    if any(isinstance(thread, Worker) for thread in threading.enumerate()):
        logging.shutdown()
        sys.stdout.flush()
        os._exit(status)
    sys.exit(status)


@click.command()
@home_options
@click.argument("ids", nargs=-1, metavar="[ID_OR_HASH]...")
@click.option("--failed", is_flag=True, help="All that failed through no fault of the file.")
def retry(site: Site, *, ids: tuple[str, ...], failed: bool) -> None:
    """Process files again that were rejected or have failed.

    The files stay in quarantine until the daemon takes them up; without a running daemon,
    `lungwatch run --once` does.
    """
    from lungwatch.db.audit import AuditEvent
    from lungwatch.db.queries import ResultFilter, get_result, list_results
    from lungwatch.db.results import Store

    if bool(ids) == failed:
        raise click.UsageError("give either IDs or --failed")
    with site.database(migrate=True, owned=True) as engine:
        if failed:
            rows = list_results(engine, ResultFilter(status="failed", limit=None))
        else:
            # A result may be named twice, by its number and its hash.
            rows = list({row.id: row for row in (get_result(engine, one) for one in ids)}.values())
        for row in rows:
            _check_retry(row, site.home.root)
        store = Store(engine)
        for row in rows:
            target = f"result {row.id}"
            with auditing_failure(engine, "retry", [target]):
                store.request_retry(
                    result_id=row.id,
                    now=datetime.now(UTC),
                    events=[AuditEvent(action="retry", target=target)],
                )
    click.echo(f"{len(rows)} queued for another attempt")


def _check_retry(row: "ResultRow", root: Path) -> None:
    if row.status not in ("failed", "rejected"):
        raise LungwatchError(
            f"result {row.id} is {row.status}; only failed and rejected results can be retried"
        )
    if row.file is None or not (root / row.file).is_file():
        raise LungwatchError(
            f"the file of result {row.id} is no longer in quarantine; drop it again"
        )


@click.command()
@home_options
@click.option(
    "--model", "bundle", help="Bundle to score with, by name or path; the configured one if none."
)
@filter_options(without=("model", "status"))
@click.option("--no-send", is_flag=True, help="Send none of the new results to the PACS.")
@click.option("--dry-run", is_flag=True, help="Print how many there are, change nothing.")
@json_option
def rescore(
    *,
    site: Site,
    bundle: str | None,
    no_send: bool,
    dry_run: bool,
    as_json: bool,
    selected: "ResultFilter",
) -> None:
    """Score the X-rays in HOME/done with another model, keeping the existing results.

    Each gets a further row; `results list --made-since` finds them, `results compare` compares
    the models. Without a running daemon the work is done here, and if interrupted, goes on when
    the command is given again. A running daemon takes the requests up if its model is the one
    asked for.
    """
    from lungwatch.daemon.pipeline.model import BundlePolicy, Classifier, find_bundle
    from lungwatch.db.audit import AuditEvent
    from lungwatch.db.rescoring import count_unfinished, queue_rescoring, rescorable
    from lungwatch.db.results import Store

    site.require_home()
    folder = find_bundle(bundle or site.config.model, site.home.root)
    classifier = Classifier.load(folder, trust=BundlePolicy.of(site.config))
    contract = classifier.contract
    is_running = site.is_daemon_running()
    if no_send and is_running:
        raise LungwatchError("a daemon is running, which sends as configured; stop it first")
    with site.database(migrate=not dry_run, owned=True) as engine:
        now = datetime.now(UTC)
        if dry_run:
            model_id = _known_model(engine, classifier.sha256)
        else:
            model_id = Store(engine).register_model(
                name=contract.name,
                version=contract.version,
                sha256=classifier.sha256,
                contract_json=contract.to_json(),
                now=now,
            )
        images = rescorable(engine, selected, model_id)
        count = len(images)
        if not dry_run:
            deed = AuditEvent(
                action="rescore", target=f"model {contract.id}", detail={"results": count}
            )
            count = queue_rescoring(engine, images, model_id, now, deed)
        waiting = count_unfinished(engine, model_id)
        is_done_here = not (dry_run or is_running) and waiting > 0
        if is_done_here:
            config = site.config.replace(model=str(folder))
            if no_send:
                config = config.replace(pacs_destinations=())
            if status := _run(config, once=True, rescores=True):
                _exit(status)
        left = count_unfinished(engine, model_id)
    if as_json:
        print_json(
            {
                "model": contract.id,
                "chosen": count,
                "made": waiting - left if is_done_here else 0,
                "left": left,
                "daemon_running": is_running,
                "dry_run": dry_run,
                "at": now,
            }
        )
    elif dry_run:
        click.echo(cell_text(f"{count} X-rays in done/ have no result of {contract.id}"))
    elif is_running:
        click.echo(
            cell_text(
                f"{count} queued for {contract.id}; the running daemon scores them if that is its "
                f"model, else stop it and give the command again ({left} waiting)"
            )
        )
    else:
        click.echo(cell_text(f"{waiting - left} scored with {contract.id}"))
    if is_done_here and left:
        raise LungwatchError(f"{left} are left; give the command again to go on")


def _known_model(engine: "Engine", sha256: str) -> int:
    """Return a model's number, or one that no model has."""
    from lungwatch.db.rescoring import known_models

    return next((one.id for one in known_models(engine) if one.sha256 == sha256), -1)


@click.command()
@home_options
@json_option
def doctor(site: Site, *, as_json: bool) -> None:
    """Check configuration, folders, database, model and clock, and process a synthetic X-ray.

    Exit code 1 if a check fails. Research use only; not a medical device.
    """
    from lungwatch.daemon.monitor.health import run_checks
    from lungwatch.daemon.service import Service

    # Processing the synthetic X-ray would log events between the lines.
    logging.getLogger("lungwatch").addHandler(logging.NullHandler())
    logging.getLogger("lungwatch").propagate = False
    marks = {True: ("ok", "green"), False: ("FAILED", "red"), None: ("-", "yellow")}
    checks = []
    for check in run_checks(site.config, process=lambda trial: Service(trial).run(once=True)):
        checks.append(check)
        if not as_json:
            mark, colour = marks[check.ok]
            line = cell_text(f"{check.name}: {check.detail}")
            click.echo(f"{click.style(f'{mark:>6}', fg=colour)}  {line}")
    if as_json:
        print_json([asdict(check) for check in checks])
    sys.exit(1 if any(check.ok is False for check in checks) else 0)


@click.command()
@home_options
@click.option("--dry-run", is_flag=True, help="List differences, change nothing.")
@json_option
def reconcile(site: Site, *, dry_run: bool, as_json: bool) -> None:
    """Compare folders and database file by file, and repair differences.

    Every file in done/ and quarantine/ is hashed and compared with its row, and every row with
    its file. While a daemon is running, nothing is changed. Exit code 1 if differences remain.
    """
    from lungwatch.daemon.reconcile import Reconciler

    site.require_home()
    with (
        site.locked_if_free(creates=not dry_run) as is_locked,
        site.database(migrate=not dry_run, owned=True) as engine,
        ProgressBar("hashing") as bar,
    ):
        mends = is_locked and not dry_run
        with auditing_failure(engine, "reconcile", ["home"]) if mends else contextlib.nullcontext():
            report = Reconciler(
                site.home, engine, mend=mends, is_running=not is_locked, on_file=bar.advance
            ).run()
            kinds = Counter(str(item.kind) for item in report.differences if item.mended)
            if kinds:
                detail = {"mended": kinds.total(), **kinds}
                record_event(engine, "reconcile", targets=["home"], detail=detail)
    if as_json:
        print_json({**asdict(report), "agrees": report.agrees, "daemon_running": not is_locked})
    else:
        _print_differences(report, is_running=not is_locked)
    sys.exit(0 if report.agrees else 1)


def _print_differences(report: "Reconciliation", *, is_running: bool) -> None:
    if report.differences:
        print_table(
            ("difference", "result", "path", "mended", "remedy"),
            [
                (item.kind, item.result_id, item.path, item.mended, item.remedy)
                for item in report.differences
            ],
        )
    in_flight = f"; a daemon is running, {report.in_flight} in progress" if is_running else ""
    mended = sum(item.mended for item in report.differences)
    left = len(report.differences) - mended
    verdict = "folders and database agree" if report.agrees else f"{left} differences remain"
    click.echo(
        f"{report.results} results, {report.files} files and {report.overlays} overlays compared"
        f"{in_flight}: {verdict}" + (f" ({mended} mended)" if mended else "")
    )
