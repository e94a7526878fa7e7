"""`lungwatch results`: list, show, export, count and compare results."""

import hashlib
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, TypeVar, Unpack

import click

from lungwatch import RESEARCH_USE_ONLY
from lungwatch.cli.keeping import note, noting_failure
from lungwatch.cli.options import filter_options, home_options, json_option
from lungwatch.cli.output import cell_text, print_fields, print_json, print_table, to_csv, to_json
from lungwatch.errors import LungwatchError, NotFoundError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from datetime import datetime

    from sqlalchemy import Engine

    from lungwatch.comparison import Shift
    from lungwatch.daemon.monitor.drift import Drift, ReferenceChoice
    from lungwatch.db.queries import ResultRow
    from lungwatch.db.rescoring import ModelRow, ScoredPair
    from lungwatch.db.statistics import Statistics


def print_drift(
    home: Path | None,
    config_path: Path | None,
    reference: "ReferenceChoice | None",
    *,
    as_json: bool,
) -> None:
    """Look for drift and print what is found.

    Parameters
    ----------
    reference
        "site" or "bundle"; None: as configured.

    Raises
    ------
    ModelError
        If the bundle is damaged, or has no reference of its own and that is asked for.
    """
    from lungwatch.bundle import read_bundle
    from lungwatch.comparison import DriftReference
    from lungwatch.daemon.configfile import load_config
    from lungwatch.daemon.monitor.drift import examine_drift
    from lungwatch.daemon.pipeline.model import find_bundle
    from lungwatch.db.maintenance import open_existing

    config = load_config(config_path, home)
    chosen = reference or config.drift_reference
    files = read_bundle(find_bundle(config.model, config.home))
    files.check_digests()
    bundle = DriftReference.from_json(files.drift) if files.drift is not None else None
    engine = open_existing(config.database_url)
    try:
        found = examine_drift(
            engine, files.model_sha256, bundle, reference=chosen, since=config.drift_since
        )
    finally:
        engine.dispose()
    if as_json:
        print_json(found)
    else:
        _print(found, files.id)


def _print(found: "Drift", model: str) -> None:
    click.echo(f"Model {cell_text(model)}. Drift: {cell_text(found.summary())}\n")
    if found.scopes:
        print_table(
            ("station", "results", "compared with"),
            [(one.station or "(all)", one.results, one.reference) for one in found.scopes],
        )
        click.echo()
    if found.tests:
        print_table(
            (
                "station",
                "what",
                "alarm",
                "distance",
                "p",
                "reference",
                "window",
                "differs",
                "since",
            ),
            [
                (
                    test.station or "(all)",
                    test.what,
                    "ALARM" if test.alarm else None,
                    test.statistic,
                    f"{test.p:.1e}",
                    test.reference_count,
                    test.window_count,
                    test.told,
                    test.since,
                )
                for test in found.tests
            ],
        )
        if not any(test.what.startswith("component_") for test in found.tests):
            click.echo(
                "\nThe embedding is not compared: the results have no components, for which the "
                "bundle needs a drift.json (docs/monitoring.md)."
            )
        click.echo(
            f"\nAlarms are wrong in at most 1 of {round(1 / found.false_alarm_rate)} windows of a "
            "station without any shift; they say nothing of accuracy."
        )
    click.echo(RESEARCH_USE_ONLY)


@click.command()
@home_options
@click.option(
    "--model",
    "names",
    multiple=True,
    required=True,
    help="Name-version; twice: the model before, and the one after.",
)
@click.option(
    "--labels",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE.csv",
    help="Known truth, as for `lungwatch calibrate`: for the threshold that keeps the sensitivity.",
)
@json_option
def compare(
    *,
    home: Path | None,
    config_path: Path | None,
    names: tuple[str, ...],
    labels: Path | None,
    as_json: bool,
) -> None:
    """Compare two models on the images that both have scored.

    Agreement, how the score shifts, which decisions change, and the threshold with which the
    second model calls as many positive as the first. `lungwatch rescore` makes the second rows.
    """
    from lungwatch.daemon.configfile import load_config
    from lungwatch.db.maintenance import open_existing
    from lungwatch.db.rescoring import known_models, scored_pairs

    if len(names) != 2:
        raise click.UsageError("give --model twice: the model before, and the one after")
    config = load_config(config_path, home)
    engine = open_existing(config.database_url)
    try:
        models = known_models(engine)
        a, b = _one(models, names[0]), _one(models, names[1])
        if a.id == b.id:
            raise click.UsageError("the two models are one")
        pairs = scored_pairs(engine, a.id, b.id)
        if not pairs:
            raise LungwatchError(
                f"no image was scored by both {a.full_name} and {b.full_name}; `lungwatch rescore "
                f"--model {b.full_name}` scores what is filed"
            )
        covid = None if labels is None else _known_covid(engine, pairs, labels)
        shift = shift_of(pairs, covid)
    finally:
        engine.dispose()
    if as_json:
        print_json({"model_a": a.full_name, "model_b": b.full_name, **_values(shift)})
        return
    click.echo(cell_text(f"{b.full_name} (B) after {a.full_name} (A)") + "\n")
    print_shift(shift)
    click.echo(f"\n{RESEARCH_USE_ONLY}")


def shift_of(pairs: "list[ScoredPair]", covid: list[bool] | None = None) -> "Shift":
    """Measure what the record has of two models; at least one pair."""
    from lungwatch.comparison import measure_shift

    return measure_shift(
        labels_a=[pair.label_a for pair in pairs],
        labels_b=[pair.label_b for pair in pairs],
        probabilities_a=[pair.probability_a for pair in pairs],
        probabilities_b=[pair.probability_b for pair in pairs],
        thresholds_a=[pair.threshold_a for pair in pairs],
        covid=covid,
    )


def print_shift(shift: "Shift") -> None:
    """Print a shift report as people read it."""
    quantiles = ", ".join(f"{rank}: {value:+.3f}" for rank, value in shift.quantiles.items())
    fields: dict[str, object] = {
        "images": shift.images,
        "same label": f"{shift.agreement:.1%}",
        "Cohen's kappa": shift.kappa,
        "score shift": f"mean {shift.mean:+.3f}; quantiles {quantiles}",
        "positive by A": f"{shift.positive_rate:.1%}",
        "threshold of B that calls as many positive": shift.threshold_same_rate,
    }
    if shift.sensitivity is not None:
        fields["sensitivity of A"] = f"{shift.sensitivity:.1%} of {shift.covid_cases} COVID cases"
        fields["threshold of B that finds as many"] = shift.threshold_same_sensitivity
    print_fields(fields)
    if shift.flips:
        click.echo()
        print_table(
            ("before", "after", "images"),
            [(flip.before, flip.after, flip.images) for flip in shift.flips],
        )


def _values(shift: "Shift") -> dict[str, object]:

    return {**asdict(shift), "flipped": shift.flipped}


def _one(models: "list[ModelRow]", name: str) -> "ModelRow":
    """Return the model of a name and version, or of the beginning of its SHA-256."""
    found = [one for one in models if name in (one.full_name, one.name)]
    if not found and len(name) >= 6:
        found = [one for one in models if one.sha256.startswith(name.lower())]
    if len(found) == 1:
        return found[0]
    told = ", ".join(f"{one.full_name} ({one.sha256[:12]})" for one in found or models) or "none"
    if found:
        raise NotFoundError(f"'{name}' is {len(found)} models: {told}; give the digest's beginning")
    raise NotFoundError(f"no results of a model '{name}'; there are: {told}")


def _known_covid(engine: "Engine", pairs: "list[ScoredPair]", labels: Path) -> list[bool]:
    from lungwatch.cli.model import truth_by_image

    truth = truth_by_image(engine, labels)
    return [truth.get(pair.sha256, False) for pair in pairs]


if TYPE_CHECKING:
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
        print_json([row.listed() for row in rows])
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
    from lungwatch.db.deliveries import deliveries_of
    from lungwatch.db.queries import get_result

    with _opened(home, config_path) as (engine, root):
        row = _absolute(get_result(engine, id_or_hash), root)
        deliveries = deliveries_of(engine, row.id)
    if as_json:
        print_json({**row.shown(), "deliveries": deliveries})
        return
    print_fields(row.shown())
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
    from lungwatch.errors import LungwatchError
    from lungwatch.files import write_atomic

    kind = output.suffix.lower()
    if kind not in (".csv", ".json"):
        raise click.BadParameter("the name must end in .csv or .json", param_hint="'-o'")
    rows = _read(home, config_path, chosen)
    text = _csv(rows) if kind == ".csv" else to_json([row.listed() for row in rows]) + "\n"
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
    from lungwatch.db.statistics import stats as count

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
    from lungwatch.daemon.configfile import load_config
    from lungwatch.db.maintenance import open_existing

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
    from lungwatch.db.queries import LIST_KEYS

    return to_csv(LIST_KEYS, [row.listed() for row in rows])
