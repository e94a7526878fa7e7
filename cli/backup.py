"""`lungwatch backup`: copies of the database, and the way back from one."""

import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lungwatch.cli.audit import note, noting_failure
from lungwatch.cli.options import home_options, json_option
from lungwatch.cli.output import cell_text, print_json, print_table

if TYPE_CHECKING:
    from lungwatch.daemon.backup import Backup
    from lungwatch.daemon.config import Config

_FILE = click.Path(dir_okay=False, path_type=Path)


@click.group()
def backup() -> None:
    """Copy the database, prove a copy whole, restore one."""


@backup.command()
@home_options
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    metavar="FILE|DIR",
    help="A new file, or a folder; without it, the home's backups/.",
)
@click.option(
    "--keep",
    type=click.IntRange(min=0),
    help="Backups to keep in the folder; 0: all. Only in the home there is a default.",
)
@json_option
def create(
    *,
    home: Path | None,
    config_path: Path | None,
    output: Path | None,
    keep: int | None,
    as_json: bool,
) -> None:
    """Copy the database and prove the copy whole, while the daemon runs or not."""
    from lungwatch.daemon.backup import create_backup
    from lungwatch.daemon.config import load_config
    from lungwatch.daemon.home import Home
    from lungwatch.daemon.logs import configure, event
    from lungwatch.db.engine import parse_url

    config = load_config(config_path, home)
    # At a terminal its own words do.
    configure(quiet=sys.stderr.isatty(), log_format=config.log_format)
    if keep is not None and output is not None and not output.is_dir():
        raise click.UsageError("--keep counts the backups of a folder, and -o names a file")
    if keep is None:
        keep = config.keep_backups if output is None else 0
    url = parse_url(config.database_url)
    made = create_backup(Home(config.home), url, datetime.now(UTC), keep=keep, output=output)
    _note_made(config, made)
    event("backup", size_bytes=made.size_bytes, removed=len(made.removed))
    if as_json:
        print_json(made)
        return
    click.echo(
        f"{cell_text(made.path)}: {made.size_bytes} bytes; {len(made.removed)} older ones removed"
    )


def _note_made(config: "Config", made: "Backup") -> None:
    from lungwatch.db.migrate import open_existing
    from lungwatch.errors import DatabaseError

    try:
        engine = open_existing(config.database_url)
    except DatabaseError as error:
        # An earlier release's database is copied all the same, it has no place to note it.
        click.echo(f"not noted in the audit: {cell_text(error)}", err=True)
        return
    try:
        note(
            engine,
            "backup create",
            targets=[_digest(made.path)],
            detail={"size_bytes": made.size_bytes, "removed": len(made.removed)},
        )
    finally:
        engine.dispose()


def _digest(path: Path) -> str:
    """Name a backup as the audit does: by its content, not by a name that somebody chose."""
    import hashlib

    with path.open("rb") as file:
        return f"sha256 {hashlib.file_digest(file, 'sha256').hexdigest()}"


@backup.command("list")
@home_options
@json_option
def list_(home: Path | None, config_path: Path | None, as_json: bool) -> None:
    """List the backups in the home, the oldest first."""
    from lungwatch.daemon.backup import backups
    from lungwatch.daemon.config import load_config
    from lungwatch.daemon.home import Home

    found = backups(Home(load_config(config_path, home).home).backups)
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
    click.echo(f"{cell_text(file)} is whole")


@backup.command()
@home_options
@click.argument("file", type=_FILE, required=False)
@json_option
def restore(home: Path | None, config_path: Path | None, file: Path | None, as_json: bool) -> None:
    """Put a backup, the home's newest if none is named, in the database's place.

    The daemon must be stopped.

    The database that was there is kept beside it. Files that the backup does not know go back
    to incoming/, to be scored again. Broken off, it is to be run again.
    """
    from lungwatch.daemon.backup import backups, restored
    from lungwatch.daemon.config import load_config
    from lungwatch.daemon.home import Home
    from lungwatch.daemon.reconcile import DifferenceKind, Reconciler
    from lungwatch.db.backup import sqlite_path
    from lungwatch.db.engine import parse_url
    from lungwatch.db.migrate import open_database
    from lungwatch.errors import NotFoundError

    config = load_config(config_path, home)
    place = Home(config.home)
    url = parse_url(config.database_url)
    sqlite_path(url)  # another database's backups are not here
    with place.locked():
        if file is None:
            if not (found := backups(place.backups)):
                raise NotFoundError(f"there is no backup in {place.backups}")
            file = found[-1]
        with restored(url, file, datetime.now(UTC)) as aside:
            targets = [_digest(file)]
            engine = open_database(config.database_url, within_restore=True)
            try:
                with noting_failure(engine, "backup restore", targets):
                    report = Reconciler(place, engine, mend=True, is_running=False).run()
                put_back = sum(
                    item.mended and item.kind is DifferenceKind.UNKNOWN_FILE
                    for item in report.differences
                )
                left = sum(not item.mended for item in report.differences)
                counts = {"put_back": put_back, "differences": left}
                note(engine, "backup restore", targets=targets, detail=counts)
            finally:
                engine.dispose()
    if as_json:
        print_json({"kept_aside": aside, **counts})
        return
    click.echo(
        f"restored from {cell_text(file)}; {put_back} files put back into incoming/, "
        f"{left} differences left. "
        + ("" if aside is None else f"The former database is {cell_text(aside)}. ")
        + "Start the daemon, then run `lungwatch reconcile`"
    )
