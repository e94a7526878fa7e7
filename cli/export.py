"""`lungwatch export`: from a trained network to a bundle that the daemon runs."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, cast

import click

from lungwatch.cli.options import (
    foreign_options,
    gate_source_options,
    json_option,
    label_map_option,
)

if TYPE_CHECKING:
    from lungwatch.training.calibrate import Rule
    from lungwatch.training.label_map import LabelMap


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--name", required=True, help="The bundle's name, for instance 'baseline'.")
@click.option("--version", required=True, help="The bundle's version, for instance '1.0.0'.")
@click.option(
    "-o",
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    required=True,
    help="Folder in which the bundle's own folder NAME-VERSION is made.",
)
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    help="Data set of the training: proves parity on 50 of its images, measures its validation "
    "and test splits, fixes the scale of its maps and the threshold of a bare .keras file.",
)
@click.option(
    "--evaluate",
    type=click.Path(path_type=Path),
    multiple=True,
    help="Further data set whose test split is measured for the card; repeatable.",
)
@click.option(
    "--notes",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Markdown on the data and their confounds, for the card.",
)
@click.option("--replace", is_flag=True, help="Replace a bundle of the same version.")
@click.option(
    "--int8",
    is_flag=True,
    help="Quantise the convolutions; refused if that costs 0.005 ROC-AUC on the validation split "
    "of --data.",
)
@click.option(
    "--max-mb",
    type=click.FloatRange(min=0, min_open=True),
    default=20.0,
    show_default=True,
    help="Refuse an int8 file of more megabytes.",
)
@click.option(
    "--figures",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help='Tables measured elsewhere, for the card: JSON {"title": {"row": {"column": number}}}.',
)
@click.option(
    "--threshold-rule",
    type=click.Choice(["youden", "balanced"]),
    help="Fix the threshold anew on the validation split of --data: sensitivity + specificity, or "
    "the smaller of both, as large as it can be. A run's own is Youden's.",
)
@gate_source_options
@label_map_option
@foreign_options
@json_option
def export(
    *,
    model: Path,
    name: str,
    version: str,
    out: Path,
    data: Path | None,
    evaluate: tuple[Path, ...],
    notes: Path | None,
    replace: bool,
    int8: bool,
    max_mb: float,
    figures: Path | None,
    threshold_rule: str | None,
    gate: Path | None,
    gate_keep: tuple[Path, ...],
    gate_refuse: tuple[Path, ...],
    labels: "LabelMap | None",
    output: str | None,
    input_range: str | None,
    channels: int | None,
    as_json: bool,
) -> None:
    """Export MODEL, a run folder or a .keras file, as a bundle.

    One ONNX graph with probability, logits, maps for both classes and embedding; refused if
    it does not answer as the Keras network does.
    """
    from lungwatch.export.exporter import ExportRequest
    from lungwatch.export.exporter import export as export_bundle
    from lungwatch.export.figures import of_data_sets, read_figures
    from lungwatch.export.gate import GateRequest
    from lungwatch.training.declared import Declaration

    bundle, contract = export_bundle(
        ExportRequest(
            model=model,
            name=name,
            version=version,
            folder=out,
            data=data,
            evaluate=evaluate,
            notes=notes.read_text(encoding="utf-8") if notes else "",
            replace=replace,
            int8=int8,
            max_mb=max_mb,
            figures=read_figures(figures) if figures else {},
            threshold_rule=cast("Rule | None", threshold_rule),
            gate=GateRequest(run=gate, data=data, keep=gate_keep, refuse=gate_refuse, labels=labels)
            if gate
            else None,
            labels=labels,
            declared=Declaration.parse(output, input_range, channels),
        )
    )
    parity = contract.provenance["parity"]
    quantisation = contract.provenance.get("quantisation")
    if as_json:
        about = {"bundle": str(bundle), "id": contract.id, "parity": parity}
        if quantisation:
            about["quantisation"] = quantisation
        click.echo(json.dumps({**about, "metrics": contract.metrics}, indent=2))
        return
    click.echo(
        f"{bundle}: parity on {parity['images']} images: probability {parity['probability']:.1e}, "
        f"map {parity['cam']:.1e}, map against automatic differentiation {parity['gradient']:.1e}"
    )
    if quantisation:
        for name_of_set, cost in quantisation["fidelity"].items():
            click.echo(
                f"int8, {name_of_set}: ROC-AUC {cost['roc_auc_float']:.4f} to "
                f"{cost['roc_auc_int8']:.4f}, {cost['decisions_changed']} decisions changed"
            )
    for name_of_set, found in of_data_sets(contract.metrics).items():
        click.echo(f"{name_of_set}: ROC-AUC {found['roc_auc']:.3f}")
