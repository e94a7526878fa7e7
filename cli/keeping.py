"""Commands of record keeping: `retention`, `backup`, `audit`."""

import contextlib
import hashlib
import logging
import os
import sys
from dataclasses import asdict, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lungwatch.cli.main import Site, auditing_failure, home_options, record_event
from lungwatch.cli.options import (
    any_path,
    csv_option,
    file_path,
    json_option,
    one_format,
    parse_since,
)
from lungwatch.cli.output import cell_text, print_json, print_table, to_csv
from lungwatch.errors import DatabaseError, NotFoundError

if TYPE_CHECKING:
    from lungwatch.db.audit import AuditRow


@click.group()
def retention() -> None:
    """Remove files past their retention limits."""


@retention.command()
@home_options
@click.option("--dry-run", is_flag=True, help="List what would be removed and why.")
@click.option("--yes", is_flag=True, help="Remove more than [retention] max_share, too.")
@click.option(
    "--clock-is-right",
    is_flag=True,
    help="Confirm the system clock after it was set, or the machine was off for long.",
)
@json_option
def run(site: Site, *, dry_run: bool, yes: bool, clock_is_right: bool, as_json: bool) -> None:
    """Remove originals, overlays and backups by age and size, as configured in [retention].

    Each folder has its own limits, and its oldest files go first. Files that are unfinished,
    still to be sent or waiting for another attempt stay, and so does the newest backup. The
    results stay in the database. A daemon may be running.

    A run stops before the first removal if the system clock contradicts what is recorded, or if
    it would remove more of a folder than [retention] max_share.
    """
    from lungwatch.daemon.logs import configure, event
    from lungwatch.daemon.retention import Retention

    configure(quiet=sys.stderr.isatty(), log_format=site.config.log_format)
    with site.database(owned=True) as engine:
        job = Retention(site.config, site.home, engine)
        now = datetime.now(UTC)
        removals = job.plan(now)
        shares = job.shares(removals)
        by_clock, by_share = job.check_clock(now), job.check_shares(shares)
        stops = (None if clock_is_right else by_clock) or (None if yes else by_share)
        if stops is not None and not dry_run:
            job.stop(stops)
            event("retention_stopped", level=logging.ERROR, reason=stops.reason)
            raise stops
        if not dry_run:
            job.keep_reading(now, confirmed=by_clock is not None)
            # A run without a file ends an earlier stop in the audit trail, too.
            removals = job.run(removals) if removals or job.was_stopped else removals
    size = sum(removal.size_bytes for removal in removals)
    if not dry_run:
        event("retention", files=len(removals), size_bytes=size)
    if as_json:
        names = ("folder", "path", "since", "size_bytes", "why", "reason")
        listed = [{name: getattr(one, name) for name in names} for one in removals]
        report = {
            "dry_run": dry_run,
            "files": len(removals),
            "size_bytes": size,
            "shares": {one.folder: round(one.largest, 4) for one in shares},
            "stops": None if stops is None else stops.reason,
            "implausible": job.implausible,
        }
        print_json({**report, "removals": listed})
        return
    if dry_run and removals:
        print_table(("file", "bytes", "why"), [(r.path, r.size_bytes, r.reason) for r in removals])
    verb = "would be removed" if dry_run else "removed"
    click.echo(f"{len(removals)} files of {size} bytes {verb}")
    for one in shares if dry_run else ():
        click.echo(f"{one.folder}/: {one.files} of {one.files_held} files ({one.largest:.0%})")
    for path in job.implausible:
        click.echo(f"{cell_text(path)}: kept, its times contradict one another", err=True)
    if stops is not None:
        click.echo(f"such a run stops ({stops.reason}): {stops}", err=True)


@click.group()
def backup() -> None:
    """Back up, verify and restore the database."""


@backup.command()
@home_options
@click.option(
    "-o",
    "--output",
    type=any_path,
    metavar="FILE|DIR",
    help="New file, or folder; HOME/backups if not given.",
)
@click.option(
    "--keep",
    type=click.IntRange(min=0),
    help="Backups to keep in the folder, 0 for all; as configured in HOME/backups, all elsewhere.",
)
@json_option
def create(site: Site, *, output: Path | None, keep: int | None, as_json: bool) -> None:
    """Copy the database and verify the copy. A daemon may be running."""
    from lungwatch.daemon.logs import configure, event
    from lungwatch.daemon.retention import create_backup
    from lungwatch.db.engine import parse_url

    config = site.config
    configure(quiet=sys.stderr.isatty(), log_format=config.log_format)
    if keep is not None and output is not None and not output.is_dir():
        raise click.UsageError("--keep goes with a folder, and -o names a file")
    if keep is None:
        keep = config.keep_backups if output is None else 0
    url = parse_url(config.database_url)
    os.umask(0o077)
    made = create_backup(site.home, url, datetime.now(UTC), keep=keep, output=output)
    detail = {"size_bytes": made.size_bytes, "removed": len(made.removed)}
    with contextlib.ExitStack() as stack:
        try:
            engine = stack.enter_context(site.database())
        except DatabaseError as error:
            # A database of an earlier release is backed up, but has no audit table to write to.
            click.echo(f"not recorded in the audit trail: {cell_text(error)}", err=True)
        else:
            targets = [_content_name(made.path)]
            record_event(engine, "backup create", targets=targets, detail=detail)
    event("backup", size_bytes=made.size_bytes, removed=len(made.removed))
    if as_json:
        print_json(made)
        return
    click.echo(
        f"{cell_text(made.path)}: {made.size_bytes} bytes; {len(made.removed)} older ones removed"
    )


def _content_name(path: Path) -> str:
    """Return the audit's name of a backup: its digest, as its file name may be anything."""
    with path.open("rb") as file:
        return f"sha256 {hashlib.file_digest(file, 'sha256').hexdigest()}"


@backup.command("list")
@home_options
@json_option
def list_backups(site: Site, *, as_json: bool) -> None:
    """List the backups in HOME/backups, the oldest first."""
    from lungwatch.daemon.retention import backups

    found = backups(site.home.backups)
    rows = [{"path": path, "size_bytes": path.stat().st_size} for path in found]
    if as_json:
        print_json(rows)
        return
    print_table(("path", "bytes"), [tuple(row.values()) for row in rows])


@backup.command()
@click.argument("file", type=file_path)
def verify(file: Path) -> None:
    """Verify that a backup is complete and undamaged."""
    from lungwatch.db.maintenance import check_copy

    check_copy(file)
    click.echo(f"{cell_text(file)} is complete and undamaged")


@backup.command()
@home_options
@click.argument("file", type=file_path, required=False)
@json_option
def restore(site: Site, *, file: Path | None, as_json: bool) -> None:
    """Replace the database by a backup, the newest in HOME/backups if none is named.

    The daemon must be stopped. The previous database is kept beside the new one. Files that the
    backup does not know go back to incoming/ and are scored again. If interrupted, run it again.
    """
    from lungwatch.daemon.reconcile import DiscrepancyKind, Reconciler
    from lungwatch.daemon.retention import backups, restored
    from lungwatch.db.engine import parse_url
    from lungwatch.db.maintenance import open_database, sqlite_path

    url = parse_url(site.config.database_url)
    sqlite_path(url)  # raises if the database is not SQLite, which only has such backups
    with site.home.locked():
        if file is None:
            if not (found := backups(site.home.backups)):
                raise NotFoundError(f"there is no backup in {site.home.backups}")
            file = found[-1]
        with restored(url, file, datetime.now(UTC)) as previous:
            targets = [_content_name(file)]
            engine = open_database(site.config.database_url, within_restore=True)
            try:
                with auditing_failure(engine, "backup restore", targets):
                    report = Reconciler(site.home, engine, mend=True, is_running=False).run()
                put_back = sum(
                    item.mended and item.kind is DiscrepancyKind.UNKNOWN_FILE
                    for item in report.differences
                )
                left = sum(not item.mended for item in report.differences)
                detail = {"put_back": put_back, "differences": left}
                record_event(engine, "backup restore", targets=targets, detail=detail)
            finally:
                engine.dispose()
    if as_json:
        print_json({"kept_aside": previous, **detail})
        return
    click.echo(
        f"restored from {cell_text(file)}; {put_back} files put back into incoming/, "
        f"{left} differences left. "
        + ("" if previous is None else f"The previous database is {cell_text(previous)}. ")
        + "Start the daemon, then run `lungwatch reconcile`"
    )


@click.group()
def audit() -> None:
    """List changes, deletions and exports, and who made them."""


@audit.command("list")
@home_options
@click.option("--since", type=parse_since, metavar="TIME", help="At or after: ISO time, 24h, 7d.")
@click.option("--action", help="Command, e.g. 'backup restore', or group, e.g. 'backup'.")
@click.option("--actor", help="Part of the name of the user or the login, or of SUDO_USER.")
@click.option("--limit", type=click.IntRange(min=1), help="Maximum number; the newest are kept.")
@json_option
@csv_option
def list_events(
    site: Site,
    *,
    since: datetime | None,
    action: str | None,
    actor: str | None,
    limit: int | None,
    as_json: bool,
    as_csv: bool,
) -> None:
    """List what was done, by whom, when, to what and with which outcome; the newest first."""
    from lungwatch.db.audit import AuditRow, audit_rows

    one_format(as_json=as_json, as_csv=as_csv)
    with site.database() as engine:
        rows = audit_rows(engine, since=since, action=action, actor=actor, limit=limit)
    names = [field.name for field in fields(AuditRow)]
    if as_json:
        print_json(rows)
    elif as_csv:
        table = [asdict(row) | {"detail": _detail(row)} for row in rows]
        click.echo(to_csv(names, table), nl=False)
    else:
        names = names[1:]
        shown = [asdict(row) | {"detail": _detail(row)} for row in rows]
        print_table(names, [[row[name] for name in names] for row in shown])


def _detail(row: "AuditRow") -> list[str]:
    return [f"{name}={value}" for name, value in row.detail.items()]
