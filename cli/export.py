"""`lungwatch export`: from a trained network to a bundle that the daemon runs."""

import json
from pathlib import Path

import click

from lungwatch.cli.options import json_option


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
    "and test splits, and fixes the threshold of a bare .keras file.",
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
    as_json: bool,
) -> None:
    """Export MODEL, a run folder or a .keras file, as a bundle.

    One ONNX graph with probability, logits, maps for both classes and embedding; refused if
    it does not answer as the Keras network does.
    """
    from lungwatch.export.exporter import ExportRequest
    from lungwatch.export.exporter import export as export_bundle

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
        )
    )
    parity = contract.provenance["parity"]
    if as_json:
        about = {"bundle": str(bundle), "id": contract.id, "parity": parity}
        click.echo(json.dumps({**about, "metrics": contract.metrics}, indent=2))
        return
    click.echo(
        f"{bundle}: parity on {parity['images']} images: probability {parity['probability']:.1e}, "
        f"map {parity['cam']:.1e}, map against automatic differentiation {parity['gradient']:.1e}"
    )
    for name_of_set, found in contract.metrics.items():
        click.echo(f"{name_of_set}: ROC-AUC {found['roc_auc']:.3f}")
