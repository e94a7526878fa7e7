"""`lungwatch backup`: copies of the database, and the way back from one."""

from datetime import UTC, datetime
from pathlib import Path

import click

from lungwatch.cli.audit import note
from lungwatch.cli.options import home_options, json_option
from lungwatch.cli.output import print_json, print_table

_FILE = click.Path(dir_okay=False, path_type=Path)


@click.group()
def backup() -> None:
    """Copy the database, prove a copy whole, restore one."""


@backup.command()
@home_options
@click.option("--keep", type=click.IntRange(min=0), help="Backups to keep; 0: all.")
@json_option
def create(home: Path | None, config_path: Path | None, keep: int | None, as_json: bool) -> None:
    """Copy the database into the home's backups/, while the daemon runs or not."""
    from lungwatch.daemon.backup import create_backup
    from lungwatch.daemon.config import load_config
    from lungwatch.daemon.home import Home
    from lungwatch.db.engine import parse_url

    config = load_config(config_path, home)
    made = create_backup(
        Home(config.home),
        parse_url(config.database_url),
        datetime.now(UTC),
        keep=config.keep_backups if keep is None else keep,
    )
    if as_json:
        print_json(made)
        return
    click.echo(f"{made.path}: {made.size_bytes} bytes; {len(made.removed)} older ones removed")


@backup.command("list")
@home_options
@json_option
def list_(home: Path | None, config_path: Path | None, as_json: bool) -> None:
    """List the backups in the home, the oldest first."""
    from lungwatch.daemon.backup import backups
    from lungwatch.daemon.config import load_config
    from lungwatch.daemon.home import Home

    found = backups(Home(load_config(config_path, home).home))
    rows = [{"path": path, "size_bytes": path.stat().st_size} for path in found]
    if as_json:
        print_json(rows)
        return
    print_table(("path", "bytes"), [tuple(row.values()) for row in rows])


@backup.command()
@click.argument("file", type=_FILE)
def verify(file: Path) -> None:
    """Prove that a backup is whole."""
    from lungwatch.db.backup import check_copy

    check_copy(file)
    click.echo(f"{file} is whole")


@backup.command()
@home_options
@click.argument("file", type=_FILE, required=False)
@json_option
def restore(home: Path | None, config_path: Path | None, file: Path | None, as_json: bool) -> None:
    """Put a backup, the newest if none is named, in the database's place.

    The daemon must be stopped.

    The database that was there is kept beside it. Files that the backup does not know go back
    to incoming/, to be scored again.
    """
    from lungwatch.daemon.backup import backups, restore_backup
    from lungwatch.daemon.config import load_config
    from lungwatch.daemon.home import Home
    from lungwatch.daemon.reconcile import DifferenceKind, Reconciler
    from lungwatch.db.backup import sqlite_path
    from lungwatch.db.engine import parse_url
    from lungwatch.db.migrate import open_database
    from lungwatch.errors import NotFoundError

    config = load_config(config_path, home)
    place = Home(config.home)
    with place.locked():
        url = parse_url(config.database_url)
        sqlite_path(url)  # another database's backups are not here
        if file is None:
            if not (found := backups(place)):
                raise NotFoundError(f"there is no backup in {place.backups}")
            file = found[-1]
        aside = restore_backup(url, file, datetime.now(UTC))
        engine = open_database(config.database_url)
        try:
            note(engine, "backup restore", {"backup": file.name})
            report = Reconciler(place, engine, mend=True, is_running=False).run()
        finally:
            engine.dispose()
    put_back = sum(
        item.mended and item.kind is DifferenceKind.UNKNOWN_FILE for item in report.differences
    )
    left = sum(not item.mended for item in report.differences)
    if as_json:
        print_json({"kept_aside": aside, "put_back": put_back, "differences": left})
        return
    click.echo(
        f"restored from {file}; {put_back} files put back into incoming/, {left} differences left. "
        + ("" if aside is None else f"The former database is {aside}. ")
        + "Start the daemon, then run `lungwatch reconcile`"
    )
