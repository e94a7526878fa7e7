"""`lungwatch audit`: who did what."""

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lungwatch.cli.options import home_options, json_option, parse_since
from lungwatch.cli.output import print_json, print_table

if TYPE_CHECKING:
    from sqlalchemy import Engine


def note(engine: "Engine", action: str, detail: Mapping[str, object]) -> None:
    """Write down that this command did something, now."""
    from lungwatch.db.audit import note as write

    write(engine, action, datetime.now(UTC), detail)


@click.group()
def audit() -> None:
    """Show who changed, removed or exported what."""


@audit.command("list")
@home_options
@click.option("--since", type=parse_since, metavar="TIME", help="At or after: ISO time, 24h, 7d.")
@click.option("--limit", type=click.IntRange(min=1), help="At most so many, the newest.")
@json_option
def list_(
    home: Path | None,
    config_path: Path | None,
    since: datetime | None,
    limit: int | None,
    as_json: bool,
) -> None:
    """List what was done, the newest first."""
    from lungwatch.daemon.config import load_config
    from lungwatch.db.audit import audit_rows
    from lungwatch.db.migrate import open_existing

    engine = open_existing(load_config(config_path, home).database_url)
    try:
        rows = audit_rows(engine, since=since, limit=limit)
    finally:
        engine.dispose()
    if as_json:
        print_json(rows)
        return
    print_table(
        ("at", "actor", "action", "detail"),
        [
            (row.at, row.actor, row.action, [f"{k}={v}" for k, v in row.detail.items()])
            for row in rows
        ],
    )
