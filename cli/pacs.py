"""`lungwatch pacs`: what goes to and comes from a PACS."""

import signal
import sys
import threading
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lungwatch.cli.main import LazyGroup
from lungwatch.cli.options import home_options, json_option
from lungwatch.cli.output import cell_text, print_json, print_table

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from lungwatch.daemon.config import Config
    from lungwatch.daemon.home import Home
    from lungwatch.db.deliveries import DeliveryRow, OutboxPlan


# Command -> (module:attribute, one line of help), imported when it is used.
_COMMANDS: Mapping[str, tuple[str, str]] = {
    "listen": ("lungwatch.cli.pacs:listen", "Receive images into the drop folder."),
    "echo": ("lungwatch.cli.pacs:echo", "Ask destinations for a sign of life (C-ECHO)."),
    "send": ("lungwatch.cli.pacs:send", "Send results now, or once more."),
    "queue": ("lungwatch.cli.pacs:queue", "List what waits to be sent, and what failed."),
}


@click.group(cls=LazyGroup, places=_COMMANDS)
def pacs() -> None:
    """Exchange images and results with a PACS (extra 'pacs')."""


@click.command()
@click.argument("destinations", nargs=-1, metavar="[AETITLE@HOST:PORT]...")
@home_options
@json_option
def echo(
    *, destinations: tuple[str, ...], home: Path | None, config_path: Path | None, as_json: bool
) -> None:
    """Send a C-ECHO to destinations, the configured ones if none is named.

    Exit code 1 if one of them does not answer.
    """
    from lungwatch.daemon.config import parse_destination
    from lungwatch.daemon.configfile import load_config
    from lungwatch.daemon.pacs.scu import StorageScu, TlsFiles, UnreachableError
    from lungwatch.errors import ConfigError

    config = load_config(config_path, home)
    names = destinations or config.pacs_destinations
    if not names:
        raise ConfigError("nobody to ask: set 'pacs.destinations', or name one")
    user = StorageScu(config.pacs_ae_title, TlsFiles.of(config))
    answers = []
    for destination in map(parse_destination, names):
        try:
            user.echo(destination)
            problem = None
        except UnreachableError as error:
            problem = str(error)
        answers.append(
            {"destination": destination.name, "answers": problem is None, "problem": problem}
        )
    if as_json:
        print_json(answers)
    else:
        for answer in answers:
            # What the other side answered may steer the terminal.
            click.echo(cell_text(f"{answer['destination']}: {answer['problem'] or 'answers'}"))
    if any(answer["problem"] for answer in answers):
        raise click.exceptions.Exit(1)


@click.command()
@click.option("--port", type=click.IntRange(1, 65_535), help="Instead of the configured one.")
@home_options
def listen(*, port: int | None, home: Path | None, config_path: Path | None) -> None:
    """Receive images by C-STORE into the drop folder until stopped.

    `lungwatch run` does the same beside its work where `[pacs] port` is set; this is for a home
    whose daemon runs at other times, or not on the network.
    """
    from lungwatch.daemon import logs
    from lungwatch.daemon.configfile import load_config
    from lungwatch.daemon.home import Home
    from lungwatch.daemon.pacs import make_listener
    from lungwatch.errors import ConfigError

    config = load_config(config_path, home)
    config = config.replace(pacs_port=port or config.pacs_port)
    config.validate_receiving()
    if not config.pacs_port:
        raise ConfigError("no port to listen on: set 'pacs.port', or give --port")
    logs.configure(log_format=config.log_format)
    place = Home(config.home)
    place.prepare()
    ended = threading.Event()
    crashes: list[BaseException] = []

    def on_crash(name: str, error: BaseException) -> None:
        del name
        crashes.append(error)
        ended.set()

    listener = make_listener(config, place, on_crash)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    listener.start()
    ended.wait()
    listener.stop()
    if crashes:
        raise crashes[0]


_STATES = ("queued", "sending", "sent", "failed", "invalid")


@click.command()
@click.option(
    "--state",
    "states",
    type=click.Choice(_STATES),
    multiple=True,
    help="In this state; may be given several times. Without: all that was not sent.",
)
@click.option("--destination", metavar="AETITLE@HOST:PORT", help="To this one alone.")
@click.option("--limit", type=click.IntRange(min=1), help="At most so many, the oldest.")
@home_options
@json_option
def queue(
    *,
    states: tuple[str, ...],
    destination: str | None,
    limit: int | None,
    home: Path | None,
    config_path: Path | None,
    as_json: bool,
) -> None:
    """List what is to be sent to a PACS, the oldest first."""
    from lungwatch.daemon.configfile import load_config
    from lungwatch.db.deliveries import list_deliveries
    from lungwatch.db.maintenance import open_existing
    from lungwatch.db.states import DeliveryState

    wanted = [DeliveryState(state) for state in states or _STATES if states or state != "sent"]
    engine = open_existing(load_config(config_path, home).database_url)
    try:
        rows = list_deliveries(engine, states=wanted, destination=destination, limit=limit)
    finally:
        engine.dispose()
    if as_json:
        print_json(rows)
    elif not rows:
        click.echo("Nothing waits to be sent." if not states else "None.")
    else:
        print_table(
            ("result", "object", "destination", "state", "attempts", "next attempt", "error"),
            [
                (
                    row.result_id,
                    row.kind,
                    row.destination,
                    row.state,
                    row.attempts,
                    row.next_attempt_at,
                    row.error,
                )
                for row in rows
            ],
        )


@click.command()
@click.argument("ids", nargs=-1, metavar="[ID_OR_HASH]...")
@click.option("--failed", is_flag=True, help="All that failed or were invalid.")
@click.option("--all-due", is_flag=True, help="All that wait, whenever they were to be tried.")
@click.option("--destination", metavar="AETITLE@HOST:PORT", help="To this one alone.")
@home_options
@json_option
def send(
    *,
    ids: tuple[str, ...],
    failed: bool,
    all_due: bool,
    destination: str | None,
    home: Path | None,
    config_path: Path | None,
    as_json: bool,
) -> None:
    """Send results to the configured destinations, also those that were sent before.

    A running daemon sends them: at once, or as soon as it next tries a destination that it did
    not reach. Without one they are sent here and now, with all else that is due, and the exit
    status is 1 if one that was meant did not get through.
    """
    from lungwatch.daemon.configfile import load_config
    from lungwatch.daemon.home import Home, check_database
    from lungwatch.db.audit import AuditEvent, record_events
    from lungwatch.db.deliveries import Deliveries
    from lungwatch.db.maintenance import open_database
    from lungwatch.errors import HomeError

    if (bool(ids), failed, all_due).count(True) != 1:
        raise click.UsageError("give either IDs, --failed or --all-due")
    config = load_config(config_path, home)
    plan = _plan(config, destination)
    with ExitStack() as stack:
        place = Home(config.home)
        place.prepare()
        try:
            stack.enter_context(place.locked())
            is_running = False
        except HomeError:
            is_running = True
        engine = open_database(config.database_url)
        stack.callback(engine.dispose)
        check_database(place, engine)
        if ids:
            _queue(engine, ids, plan)
        chosen = _chosen(engine, ids, plan, failed=failed)
        Deliveries(engine).request([row.id for row in chosen], datetime.now(UTC))
        # A row of the audit for each result, with what of it is to be sent to how many.
        counts = Counter(f"result {row.result_id}" for row in chosen)
        record_events(
            engine,
            datetime.now(UTC),
            [
                AuditEvent(action="pacs send", target=target, detail={"objects": objects})
                for target, objects in counts.items()
            ],
        )
        if chosen and not is_running:
            _send_here(config, place, engine)
        rows = _again(engine, chosen)
    if as_json:
        print_json(rows)
    elif rows:
        print_table(
            ("result", "object", "destination", "state", "error"),
            [(row.result_id, row.kind, row.destination, row.state, row.error) for row in rows],
        )
    else:
        click.echo("Nothing to send.")
    if rows and is_running and not as_json:
        click.echo(f"\n{len(rows)} put forward; the running daemon sends them")
    sys.exit(0 if is_running or all(row.state == "sent" for row in rows) else 1)


def _plan(config: "Config", destination: str | None) -> "OutboxPlan":
    from dataclasses import replace

    from lungwatch.daemon.pacs.scu import plan_of
    from lungwatch.errors import ConfigError

    plan = plan_of(config)
    if plan is None:
        raise ConfigError("no 'pacs.destinations' are configured: there is nowhere to send to")
    if destination is None:
        return plan
    if destination not in plan.destinations:
        raise ConfigError(
            f"{destination!r} is not among 'pacs.destinations': {', '.join(plan.destinations)}"
        )
    return replace(plan, destinations=(destination,))


def _queue(engine: "Engine", ids: tuple[str, ...], plan: "OutboxPlan") -> None:
    """Add what the named results owe and was never queued."""
    from lungwatch.db.deliveries import Deliveries, deliveries_of
    from lungwatch.db.queries import get_result
    from lungwatch.errors import LungwatchError

    for one in ids:
        row = get_result(engine, one)
        if row.status != "done":
            raise LungwatchError(f"result {row.id} is {row.status}; only done ones can be sent")
        if row.attributes["study_uid"] is None or row.attributes["sop_uid"] is None:
            raise LungwatchError(
                f"result {row.id} is of an image in no DICOM study: there is none to send it to"
            )
        is_new = Deliveries(engine).queue(row.id, plan, datetime.now(UTC))
        if not is_new and not deliveries_of(engine, row.id):
            raise LungwatchError(
                f"result {row.id} is of a copy of an image that another result answers already; "
                "one image has one answer in a PACS"
            )


def _chosen(
    engine: "Engine", ids: tuple[str, ...], plan: "OutboxPlan", *, failed: bool
) -> "list[DeliveryRow]":
    from lungwatch.db.deliveries import deliveries_of, list_deliveries
    from lungwatch.db.queries import get_result
    from lungwatch.db.states import UNSENT, DeliveryState

    if ids:
        results = {get_result(engine, one).id for one in ids}
        rows = [row for result in sorted(results) for row in deliveries_of(engine, result)]
    else:
        states = (DeliveryState.FAILED, DeliveryState.INVALID) if failed else UNSENT
        rows = list_deliveries(engine, states=states)
    return [row for row in rows if row.destination in plan.destinations]


def _send_here(config: "Config", home: "Home", engine: "Engine") -> None:
    """Do what the daemon's sender does, once, on this thread."""
    from lungwatch.daemon.logs import configure
    from lungwatch.daemon.pacs.outbox import Sender
    from lungwatch.daemon.retry import Outages, SystemClock
    from lungwatch.daemon.stage import DatabaseWriter

    configure(quiet=True, log_format=config.log_format)

    def on_crash(name: str, error: BaseException) -> None:
        raise RuntimeError(f"the {name} thread ended") from error

    outages = Outages()
    # There is nobody to wait for the end of a trouble: each step is tried once.
    outages.abandon()
    writer = DatabaseWriter(outages, on_crash)
    sender = Sender(
        config=config,
        home=home,
        engine=engine,
        writer=writer,
        outages=outages,
        clock=SystemClock(),
        on_crash=on_crash,
    )
    writer.start()
    try:
        sender.recover()
        sender.work_off()
    finally:
        writer.stop()


def _again(engine: "Engine", rows: "list[DeliveryRow]") -> "list[DeliveryRow]":
    """Return how the deliveries stand now."""
    from lungwatch.db.deliveries import list_deliveries

    ids = {row.id for row in rows}
    return [row for row in list_deliveries(engine) if row.id in ids]
