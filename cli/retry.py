"""`lungwatch retry`: put refused or failed files through again."""

from datetime import UTC, datetime
from pathlib import Path

import click

from lungwatch.cli.audit import noting_failure
from lungwatch.cli.options import home_options


@click.command()
@home_options
@click.argument("ids", nargs=-1, metavar="[ID_OR_HASH]...")
@click.option("--failed", is_flag=True, help="All that failed, through no fault of the file.")
def retry(home: Path | None, config_path: Path | None, ids: tuple[str, ...], failed: bool) -> None:
    """Put files through again that were rejected or have failed.

    They keep their place in quarantine until the daemon takes them up; without a running
    daemon, `lungwatch run --once` does.
    """
    from lungwatch.daemon.config import load_config
    from lungwatch.daemon.home import Home
    from lungwatch.daemon.ownership import check_database
    from lungwatch.db.audit import Deed
    from lungwatch.db.migrate import open_database
    from lungwatch.db.queries import ResultFilter, get_result, list_results
    from lungwatch.db.store import Store
    from lungwatch.errors import LungwatchError

    if bool(ids) == failed:
        raise click.UsageError("give either IDs or --failed")
    config = load_config(config_path, home)
    engine = open_database(config.database_url)
    try:
        check_database(Home(config.home), engine)
        if failed:
            rows = list_results(engine, ResultFilter(status="failed", limit=None))
        else:
            # Named twice, by number and hash perhaps, it is one result.
            rows = list({row.id: row for row in (get_result(engine, one) for one in ids)}.values())
        for row in rows:
            if row.status not in ("failed", "rejected"):
                raise LungwatchError(
                    f"result {row.id} is {row.status}; only failed and rejected ones can"
                )
            if row.file is None or not (config.home / row.file).is_file():
                raise LungwatchError(
                    f"the file of result {row.id} is no longer in quarantine; drop it again"
                )
        store = Store(engine)
        for row in rows:
            target = f"result {row.id}"
            with noting_failure(engine, "retry", [target]):
                store.request_retry(
                    result_id=row.id,
                    now=datetime.now(UTC),
                    deeds=[Deed(action="retry", target=target)],
                )
    finally:
        engine.dispose()
    click.echo(f"{len(rows)} put forward to be tried again")
