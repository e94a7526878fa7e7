"""`lungwatch pacs`: exchange of images and results with a PACS."""

import os
import signal
import threading
from collections import Counter
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import click

from lungwatch.cli.main import Served, Site, home_options, record_event
from lungwatch.cli.options import json_option
from lungwatch.cli.output import cell_text, print_json, print_table
from lungwatch.cli.query import reader_options
from lungwatch.errors import ConfigError, LungwatchError

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from lungwatch.db.deliveries import DeliveryRow, OutboxPlan

_STATES = ("queued", "sending", "sent", "failed", "invalid")


@click.group()
def pacs() -> None:
    """Exchange images and results with a PACS (extra 'pacs')."""


@pacs.command()
@click.option("--port", type=click.IntRange(1, 65_535), help="Port; as configured if not given.")
@home_options
def listen(site: Site, *, port: int | None) -> None:
    """Receive images by C-STORE into the drop folder until stopped.

    `lungwatch run` does the same where `[pacs] port` is set; this command is for a home whose
    daemon runs at other times, or not on the network.
    """
    from lungwatch.daemon import logs
    from lungwatch.daemon.pacs import make_listener

    config = site.config.replace(pacs_port=port or site.config.pacs_port)
    config.validate_receiving()
    if not config.pacs_port:
        raise ConfigError("no port to listen on: set 'pacs.port', or give --port")
    logs.configure(log_format=config.log_format)
    os.umask(0o077)
    site.home.prepare()
    ended = threading.Event()
    crashes: list[BaseException] = []

    def on_crash(name: str, error: BaseException) -> None:
        del name
        crashes.append(error)
        ended.set()

    listener = make_listener(config, site.home, on_crash)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    listener.start()
    ended.wait()
    listener.stop()
    if crashes:
        raise crashes[0]


@pacs.command()
@click.argument("destinations", nargs=-1, metavar="[AETITLE@HOST:PORT]...")
@home_options
@json_option
def echo(site: Site, *, destinations: tuple[str, ...], as_json: bool) -> None:
    """Test the connection to destinations by C-ECHO; the configured ones if none is named.

    Exit code 1 if one of them does not answer.
    """
    from lungwatch.daemon.config import parse_destination
    from lungwatch.daemon.pacs.scu import StorageScu, UnreachableError

    names = destinations or site.config.pacs_destinations
    if not names:
        raise ConfigError("no destination: set 'pacs.destinations', or name one")
    user = StorageScu(site.config)
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
            # The destination's answer may hold terminal escape sequences.
            click.echo(cell_text(f"{answer['destination']}: {answer['problem'] or 'answers'}"))
    if any(answer["problem"] for answer in answers):
        raise click.exceptions.Exit(1)


_destination_option = click.option(
    "--destination", metavar="AETITLE@HOST:PORT", help="Only this destination."
)


@pacs.command()
@click.argument("ids", nargs=-1, metavar="[ID_OR_HASH]...")
@click.option("--failed", is_flag=True, help="All deliveries that failed or were invalid.")
@click.option("--all-due", is_flag=True, help="All waiting deliveries, at once.")
@_destination_option
@home_options
@json_option
def send(
    *,
    site: Site,
    ids: tuple[str, ...],
    failed: bool,
    all_due: bool,
    destination: str | None,
    as_json: bool,
) -> None:
    """Send results to the configured destinations, also results sent before.

    A running daemon sends them: at once, or at its next attempt to reach a destination that it
    did not reach. Without one they are sent by this command, with all other due deliveries, and
    the exit code is 1 if one of the selected ones was not sent.
    """
    from lungwatch.db.audit import AuditEvent, record_events
    from lungwatch.db.deliveries import Deliveries, list_deliveries

    if (bool(ids), failed, all_due).count(True) != 1:
        raise click.UsageError("give either IDs, --failed or --all-due")
    plan = _plan(site, destination)
    site.home.prepare()
    with site.locked_if_free() as is_locked, site.database(migrate=True, owned=True) as engine:
        if ids:
            _queue(engine, ids, plan)
        chosen = _choose(engine, ids, plan, failed=failed)
        now = datetime.now(UTC)
        Deliveries(engine).request([row.id for row in chosen], now)
        counts = Counter(f"result {row.result_id}" for row in chosen)
        events = [
            AuditEvent(action="pacs send", target=target, detail={"objects": objects})
            for target, objects in counts.items()
        ]
        record_events(engine, now, events)
        if chosen and is_locked:
            _send_here(site, engine)
        chosen_ids = {row.id for row in chosen}
        rows = [row for row in list_deliveries(engine) if row.id in chosen_ids]
    if as_json:
        print_json(rows)
    elif rows:
        print_table(
            ("result", "object", "destination", "state", "error"),
            [(row.result_id, row.kind, row.destination, row.state, row.error) for row in rows],
        )
        if not is_locked:
            click.echo(f"\n{len(rows)} queued; the running daemon will send them")
    else:
        click.echo("Nothing to send.")
    if is_locked and any(row.state != "sent" for row in rows):
        raise click.exceptions.Exit(1)


def _plan(site: Site, destination: str | None) -> "OutboxPlan":
    from lungwatch.daemon.pacs.scu import plan_of

    plan = plan_of(site.config)
    if plan is None:
        raise ConfigError("no destination to send to: set 'pacs.destinations'")
    if destination is None:
        return plan
    if destination not in plan.destinations:
        raise ConfigError(
            f"{destination!r} is not one of 'pacs.destinations': {', '.join(plan.destinations)}"
        )
    return replace(plan, destinations=(destination,))


def _queue(engine: "Engine", ids: tuple[str, ...], plan: "OutboxPlan") -> None:
    """Queue the deliveries of the named results that were never queued."""
    from lungwatch.db.deliveries import Deliveries, deliveries_of
    from lungwatch.db.queries import get_result

    for one in ids:
        row = get_result(engine, one)
        if row.status != "done":
            raise LungwatchError(f"result {row.id} is {row.status}; only done ones can be sent")
        if row.attributes["study_uid"] is None or row.attributes["sop_uid"] is None:
            raise LungwatchError(
                f"result {row.id} belongs to no DICOM study: there is nowhere to send it"
            )
        is_new = Deliveries(engine).queue(row.id, plan, datetime.now(UTC))
        if not is_new and not deliveries_of(engine, row.id):
            raise LungwatchError(
                f"result {row.id} is of a copy of an image that another result covers; a PACS gets "
                "one result for an image"
            )


def _choose(
    engine: "Engine", ids: tuple[str, ...], plan: "OutboxPlan", *, failed: bool
) -> "list[DeliveryRow]":
    from lungwatch.db.deliveries import deliveries_of, list_deliveries
    from lungwatch.db.models import UNSENT, DeliveryState
    from lungwatch.db.queries import get_result

    if ids:
        results = {get_result(engine, one).id for one in ids}
        rows = [row for result in sorted(results) for row in deliveries_of(engine, result)]
    else:
        states = (DeliveryState.FAILED, DeliveryState.INVALID) if failed else UNSENT
        rows = list_deliveries(engine, states=states)
    return [row for row in rows if row.destination in plan.destinations]


def _send_here(site: Site, engine: "Engine") -> None:
    """Send all due deliveries once, on this thread, as the daemon's sender would."""
    from lungwatch.daemon.logs import configure
    from lungwatch.daemon.pacs.outbox import Sender
    from lungwatch.daemon.retry import Outages, SystemClock
    from lungwatch.daemon.stage import DatabaseWriter, Progress

    configure(quiet=True, log_format=site.config.log_format)

    def on_crash(name: str, error: BaseException) -> None:
        raise RuntimeError(f"the {name} thread ended") from error

    outages = Outages()
    # Nothing is retried: the user is waiting.
    outages.shut_down()
    clock = SystemClock()
    writer = DatabaseWriter(outages, on_crash, Progress(clock))
    sender = Sender(
        config=site.config,
        home=site.home,
        engine=engine,
        writer=writer,
        outages=outages,
        clock=clock,
        on_crash=on_crash,
    )
    writer.start()
    try:
        sender.recover()
        sender.work_off()
    finally:
        writer.stop()


@pacs.command()
@click.option(
    "--state",
    "states",
    type=click.Choice(_STATES),
    multiple=True,
    help="Only this state; all but sent if not given. Repeatable.",
)
@_destination_option
@click.option("--limit", type=click.IntRange(min=1), help="Maximum number; the oldest are kept.")
@reader_options
@json_option
def queue(
    *,
    site: Site,
    states: tuple[str, ...],
    destination: str | None,
    limit: int | None,
    as_json: bool,
) -> None:
    """List deliveries to a PACS that are waiting or have failed, the oldest first."""
    from lungwatch.db.deliveries import list_deliveries
    from lungwatch.db.models import DeliveryState

    wanted = [DeliveryState(state) for state in states or _STATES if states or state != "sent"]
    with site.database() as engine:
        rows = list_deliveries(engine, states=wanted, destination=destination, limit=limit)
        if click.get_current_context().find_object(Served):
            record_event(engine, "pacs queue", detail={"deliveries": len(rows)})
    if as_json:
        print_json(rows)
    elif not rows:
        click.echo("None." if states else "Nothing is waiting to be sent.")
    else:
        print_table(
            (
                *("result", "object", "destination", "state", "commitment"),
                *("attempts", "next attempt", "error"),
            ),
            [
                (
                    row.result_id,
                    row.kind,
                    row.destination,
                    row.state,
                    row.commitment,
                    row.attempts,
                    row.next_attempt_at,
                    row.error or row.commitment_error,
                )
                for row in rows
            ],
        )


@pacs.command()
@home_options
@json_option
def status(*, site: Site, as_json: bool) -> None:
    """Show what each destination has, is owed and has committed.

    "Sent" means that the destination answered C-STORE with success, "committed" that it has taken
    responsibility (storage commitment). Other systems' requests follow, those that are not
    reported or have failed.
    """
    from lungwatch.db.commitments import list_requests
    from lungwatch.db.deliveries import destination_statuses

    with site.database() as engine:
        destinations = destination_statuses(engine)
        requests = [
            {
                "requester": row.ae_title,
                "state": row.state,
                "objects": len(row.instances),
                "committed": row.committed,
                "attempts": row.attempts,
                "created_at": row.created_at,
                "reported_at": row.reported_at,
                "error": row.error,
            }
            for row in list_requests(engine)
        ]
    if as_json:
        print_json({"destinations": destinations, "requests": requests})
        return
    if not destinations:
        click.echo("Nothing was ever to be sent.")
    else:
        names = ("due", "requested", "committed", "failed")
        print_table(
            (
                *("destination", "queued", "sent", "failed", "invalid"),
                *("commitment due", "requested", "committed", "not committed", "error"),
            ),
            [
                (
                    *(row.destination, row.queued, row.sent, row.failed, row.invalid),
                    *(row.commitments.get(name, 0) for name in names),
                    row.error,
                )
                for row in destinations
            ],
        )
    open_ones = [row for row in requests if row["state"] != "reported"]
    if open_ones:
        click.echo("")
        keys = ("requester", "state", "objects", "attempts", "created_at", "error")
        print_table(keys, [tuple(row[key] for key in keys) for row in open_ones])
