"""`lungwatch audit`: who did what."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lungwatch.cli.options import home_options, json_option, parse_since
from lungwatch.cli.output import print_json, print_table, to_csv

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from lungwatch.db.audit import AuditRow, Outcome


def note(
    engine: "Engine",
    action: str,
    *,
    targets: Sequence[str | None] = (None,),
    outcome: "Outcome" = "ok",
    detail: Mapping[str, object] | None = None,
) -> None:
    """Write down that this command did something, now: a row for each target."""
    from lungwatch.db.audit import Deed
    from lungwatch.db.audit import note as write

    deeds = [
        Deed(action=action, target=target, outcome=outcome, detail=detail or {})
        for target in targets
    ]
    write(engine, datetime.now(UTC), deeds)


@contextlib.contextmanager
def noting_failure(
    engine: "Engine", action: str, targets: Sequence[str | None] = (None,)
) -> Iterator[None]:
    """Write down that this command tried and did not succeed, if it raises."""
    from lungwatch.errors import DatabaseError

    try:
        yield
    except BaseException as error:
        # What goes wrong may be the database itself; the error that is told is the first one.
        with contextlib.suppress(DatabaseError):
            note(
                engine,
                action,
                targets=targets,
                outcome="failed",
                detail={"error": type(error).__name__},
            )
        raise


@click.group()
def audit() -> None:
    """Show who changed, removed or exported what."""


@audit.command("list")
@home_options
@click.option("--since", type=parse_since, metavar="TIME", help="At or after: ISO time, 24h, 7d.")
@click.option("--action", help="A command, such as 'backup restore', or a group, such as 'backup'.")
@click.option("--actor", help="Part of the name of the user, or of who became that by sudo.")
@click.option("--limit", type=click.IntRange(min=1), help="At most so many, the newest.")
@json_option
@click.option("--csv", "as_csv", is_flag=True, help="Print CSV.")
def list_(
    *,
    home: Path | None,
    config_path: Path | None,
    since: datetime | None,
    action: str | None,
    actor: str | None,
    limit: int | None,
    as_json: bool,
    as_csv: bool,
) -> None:
    """List what was done, by whom, when, to what and how it ended; the newest first."""
    from lungwatch.daemon.config import load_config
    from lungwatch.db.audit import AuditRow, audit_rows
    from lungwatch.db.migrate import open_existing

    if as_json and as_csv:
        raise click.UsageError("give either --json or --csv")
    engine = open_existing(load_config(config_path, home).database_url)
    try:
        rows = audit_rows(engine, since=since, action=action, actor=actor, limit=limit)
    finally:
        engine.dispose()
    names = [field.name for field in fields(AuditRow)]
    if as_json:
        print_json(rows)
    elif as_csv:
        told = [asdict(row) | {"detail": _detail(row)} for row in rows]
        click.echo(to_csv(names, told), nl=False)
    else:
        print_table(
            names[1:],
            [[getattr(row, name) for name in names[1:-1]] + [_detail(row)] for row in rows],
        )


def _detail(row: "AuditRow") -> list[str]:
    return [f"{name}={value}" for name, value in row.detail.items()]
