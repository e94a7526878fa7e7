"""`lungwatch rescore`: score what is filed with another model, keeping both rows."""

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, Unpack

import click

from lungwatch.cli.options import filter_options, home_options, json_option
from lungwatch.cli.output import cell_text, print_json
from lungwatch.errors import HomeError, LungwatchError

if TYPE_CHECKING:
    from lungwatch.daemon.config import Config
    from lungwatch.daemon.home import Home

_ACTION = "rescore"


class Chosen(TypedDict):
    """What `filter_options` passes, less the model and the state."""

    since: datetime | None
    until: datetime | None
    made_since: datetime | None
    label: str | None
    flag: str | None
    min_score: float | None
    max_score: float | None
    patient: str | None
    accession: str | None
    study: str | None
    limit: int | None


@click.command()
@home_options
@click.option(
    "--model",
    "bundle",
    help="Bundle that scores, by name or path; the configured one if not given.",
)
@filter_options(without=("model", "status"))
@click.option("--no-send", is_flag=True, help="Send nothing of it to the PACS.")
@click.option("--dry-run", is_flag=True, help="Say how many there are, change nothing.")
@json_option
def rescore(
    *,
    home: Path | None,
    config_path: Path | None,
    bundle: str | None,
    no_send: bool,
    dry_run: bool,
    as_json: bool,
    **chosen: Unpack[Chosen],
) -> None:
    """Score the X-rays in HOME/done with another model, and keep the results that are there.

    Each gets a further row; `results list --made-since` finds them, `results compare` tells how
    the models differ. Without a running daemon the work is done here, and what is cut off goes on
    when the command is given again. A running daemon takes the requests up if its model is the
    one asked for.
    """
    from lungwatch.daemon.config import load_config
    from lungwatch.daemon.home import Home
    from lungwatch.daemon.model import Classifier, find_bundle
    from lungwatch.daemon.ownership import check_database
    from lungwatch.daemon.trust import Trust
    from lungwatch.db.audit import Deed
    from lungwatch.db.migrate import open_database
    from lungwatch.db.rescoring import asked_for, queue_rescoring, rescorable
    from lungwatch.db.rows import ResultFilter
    from lungwatch.db.store import Store

    config = load_config(config_path, home)
    place = Home(config.home)
    if not place.incoming.is_dir():
        raise HomeError(f"there is no lungwatch home at {place.root}; run `lungwatch run` first")
    folder = find_bundle(bundle or config.model, config.home)
    classifier = Classifier.load(folder, trust=Trust.of(config))
    contract = classifier.contract
    is_running = _is_locked(place)
    if no_send and is_running:
        raise LungwatchError("a daemon is running, which sends what it is configured to; stop it")
    engine = open_database(config.database_url)
    try:
        check_database(place, engine)
        now = datetime.now(UTC)
        model_id = Store(engine).register_model(
            name=contract.name,
            version=contract.version,
            sha256=classifier.sha256,
            contract_json=contract.to_json(),
            now=now,
        )
        images = rescorable(engine, ResultFilter(**chosen), model_id)
        count = len(images)
        if not dry_run:
            deed = Deed(
                action=_ACTION, target=f"model {contract.id}", detail={"results": len(images)}
            )
            count = queue_rescoring(engine, images, model_id, now, deed)
        waiting = asked_for(engine, model_id)
        done_here = not (dry_run or is_running) and waiting > 0
        if done_here:
            _work(config, folder, sends=not no_send)
        left = asked_for(engine, model_id)
    finally:
        engine.dispose()
    if as_json:
        print_json(
            {
                "model": contract.id,
                "chosen": count,
                "made": waiting - left if done_here else 0,
                "left": left,
                "daemon_running": is_running,
                "dry_run": dry_run,
                "at": now,
            }
        )
    else:
        _say(contract.id, count, waiting, left, dry_run=dry_run, is_running=is_running)
    if done_here and left:
        raise LungwatchError(f"{left} are left; give the command again to go on")


def _is_locked(place: "Home") -> bool:
    try:
        with place.locked():
            return False
    except HomeError:
        return True


def _work(config: "Config", folder: Path, *, sends: bool) -> None:
    """Run the daemon's own pipeline over what was asked for, and over nothing else."""
    from lungwatch.cli.run import run_to_end

    trial = replace(config, model=str(folder))
    if not sends:
        trial = replace(trial, pacs_destinations=())
    run_to_end(trial, rescores=True)


def _say(
    model: str, count: int, waiting: int, left: int, *, dry_run: bool, is_running: bool
) -> None:
    if dry_run:
        text = f"{count} X-rays in done/ have no result of {model}"
    elif is_running:
        text = (
            f"{count} queued for {model}; the running daemon takes them up if that is its model, "
            f"else stop it and give the command again ({left} waiting)"
        )
    else:
        text = f"{waiting - left} scored with {model}"
    click.echo(cell_text(text))
