"""`lungwatch pacs queue`: what waits to be sent, what failed, what was sent."""

from pathlib import Path

import click

from lungwatch.cli.options import home_options, json_option
from lungwatch.cli.output import print_json, print_table

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
    from lungwatch.daemon.config import load_config
    from lungwatch.db.delivery_queries import list_deliveries
    from lungwatch.db.delivery_states import DeliveryState
    from lungwatch.db.migrate import open_existing

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
