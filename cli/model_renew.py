"""`lungwatch model renew`: the same network in a bundle made anew."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lungwatch.cli.options import gate_source_options, json_option, label_map_option

if TYPE_CHECKING:
    from lungwatch.training.label_map import LabelMap


@click.command()
@click.argument("bundle", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--version", required=True, help="The new bundle's version, for instance '1.1.0'.")
@click.option(
    "-o",
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    required=True,
    help="Folder in which the new bundle's own folder NAME-VERSION is made.",
)
@gate_source_options
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    help="Data set of the training: gives the scale of the maps, chooses the gate's thresholds, "
    "and its validation and test splits are measured anew.",
)
@click.option(
    "--reference",
    type=click.Path(exists=True, path_type=Path),
    metavar="DATA",
    help="Data set of whose validation split the reference for drift is made (drift.json); else "
    "the bundle keeps its own.",
)
@click.option(
    "--evaluate",
    type=click.Path(path_type=Path),
    multiple=True,
    help="Further data set whose test split is measured anew; repeatable.",
)
@click.option(
    "--notes",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Markdown on the data and their confounds, for the card.",
)
@click.option(
    "--figures",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help='Tables measured elsewhere, for the card: JSON {"title": {"row": {"column": number}}}.',
)
@click.option(
    "--release-gate",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="The release_gate.json that `lungwatch evaluate BUNDLE … --gate -o OUT` wrote, for the "
    "card: its table, failures included.",
)
@click.option("--replace", is_flag=True, help="Replace a bundle of the same version.")
@label_map_option
@json_option
def renew(
    *,
    bundle: Path,
    version: str,
    out: Path,
    gate: Path | None,
    gate_keep: tuple[Path, ...],
    gate_refuse: tuple[Path, ...],
    data: Path | None,
    reference: Path | None,
    evaluate: tuple[Path, ...],
    notes: Path | None,
    figures: Path | None,
    release_gate: Path | None,
    replace: bool,
    labels: "LabelMap | None",
    as_json: bool,
) -> None:
    """Write BUNDLE anew with the same network, in the present form of bundles.

    It gets a content gate, a reference for drift, the peaks of its maps and a new card. Weights,
    calibration, thresholds and golden answers stay as they are. Needs the extra 'train'.
    """
    from lungwatch.export.figures import of_data_sets, read_figures
    from lungwatch.export.gate import GateRequest
    from lungwatch.export.renew import RenewRequest
    from lungwatch.export.renew import renew as renew_bundle

    folder, contract = renew_bundle(
        RenewRequest(
            bundle=bundle,
            version=version,
            folder=out,
            gate=GateRequest(run=gate, data=data, keep=gate_keep, refuse=gate_refuse, labels=labels)
            if gate
            else None,
            data=data,
            reference=reference,
            evaluate=evaluate,
            notes=notes.read_text(encoding="utf-8") if notes else "",
            figures=read_figures(figures) if figures else {},
            release_gate=release_gate,
            replace=replace,
            labels=labels,
        )
    )
    rates = contract.gate.metrics.get("rates", []) if contract.gate else []
    if as_json:
        about = {"bundle": str(folder), "id": contract.id, "map_reference": contract.map_reference}
        click.echo(json.dumps({**about, "metrics": contract.metrics, "rates": rates}, indent=2))
        return
    click.echo(f"{folder}: full colour of the maps at {contract.map_reference}")
    for name_of_set, found in of_data_sets(contract.metrics).items():
        click.echo(f"{name_of_set}: ROC-AUC {found['roc_auc']:.3f}")
    for row in rates:
        click.echo(
            f"gate, {row['pictures_of']}, {row['copies']}: {row['kept']} of {row['pictures']} kept"
        )
