"""Commands of record keeping: `retention`, `backup`, `audit`; and the audit entries of commands."""

import contextlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lungwatch.cli.options import home_options, json_option, parse_since
from lungwatch.cli.output import cell_text, print_json, print_table, to_csv

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from lungwatch.daemon.config import Config
    from lungwatch.daemon.retention import Backup, Removal, Retention
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
    from lungwatch.db.audit import AuditEvent
    from lungwatch.db.audit import record_events as write

    deeds = [
        AuditEvent(action=action, target=target, outcome=outcome, detail=detail or {})
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
def list_audit(
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
    from lungwatch.daemon.configfile import load_config
    from lungwatch.db.audit import AuditRow, audit_rows
    from lungwatch.db.maintenance import open_existing

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
    from lungwatch.daemon.configfile import load_config
    from lungwatch.daemon.home import Home
    from lungwatch.daemon.logs import configure, event
    from lungwatch.daemon.retention import create_backup
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
    from lungwatch.db.maintenance import open_existing
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
def list_backups(home: Path | None, config_path: Path | None, as_json: bool) -> None:
    """List the backups in the home, the oldest first."""
    from lungwatch.daemon.configfile import load_config
    from lungwatch.daemon.home import Home
    from lungwatch.daemon.retention import backups

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
    from lungwatch.db.maintenance import check_copy

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
    from lungwatch.daemon.configfile import load_config
    from lungwatch.daemon.home import Home
    from lungwatch.daemon.reconcile import DiscrepancyKind, Reconciler
    from lungwatch.daemon.retention import backups, restored
    from lungwatch.db.engine import parse_url
    from lungwatch.db.maintenance import open_database, sqlite_path
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
                    item.mended and item.kind is DiscrepancyKind.UNKNOWN_FILE
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
    from lungwatch.daemon.configfile import load_config
    from lungwatch.daemon.home import Home, check_database
    from lungwatch.daemon.logs import configure, event
    from lungwatch.daemon.retention import Retention
    from lungwatch.db.maintenance import open_existing

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
