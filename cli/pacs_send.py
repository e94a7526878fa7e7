"""`lungwatch pacs send`: send results to the configured destinations now, or once more."""

import sys
from collections import Counter
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lungwatch.cli.options import home_options, json_option
from lungwatch.cli.output import print_json, print_table

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from lungwatch.daemon.config import Config
    from lungwatch.daemon.home import Home
    from lungwatch.db.deliveries import OutboxPlan
    from lungwatch.db.delivery_queries import DeliveryRow


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
    from lungwatch.daemon.config import load_config
    from lungwatch.daemon.home import Home
    from lungwatch.daemon.ownership import check_database
    from lungwatch.db.audit import Deed, note
    from lungwatch.db.deliveries import Deliveries
    from lungwatch.db.migrate import open_database
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
        note(
            engine,
            datetime.now(UTC),
            [
                Deed(action="pacs send", target=target, detail={"objects": objects})
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

    from lungwatch.daemon.outbox.plan import plan_of
    from lungwatch.errors import ConfigError

    plan = plan_of(config)
    if plan is None:
        raise ConfigError("no 'pacs_destinations' are configured: there is nowhere to send to")
    if destination is None:
        return plan
    if destination not in plan.destinations:
        raise ConfigError(
            f"{destination!r} is not among 'pacs_destinations': {', '.join(plan.destinations)}"
        )
    return replace(plan, destinations=(destination,))


def _queue(engine: "Engine", ids: tuple[str, ...], plan: "OutboxPlan") -> None:
    """Add what the named results owe and was never queued."""
    from lungwatch.db.deliveries import Deliveries
    from lungwatch.db.delivery_queries import deliveries_of
    from lungwatch.db.queries import get_result
    from lungwatch.errors import LungwatchError

    for one in ids:
        row = get_result(engine, one)
        if row.status != "done":
            raise LungwatchError(f"result {row.id} is {row.status}; only done ones can be sent")
        if row.study_uid is None or row.sop_uid is None:
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
    from lungwatch.db.delivery_queries import deliveries_of, list_deliveries
    from lungwatch.db.delivery_states import UNSENT, DeliveryState
    from lungwatch.db.queries import get_result

    if ids:
        results = {get_result(engine, one).id for one in ids}
        rows = [row for result in sorted(results) for row in deliveries_of(engine, result)]
    else:
        states = (DeliveryState.FAILED, DeliveryState.INVALID) if failed else UNSENT
        rows = list_deliveries(engine, states=states)
    return [row for row in rows if row.destination in plan.destinations]


def _send_here(config: "Config", home: "Home", engine: "Engine") -> None:
    """Do what the daemon's sender does, once, on this thread."""
    from lungwatch.daemon.clock import SystemClock
    from lungwatch.daemon.logs import configure
    from lungwatch.daemon.outage import Outages
    from lungwatch.daemon.outbox.sender import Sender
    from lungwatch.daemon.writer import Writer

    configure(quiet=True, log_format=config.log_format)

    def on_crash(name: str, error: BaseException) -> None:
        raise RuntimeError(f"the {name} thread ended") from error

    outages = Outages()
    # There is nobody to wait for the end of a trouble: each step is tried once.
    outages.abandon()
    writer = Writer(outages, on_crash)
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
    from lungwatch.db.delivery_queries import list_deliveries

    ids = {row.id for row in rows}
    return [row for row in list_deliveries(engine) if row.id in ids]
