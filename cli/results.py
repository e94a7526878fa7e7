"""`lungwatch results`: list, show, export and count what the database holds."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, TypeVar, Unpack

import click

from lungwatch import RESEARCH_USE_ONLY
from lungwatch.cli.audit import note, noting_failure
from lungwatch.cli.options import filter_options, home_options, json_option
from lungwatch.cli.output import cell_text, print_fields, print_json, print_table, to_csv, to_json
from lungwatch.cli.results_compare import compare
from lungwatch.cli.results_drift import print_drift

if TYPE_CHECKING:
    from datetime import datetime

    from sqlalchemy import Engine

    from lungwatch.daemon.drift import ReferenceChoice
    from lungwatch.db.rows import ResultRow
    from lungwatch.db.statistics import Statistics

    Row = TypeVar("Row", bound=ResultRow)


class Chosen(TypedDict):
    """What `filter_options` passes."""

    since: "datetime | None"
    until: "datetime | None"
    made_since: "datetime | None"
    label: str | None
    status: str | None
    flag: str | None
    finding: str | None
    min_score: float | None
    max_score: float | None
    patient: str | None
    accession: str | None
    study: str | None
    model: str | None
    limit: int | None


@click.group()
def results() -> None:
    """Query, export and count the results. Research use only; not a medical device."""


results.add_command(compare)


@results.command(name="list")
@home_options
@filter_options()
@json_option
@click.option("--csv", "as_csv", is_flag=True, help="Print CSV.")
def list_command(
    home: Path | None,
    config_path: Path | None,
    as_json: bool,
    as_csv: bool,
    **chosen: Unpack[Chosen],
) -> None:
    """List results, newest first."""
    if as_json and as_csv:
        raise click.UsageError("give either --json or --csv")
    rows = _read(home, config_path, chosen)
    if as_json:
        print_json(rows)
    elif as_csv:
        click.echo(_csv(rows), nl=False)
    elif not rows:
        click.echo("No results.")
    else:
        print_table(
            (
                "id",
                "file",
                "status",
                "label",
                "probability",
                "reason",
                "flags",
                "model",
                "received",
                "pacs",
                "overlay",
            ),
            [
                (
                    row.id,
                    row.source_name,
                    row.status,
                    row.label,
                    row.probability,
                    row.reason,
                    " ".join(row.flags) or None,
                    f"{row.model}-{row.model_version}",
                    row.received_at,
                    row.delivery,
                    row.overlay,
                )
                for row in rows
            ],
        )
        click.echo(f"\n{RESEARCH_USE_ONLY}")


@results.command()
@click.argument("id_or_hash")
@home_options
@json_option
def show(id_or_hash: str, home: Path | None, config_path: Path | None, as_json: bool) -> None:
    """Show one result whole.

    Named by its number, or by the first six or more characters of its file's SHA-256.
    """
    from lungwatch.db.delivery_queries import deliveries_of
    from lungwatch.db.queries import get_result

    with _opened(home, config_path) as (engine, root):
        row = _absolute(get_result(engine, id_or_hash), root)
        deliveries = deliveries_of(engine, row.id)
    if as_json:
        print_json({**asdict(row), "deliveries": deliveries})
        return
    print_fields(asdict(row))
    for sent in deliveries:
        # What the other side answered may steer the terminal.
        error = f" ({cell_text(sent.error)})" if sent.error else ""
        click.echo(f"{sent.kind} to {sent.destination}: {sent.state}{error}")
    click.echo(f"\n{RESEARCH_USE_ONLY}")


@results.command()
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(dir_okay=False, path_type=Path),
    help="FILE.csv or FILE.json; appears whole or not at all.",
)
@home_options
@filter_options()
def export(
    output: Path, home: Path | None, config_path: Path | None, **chosen: Unpack[Chosen]
) -> None:
    """Write results to a CSV or JSON file, newest first."""
    from lungwatch.atomicfile import write_atomic
    from lungwatch.errors import LungwatchError

    kind = output.suffix.lower()
    if kind not in (".csv", ".json"):
        raise click.BadParameter("the name must end in .csv or .json", param_hint="'-o'")
    rows = _read(home, config_path, chosen)
    text = _csv(rows) if kind == ".csv" else to_json(rows) + "\n"
    data = text.encode()
    # Not the file's name, which may hold a patient's.
    targets = [f"sha256 {hashlib.sha256(data).hexdigest()}"]
    with _opened(home, config_path) as (engine, _root):
        with noting_failure(engine, "results export", targets):
            try:
                write_atomic(output, data)
            except OSError as error:
                raise LungwatchError(f"cannot write {output}: {error.strerror}") from error
        detail = {"results": len(rows), "format": kind[1:]}
        note(engine, "results export", targets=targets, detail=detail)
    click.echo(f"{len(rows)} results written to {cell_text(output)}")


@results.command()
@home_options
@filter_options()
@click.option(
    "--drift",
    is_flag=True,
    help="Compare the newest results of the configured model with a reference, by station.",
)
@click.option(
    "--reference",
    type=click.Choice(["site", "bundle"]),
    help="What --drift compares with; the key 'drift_reference' if not given.",
)
@json_option
def stats(
    home: Path | None,
    config_path: Path | None,
    drift: bool,
    reference: "ReferenceChoice | None",
    as_json: bool,
    **chosen: Unpack[Chosen],
) -> None:
    """Count results and their scores.

    By day of receipt, status, label, reason, flag and model, and by tenth of the probability.
    With --drift: which figures and tags of the newest results are distributed otherwise than at
    first, or than in the model's training; of 1,000 windows without any shift at most one alarms.
    """
    if drift:
        if any(value is not None for value in chosen.values()):
            raise click.UsageError("--drift looks at the newest results: no filter goes with it")
        print_drift(home, config_path, reference, as_json=as_json)
        return
    if reference:
        raise click.UsageError("--reference goes with --drift")
    from lungwatch.db.queries import ResultFilter
    from lungwatch.db.queries import stats as count

    with _opened(home, config_path) as (engine, _root):
        counted = count(engine, ResultFilter(**chosen))
    if as_json:
        print_json(counted)
    else:
        _print_statistics(counted)


def _print_statistics(counted: "Statistics") -> None:
    click.echo(f"{counted.results} results, {counted.arrivals} files dropped\n")
    for name in ("day", "status", "label", "reason", "flag", "model"):
        counts = getattr(counted, f"by_{name}")
        if counts:
            print_table((name, "results"), counts.items())
            click.echo()
    if any(counted.scores):
        longest = max(counted.scores)
        bins = len(counted.scores)
        print_table(
            ("probability", "results", ""),
            [
                (f"{i / bins:.1f}-{(i + 1) / bins:.1f}", n, "#" * round(40 * n / longest) or " ")
                for i, n in enumerate(counted.scores)
            ],
        )
        click.echo()
    click.echo(RESEARCH_USE_ONLY)


@contextmanager
def _opened(home: Path | None, config_path: Path | None) -> "Iterator[tuple[Engine, Path]]":
    """Open the database that the configuration names, and say where the home is."""
    from lungwatch.daemon.config import load_config
    from lungwatch.db.migrate import open_existing

    config = load_config(config_path, home)
    engine = open_existing(config.database_url)
    try:
        yield engine, config.home
    finally:
        engine.dispose()


def _read(home: Path | None, config_path: Path | None, chosen: Chosen) -> "list[ResultRow]":
    from lungwatch.db.queries import ResultFilter, list_results

    with _opened(home, config_path) as (engine, root):
        return [_absolute(row, root) for row in list_results(engine, ResultFilter(**chosen))]


def _absolute(row: "Row", root: Path) -> "Row":
    return replace(
        row,
        overlay=None if row.overlay is None else str(root / row.overlay),
        file=None if row.file is None else str(root / row.file),
    )


def _csv(rows: "Sequence[ResultRow]") -> str:
    from lungwatch.db.rows import ResultRow

    return to_csv([field.name for field in fields(ResultRow)], [asdict(row) for row in rows])
