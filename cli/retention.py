"""`lungwatch retention`: remove what has been kept for long enough."""

from datetime import UTC, datetime
from pathlib import Path

import click

from lungwatch.cli.audit import note
from lungwatch.cli.options import home_options, json_option
from lungwatch.cli.output import print_json, print_table


@click.group()
def retention() -> None:
    """Remove what has been kept for long enough."""


@retention.command()
@home_options
@click.option("--dry-run", is_flag=True, help="List what would go, remove nothing.")
@json_option
def run(home: Path | None, config_path: Path | None, dry_run: bool, as_json: bool) -> None:
    """Remove originals and overlays by age and space, as the configuration's retain_… keys say.

    What is not finished, waits to be sent or is to be tried again stays. The results stay in
    the database. It runs beside the daemon.
    """
    from lungwatch.daemon.config import load_config
    from lungwatch.daemon.home import Home
    from lungwatch.daemon.retention import Retention
    from lungwatch.db.migrate import open_existing
    from lungwatch.errors import HomeError

    config = load_config(config_path, home)
    now = datetime.now(UTC)
    engine = open_existing(config.database_url)
    try:
        job = Retention(config, Home(config.home), engine)
        chosen = job.plan(now)
        if not dry_run and chosen:
            # First, so that nothing is removed without a trace.
            note(engine, "retention run", {"chosen": len(chosen)})
            try:
                chosen = [removal for removal in chosen if job.remove(removal, now)]
            except OSError as error:
                raise HomeError(f"a file cannot be removed: {error.strerror}") from error
    finally:
        engine.dispose()
    size = sum(removal.size_bytes for removal in chosen)
    if as_json:
        print_json({"dry_run": dry_run, "files": len(chosen), "size_bytes": size})
        return
    if dry_run and chosen:
        print_table(("file", "bytes", "why"), [(r.kept.path, r.size_bytes, r.why) for r in chosen])
    verb = "would be removed" if dry_run else "removed"
    click.echo(f"{len(chosen)} files of {size} bytes {verb}")
