"""Commands that make bundles: `export`, `model renew`, `model keygen`, `model sign`."""

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
from lungwatch.cli.output import cell_text, print_json

if TYPE_CHECKING:
    from lungwatch.training.data.dataset import LabelMap
    from lungwatch.training.evaluation.calibration import Rule


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
    from lungwatch.export.card import of_data_sets, read_figures
    from lungwatch.export.exporter import ExportRequest
    from lungwatch.export.exporter import export as export_bundle
    from lungwatch.export.gate import GateRequest
    from lungwatch.training.evaluation.foreign import Declaration

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
    from lungwatch.export.card import of_data_sets, read_figures
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


_passphrase_option = click.option(
    "--passphrase-file",
    type=click.Path(dir_okay=False, path_type=Path),
    help="File with the private key's passphrase, readable by its owner alone.",
)


@click.command()
@click.argument("out", type=click.Path(dir_okay=False, path_type=Path))
@_passphrase_option
@json_option
def keygen(out: Path, passphrase_file: Path | None, as_json: bool) -> None:
    """Make a key pair: the private key OUT, the public key OUT.pub (Ed25519, PEM).

    The private key signs bundles and stays with who answers for them. The public key goes to
    the servers, whose configuration names it: trusted_keys = "PATH". Nothing is overwritten.
    """
    from lungwatch.signing import write_key_pair

    public = out.with_name(out.name + ".pub")
    key = write_key_pair(out, public, _passphrase(passphrase_file))
    if as_json:
        print_json({"private_key": out, "public_key": public, "fingerprint": key})
    else:
        click.echo(f"{out}: private key, keep it to yourself\n{public}: public key {key}")


@click.command()
@click.argument("bundle", type=click.Path(file_okay=False, path_type=Path))
@click.option(
    "--key",
    "key_file",
    required=True,
    type=click.Path(dir_okay=False, path_type=Path),
    help="The private key, as `lungwatch model keygen` writes it.",
)
@_passphrase_option
@json_option
def sign(bundle: Path, key_file: Path, passphrase_file: Path | None, as_json: bool) -> None:
    """Sign the bundle in the folder BUNDLE: its bundle.sig covers model, contract and card.

    The digests and the golden picture are checked first. An earlier signature is replaced.
    """
    from lungwatch.bundle import SIGNATURE_FILE, read_bundle
    from lungwatch.daemon.pipeline.model import Classifier
    from lungwatch.errors import ModelError
    from lungwatch.files import write_atomic
    from lungwatch.signing import load_private_key
    from lungwatch.signing import sign as sign_statement

    key = load_private_key(key_file, _passphrase(passphrase_file))
    files = read_bundle(bundle)
    contract = Classifier.of(files).contract
    if not contract.id == files.id == bundle.absolute().name:
        raise ModelError(
            f"{bundle}: the folder, bundle.json ('{files.id}') and the model ('{contract.id}') "
            "must bear one name"
        )
    signature = sign_statement(files.statement(), key)
    try:
        write_atomic(bundle / SIGNATURE_FILE, signature.to_bytes())
    except OSError as error:
        raise ModelError(
            f"{bundle / SIGNATURE_FILE} cannot be written: {error.strerror}"
        ) from error
    if as_json:
        print_json({"model": contract.id, "path": bundle, "signer": signature.fingerprint})
    else:
        click.echo(f"{cell_text(contract.id)}: signed by {signature.fingerprint}")


def _passphrase(file: Path | None) -> bytes | None:
    from lungwatch.errors import ConfigError
    from lungwatch.signing import read_secret

    if file is None:
        return None
    passphrase = read_secret(file).rstrip(b"\r\n")
    if not passphrase:
        raise ConfigError(f"{file} holds no passphrase")
    return passphrase
