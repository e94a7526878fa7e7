"""`lungwatch reconcile`: whether folders and database agree."""

import sys
from collections import Counter
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import click

from lungwatch.cli.audit import note, noting_failure
from lungwatch.cli.options import home_options, json_option
from lungwatch.cli.output import print_json, print_table


@click.command()
@home_options
@click.option("--dry-run", is_flag=True, help="List what differs, change nothing.")
@json_option
def reconcile(home: Path | None, config_path: Path | None, dry_run: bool, as_json: bool) -> None:
    """Prove, file by file, that folders and database agree; mend what does not.

    Every file in done/ and quarantine/ is hashed and compared with its row, every row with
    its file. While a daemon is running, nothing is changed. Exits with 1 if differences
    remain.
    """
    from lungwatch.daemon.config import load_config
    from lungwatch.daemon.home import Home
    from lungwatch.daemon.ownership import check_database
    from lungwatch.daemon.reconcile import Reconciler
    from lungwatch.db.migrate import open_database
    from lungwatch.errors import HomeError

    config = load_config(config_path, home)
    place = Home(config.home)
    if not place.incoming.is_dir():
        raise HomeError(f"there is no lungwatch home at {place.root}; run `lungwatch run` first")
    with ExitStack() as stack:
        try:
            stack.enter_context(place.locked())
            is_running = False
        except HomeError:
            is_running = True
        engine = open_database(config.database_url)
        stack.callback(engine.dispose)
        check_database(place, engine)
        bar = stack.enter_context(
            click.progressbar(
                length=0, label="Hashing", file=sys.stderr, hidden=not sys.stderr.isatty()
            )
        )

        def count() -> None:
            bar.length = (bar.length or 0) + 1
            bar.update(1)

        mends = not dry_run and not is_running
        if mends:
            stack.enter_context(noting_failure(engine, "reconcile", ["home"]))
        report = Reconciler(place, engine, mend=mends, is_running=is_running, on_file=count).run()
        mended = sum(item.mended for item in report.differences)
        if mended:
            kinds = Counter(str(item.kind) for item in report.differences if item.mended)
            note(engine, "reconcile", targets=["home"], detail={"mended": mended, **kinds})

    if as_json:
        print_json({**asdict(report), "agrees": report.agrees, "daemon_running": is_running})
        sys.exit(0 if report.agrees else 1)
    if report.differences:
        print_table(
            ("difference", "result", "path", "mended", "remedy"),
            [
                (item.kind, item.result_id, item.path, "yes" if item.mended else "no", item.remedy)
                for item in report.differences
            ],
        )
    compared = (
        f"{report.results} results, {report.files} files and {report.overlays} overlays compared"
    )
    if is_running:
        compared += f"; a daemon is running, {report.in_flight} on their way"
    left = sum(not item.mended for item in report.differences)
    mended = len(report.differences) - left
    verdict = "folders and database agree" if report.agrees else f"{left} differences remain"
    click.echo(f"{compared}: {verdict}" + (f" ({mended} mended)" if mended else ""))
    sys.exit(0 if report.agrees else 1)
