"""`lungwatch results compare`: what changes from one model to another on the same images."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from lungwatch import RESEARCH_USE_ONLY
from lungwatch.cli.options import home_options, json_option
from lungwatch.cli.output import cell_text, print_fields, print_json, print_table
from lungwatch.errors import LungwatchError, NotFoundError

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from lungwatch.db.scored import KnownModel, Pair
    from lungwatch.shift import Shift


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
    from lungwatch.daemon.config import load_config
    from lungwatch.db.migrate import open_existing
    from lungwatch.db.scored import known_models, scored_pairs

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


def shift_of(pairs: "list[Pair]", covid: list[bool] | None = None) -> "Shift":
    """Measure what the record has of two models; at least one pair."""
    from lungwatch.shift import measure_shift

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
    from dataclasses import asdict

    return {**asdict(shift), "flipped": shift.flipped}


def _one(models: "list[KnownModel]", name: str) -> "KnownModel":
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


def _known_covid(engine: "Engine", pairs: "list[Pair]", labels: Path) -> list[bool]:
    from lungwatch.cli.calibrate import truth_by_image

    truth = truth_by_image(engine, labels)
    return [truth.get(pair.sha256, False) for pair in pairs]
