"""`lungwatch results`: list, show, export, count and compare results."""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import click

from lungwatch import RESEARCH_USE_ONLY
from lungwatch.cli.main import Served, Site, audited, record_event
from lungwatch.cli.options import (
    csv_option,
    existing_file,
    file_path,
    filter_options,
    json_option,
    one_format,
)
from lungwatch.cli.output import cell_text, print_fields, print_json, print_table, to_csv, to_json
from lungwatch.cli.query import reader_options
from lungwatch.errors import LungwatchError, NotFoundError
from lungwatch.files import write_atomic

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from lungwatch.comparison import Shift
    from lungwatch.daemon.monitor.drift import Drift, ReferenceChoice
    from lungwatch.db.queries import ResultFilter, ResultRow
    from lungwatch.db.rescoring import ModelRow, ScoredCase, ScoredPair
    from lungwatch.db.statistics import Statistics
    from lungwatch.training.evaluation.calibration import Truths

    Row = TypeVar("Row", bound=ResultRow)


@click.group()
def results() -> None:
    """Query, export, count and compare results. Research use only; not a medical device."""


@results.command(name="list")
@reader_options
@filter_options()
@json_option
@csv_option
def list_command(site: Site, *, selected: "ResultFilter", as_json: bool, as_csv: bool) -> None:
    """List results, newest first."""
    one_format(as_json=as_json, as_csv=as_csv)
    rows = _read(site, selected, "results list")
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
@reader_options
@json_option
def show(site: Site, *, id_or_hash: str, as_json: bool) -> None:
    """Show all fields of one result.

    Named by its number, or by the first six or more characters of its file's SHA-256.
    """
    from lungwatch.db.deliveries import deliveries_of
    from lungwatch.db.queries import get_result

    with site.database() as engine:
        row = _with_full_paths(get_result(engine, id_or_hash), site.home.root)
        deliveries = deliveries_of(engine, row.id)
        record_event(engine, "results show", targets=[f"result {row.id}"])
    if as_json:
        print_json({**row.shown(), "deliveries": deliveries})
        return
    print_fields(row.shown())
    for delivery in deliveries:
        # The destination's answer may hold terminal escape sequences.
        error = f" ({cell_text(delivery.error)})" if delivery.error else ""
        click.echo(f"{delivery.kind} to {delivery.destination}: {delivery.state}{error}")
    click.echo(f"\n{RESEARCH_USE_ONLY}")


@results.command()
@click.option(
    "-o",
    "--output",
    required=True,
    type=file_path,
    help="FILE.csv or FILE.json, written atomically.",
)
@reader_options
@filter_options()
def export(site: Site, *, output: Path, selected: "ResultFilter") -> None:
    """Write results to a CSV or JSON file, newest first."""
    kind = output.suffix.lower()
    if kind not in (".csv", ".json"):
        raise click.BadParameter("the name must end in .csv or .json", param_hint="'-o'")
    rows = _read(site, selected)
    data = (
        _csv(rows) if kind == ".csv" else to_json([row.listed() for row in rows]) + "\n"
    ).encode()
    # The audit names the content: the file's name may hold a patient's.
    target = f"sha256 {hashlib.sha256(data).hexdigest()}"
    detail = {"results": len(rows), "format": kind[1:]}
    with site.database() as engine, audited(engine, "results export", target, detail):
        if click.get_current_context().find_object(Served):
            click.echo(data, nl=False)
            return
        try:
            write_atomic(output, data)
        except OSError as error:
            raise LungwatchError(f"cannot write {output}: {error.strerror}") from error
    click.echo(f"{len(rows)} results written to {cell_text(output)}")


@results.command()
@reader_options
@filter_options()
@click.option(
    "--drift",
    is_flag=True,
    help="Compare the newest results of the configured model with a reference, by station.",
)
@click.option(
    "--reference",
    type=click.Choice(["site", "bundle"]),
    help="Reference for --drift; 'monitor.drift_reference' if not given.",
)
@json_option
def stats(
    site: Site,
    *,
    drift: bool,
    reference: "ReferenceChoice | None",
    as_json: bool,
    selected: "ResultFilter",
) -> None:
    """Count results and their scores.

    By day of receipt, status, label, reason, flag and model, and by tenth of the probability.
    With --drift: which figures and tags of the newest results are distributed differently from
    the site's first results, or from the model's training; at most one in 1,000 windows without
    any shift raises an alarm.
    """
    from lungwatch.db.queries import ResultFilter
    from lungwatch.db.statistics import stats as count

    if drift:
        if selected != ResultFilter():
            raise click.UsageError("--drift uses the newest results: it takes no filter")
        _print_drift(site, reference, as_json=as_json)
        return
    if reference:
        raise click.UsageError("--reference goes with --drift")
    with site.database() as engine:
        counted = count(engine, selected)
        _record_read(engine, "results stats", counted.results, selected)
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


def _read(site: Site, selected: "ResultFilter", action: str | None = None) -> "list[ResultRow]":
    """Return results once the audit trail has that they are read; without an action, at once."""
    from lungwatch.db.queries import list_results

    with site.database() as engine:
        rows = list_results(engine, selected)
        if action is not None:
            _record_read(engine, action, len(rows), selected)
    return [_with_full_paths(row, site.home.root) for row in rows]


def _record_read(engine: "Engine", action: str, results: int, selected: "ResultFilter") -> None:
    """Write to the audit trail what is about to be printed; what cannot be is not printed."""
    # Their names alone: a value may be a patient's.
    filters = [name for name, value in vars(selected).items() if value is not None]
    record_event(engine, action, detail={"results": results, "filters": filters})


def _with_full_paths(row: "Row", root: Path) -> "Row":
    return replace(
        row,
        overlay=None if row.overlay is None else str(root / row.overlay),
        file=None if row.file is None else str(root / row.file),
    )


def _csv(rows: "Sequence[ResultRow]") -> str:
    from lungwatch.db.queries import LIST_KEYS

    return to_csv(LIST_KEYS, [row.listed() for row in rows])


def _print_drift(site: Site, reference: "ReferenceChoice | None", *, as_json: bool) -> None:
    """Compare the newest results with the reference, by default the configured one."""
    from lungwatch.bundle import read_bundle
    from lungwatch.comparison import DriftReference
    from lungwatch.daemon.monitor.drift import examine_drift
    from lungwatch.daemon.pipeline.model import find_bundle

    config = site.config
    files = read_bundle(find_bundle(config.model, config.home))
    files.check_digests()
    with site.database() as engine:
        found = examine_drift(
            engine,
            files.model_sha256,
            DriftReference.from_json(files.drift) if files.drift is not None else None,
            reference=reference or config.drift_reference,
            since=config.drift_since,
        )
        record_event(engine, "results stats", detail={"filters": ["drift"]})
    if as_json:
        print_json(found)
        return
    click.echo(f"Model {cell_text(files.id)}. Drift: {cell_text(found.summary())}\n")
    if found.scopes:
        print_table(
            ("station", "results", "compared with"),
            [(one.station or "(all)", one.results, one.reference) for one in found.scopes],
        )
        click.echo()
    if found.tests:
        _print_drift_tests(found)
    click.echo(RESEARCH_USE_ONLY)


def _print_drift_tests(found: "Drift") -> None:
    print_table(
        ("station", "what", "alarm", "distance", "p", "reference", "window", "differs", "since"),
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
            "\nThe embedding is not compared: the results have no components, which need a bundle "
            "with a drift.json (docs/monitoring.md)."
        )
    click.echo(
        f"\nAt most 1 in {round(1 / found.false_alarm_rate)} windows of a station without any "
        "shift raises a false alarm; alarms are no measure of accuracy."
    )


@results.command()
@reader_options
@click.option(
    "--model",
    "names",
    multiple=True,
    required=True,
    help="NAME-VERSION; given twice: the earlier model (A), then the later one (B).",
)
@click.option(
    "--labels",
    type=existing_file,
    metavar="FILE.csv",
    help="Truth file as for `lungwatch calibrate`: adds the threshold of equal sensitivity.",
)
@json_option
def compare(site: Site, *, names: tuple[str, ...], labels: Path | None, as_json: bool) -> None:
    """Compare two models on the images that both have scored.

    Agreement, shift of the score, changed decisions, and the threshold at which the second model
    calls as many images positive as the first. `lungwatch rescore` makes the second results.
    """
    from lungwatch.db.rescoring import known_models, scored_pairs

    if len(names) != 2:
        raise click.UsageError("give --model twice: the earlier model, then the later one")
    with site.database() as engine:
        models = known_models(engine)
        a, b = _find_model(models, names[0]), _find_model(models, names[1])
        if a.id == b.id:
            raise click.UsageError("both --model name the same model")
        pairs = scored_pairs(engine, a.id, b.id)
        if not pairs:
            raise LungwatchError(
                f"no image was scored by both {a.full_name} and {b.full_name}; `lungwatch rescore "
                f"--model {b.full_name}` scores the processed X-rays"
            )
        record_event(engine, "results compare", detail={"results": len(pairs)})
        shift = shift_of(pairs, None if labels is None else _known_covid(engine, pairs, labels))
    if as_json:
        values = {**asdict(shift), "flipped": shift.flipped}
        print_json({"model_a": a.full_name, "model_b": b.full_name, **values})
        return
    click.echo(cell_text(f"{b.full_name} (B) after {a.full_name} (A)") + "\n")
    print_shift(shift)
    click.echo(f"\n{RESEARCH_USE_ONLY}")


def _find_model(models: "list[ModelRow]", name: str) -> "ModelRow":
    """Return the model of a name and version, or of the first characters of its SHA-256."""
    found = [one for one in models if name in (one.full_name, one.name)]
    if not found and len(name) >= 6:
        found = [one for one in models if one.sha256.startswith(name.lower())]
    if len(found) == 1:
        return found[0]
    listed = ", ".join(f"{one.full_name} ({one.sha256[:12]})" for one in found or models) or "none"
    if found:
        raise NotFoundError(
            f"'{name}' matches {len(found)} models: {listed}; give the start of the SHA-256"
        )
    raise NotFoundError(f"no results of a model '{name}'; there are results of: {listed}")


def identify_truths(
    truths: "Truths", cases: "Sequence[ScoredCase]"
) -> tuple[dict[int, bool], list[str]]:
    """Return the truth of each known image by its number, and the identifiers of none."""
    from lungwatch.db.rescoring import identify
    from lungwatch.training.evaluation.calibration import nearest

    named = identify(cases, truths.kind)
    unknown = {name: covid for name, covid in truths.covid.items() if name not in named}
    if len(unknown) == len(truths.covid):
        raise LungwatchError(
            f"none of the {len(unknown)} identifiers ({truths.kind}) is in the database"
            f"{nearest(unknown, named)}"
        )
    covid = {
        case.image_id: covid for name, covid in truths.covid.items() for case in named.get(name, ())
    }
    return covid, list(unknown)


def _truth_by_image(engine: "Engine", labels: Path) -> dict[str, bool]:
    """Return which recorded images are COVID by a truth file, by SHA-256."""
    from lungwatch.db.rescoring import scored_cases
    from lungwatch.training.evaluation.calibration import read_truths

    cases = scored_cases(engine, "")
    covid, _ = identify_truths(read_truths(labels), cases)
    return {case.sha256: covid[case.image_id] for case in cases if case.image_id in covid}


def _known_covid(engine: "Engine", pairs: "list[ScoredPair]", labels: Path) -> list[bool]:
    truth = _truth_by_image(engine, labels)
    return [truth.get(pair.sha256, False) for pair in pairs]


def shift_of(pairs: "list[ScoredPair]", covid: list[bool] | None = None) -> "Shift":
    """Measure the shift between two models on one or more images that both have scored."""
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
    """Print a shift report."""
    quantiles = ", ".join(f"{rank}: {value:+.3f}" for rank, value in shift.quantiles.items())
    figures: dict[str, object] = {
        "images": shift.images,
        "same label": f"{shift.agreement:.1%}",
        "Cohen's kappa": shift.kappa,
        "score shift": f"mean {shift.mean:+.3f}; quantiles {quantiles}",
        "positive by A": f"{shift.positive_rate:.1%}",
        "threshold of B for equal positives": shift.threshold_same_rate,
    }
    if shift.sensitivity is not None:
        figures["sensitivity of A"] = f"{shift.sensitivity:.1%} of {shift.covid_cases} COVID cases"
        figures["threshold of B for equal sensitivity"] = shift.threshold_same_sensitivity
    print_fields(figures)
    if shift.flips:
        click.echo()
        print_table(
            ("before", "after", "images"),
            [(flip.before, flip.after, flip.images) for flip in shift.flips],
        )
