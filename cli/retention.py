"""`lungwatch retention`: remove what has been kept for long enough."""

import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lungwatch.cli.audit import note
from lungwatch.cli.options import home_options, json_option
from lungwatch.cli.output import print_json, print_table

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from lungwatch.daemon.retention import Removal, Retention

_ACTION = "retention run"


@click.group()
def retention() -> None:
    """Remove what has been kept for long enough."""


@retention.command()
@home_options
@click.option("--dry-run", is_flag=True, help="List what would go and why, remove nothing.")
@json_option
def run(home: Path | None, config_path: Path | None, dry_run: bool, as_json: bool) -> None:
    """Remove originals, overlays and backups by age and space, as the retain_… keys say.

    Each folder has limits of its own, and its oldest files go first. What is not finished, is
    still to be sent or is to be tried again stays, and so does the newest backup. The results
    stay in the database. It runs beside the daemon.
    """
    from lungwatch.daemon.config import load_config
    from lungwatch.daemon.home import Home
    from lungwatch.daemon.logs import configure, event
    from lungwatch.daemon.ownership import check_database
    from lungwatch.daemon.retention import Retention
    from lungwatch.db.migrate import open_existing

    config = load_config(config_path, home)
    # At a terminal its own words do.
    configure(quiet=sys.stderr.isatty(), log_format=config.log_format)
    place = Home(config.home)
    now = datetime.now(UTC)
    engine = open_existing(config.database_url)
    try:
        check_database(place, engine)
        job = Retention(config, place, engine)
        chosen = job.plan(now)
        if not dry_run and chosen:
            chosen = _remove(job, engine, chosen, now)
    finally:
        engine.dispose()
    size = sum(removal.size_bytes for removal in chosen)
    if not dry_run:
        event("retention", files=len(chosen), size_bytes=size)
    if as_json:
        report = {"dry_run": dry_run, "files": len(chosen), "size_bytes": size}
        told = ("folder", "path", "since", "size_bytes", "why", "reason")
        print_json({**report, "removals": [{n: getattr(r, n) for n in told} for r in chosen]})
        return
    if dry_run and chosen:
        print_table(("file", "bytes", "why"), [(r.path, r.size_bytes, r.reason) for r in chosen])
    verb = "would be removed" if dry_run else "removed"
    click.echo(f"{len(chosen)} files of {size} bytes {verb}")


def _remove(
    job: "Retention", engine: "Engine", chosen: "list[Removal]", now: datetime
) -> "list[Removal]":
    """Remove files and return which; the audit gets a row before, and one for each folder."""
    from lungwatch.errors import HomeError

    folders = sorted({removal.folder for removal in chosen})
    # First, so that nothing is removed without a trace.
    note(engine, _ACTION, targets=["home"], outcome="started", detail={"chosen": len(chosen)})
    removed = []
    failed_in = None
    try:
        for removal in chosen:
            failed_in = removal.folder
            if job.remove(removal, now):
                removed.append(removal)
        failed_in = None
    except OSError as error:
        raise HomeError(f"a file cannot be removed: {error.strerror}") from error
    finally:
        for folder in folders:
            ours = [removal for removal in removed if removal.folder == folder]
            note(
                engine,
                _ACTION,
                targets=[folder],
                outcome="failed" if folder == failed_in else "ok",
                detail={
                    "files": len(ours),
                    "size_bytes": sum(removal.size_bytes for removal in ours),
                },
            )
    return removed
