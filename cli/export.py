"""Commands that make bundles: `export`, `model renew`, `model keygen`, `model sign`."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from lungwatch.cli.options import (
    any_path,
    apply_all,
    existing_file,
    file_path,
    folder_path,
    foreign_options,
    gate_source_options,
    json_option,
    label_map_option,
    setting,
)
from lungwatch.cli.output import ProgressBar, cell_text, print_json
from lungwatch.errors import ConfigError, ModelError

if TYPE_CHECKING:
    from lungwatch.export.gate import GateRequest
    from lungwatch.training.data.dataset import LabelMap
    from lungwatch.training.evaluation.calibration import Rule


def _bundle_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of a bundle to write, and of the figures on its card."""
    options = [
        click.option("--version", required=True, help="Version of the bundle, e.g. 1.1.0."),
        click.option(
            "-o",
            "--out",
            type=folder_path,
            required=True,
            help="Folder for the bundle, which is a folder NAME-VERSION in it.",
        ),
        click.option(
            "--evaluate",
            type=any_path,
            multiple=True,
            help="Further data set; its test split is evaluated for the card. Repeatable.",
        ),
        click.option(
            "--notes",
            type=existing_file,
            help="Markdown on the data and their confounders, for the card.",
        ),
        click.option(
            "--figures",
            type=existing_file,
            help="Tables of figures measured elsewhere, for the card: JSON "
            '{"title": {"row": {"column": number}}}.',
        ),
        click.option("--replace", is_flag=True, help="Replace a bundle of the same version."),
        gate_source_options,
        label_map_option,
        json_option,
    ]
    return apply_all(options, command)


@click.command()
@click.argument("model", type=any_path)
@click.option("--name", required=True, help="Name of the bundle, e.g. baseline.")
@_bundle_options
@click.option(
    "--data",
    type=any_path,
    help="Training data set: 50 of its images prove parity, its validation and test splits are "
    "evaluated; it sets the scale of the maps and the threshold of a bare .keras file.",
)
@click.option(
    "--int8",
    is_flag=True,
    help="Quantise the convolutions to int8; refused if that costs 0.005 ROC-AUC on the validation "
    "split of --data.",
)
@setting(
    "--max-mb", 20.0, click.FloatRange(min=0, min_open=True), "Maximum size of an int8 model, MB."
)
@click.option(
    "--threshold-rule",
    type=click.Choice(["youden", "balanced"]),
    help="Choose the threshold on the validation split of --data: youden maximises sensitivity + "
    "specificity, balanced the smaller of both. A run has its own, by youden.",
)
@foreign_options
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

    The ONNX graph outputs probability, logits, maps of both classes and embedding. The export is
    refused if its outputs differ from the Keras network's.
    """
    from lungwatch.export.card import read_figures
    from lungwatch.export.exporter import ExportRequest
    from lungwatch.export.exporter import export as export_bundle
    from lungwatch.training.evaluation.scorers import Declaration

    request = ExportRequest(
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
        gate=_gate_request(gate, data, gate_keep, gate_refuse, labels),
        labels=labels,
        declared=Declaration.parse(output, input_range, channels),
    )
    with ProgressBar("reading images") as bar:
        bundle, contract = export_bundle(request, progress=bar.advance)
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
    _print_areas(contract.metrics)


def _gate_request(
    run: Path | None,
    data: Path | None,
    keep: tuple[Path, ...],
    refuse: tuple[Path, ...],
    labels: "LabelMap | None",
) -> "GateRequest | None":
    from lungwatch.export.gate import GateRequest

    if run is None:
        return None
    return GateRequest(run=run, data=data, keep=keep, refuse=refuse, labels=labels)


def _print_areas(metrics: dict[str, Any]) -> None:
    from lungwatch.export.card import of_data_sets

    for name, found in of_data_sets(metrics).items():
        click.echo(f"{name}: ROC-AUC {found['roc_auc']:.3f}")


@click.command()
@click.argument("bundle", type=click.Path(exists=True, file_okay=False, path_type=Path))
@_bundle_options
@click.option(
    "--data",
    type=any_path,
    help="Training data set: sets the scale of the maps and the gate's thresholds; its validation "
    "and test splits are evaluated.",
)
@click.option(
    "--reference",
    type=click.Path(exists=True, path_type=Path),
    metavar="DATA",
    help="Data set whose validation split becomes the drift reference (drift.json); the bundle's "
    "own is kept if not given.",
)
@click.option(
    "--release-gate",
    type=existing_file,
    metavar="FILE",
    help="release_gate.json of `lungwatch evaluate BUNDLE … --gate -o OUT`, for the card.",
)
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
    """Write BUNDLE again in the present format, with the same network.

    It gets a content gate, a drift reference, the peaks of its maps and a new card. Weights,
    calibration, thresholds and golden outputs do not change. Needs the extra 'train'.
    """
    from lungwatch.export.card import read_figures
    from lungwatch.export.renew import RenewRequest
    from lungwatch.export.renew import renew as renew_bundle

    request = RenewRequest(
        bundle=bundle,
        version=version,
        folder=out,
        gate=_gate_request(gate, data, gate_keep, gate_refuse, labels),
        data=data,
        reference=reference,
        evaluate=evaluate,
        notes=notes.read_text(encoding="utf-8") if notes else "",
        figures=read_figures(figures) if figures else {},
        release_gate=release_gate,
        replace=replace,
        labels=labels,
    )
    with ProgressBar("reading images") as bar:
        folder, contract = renew_bundle(request, progress=bar.advance)
    rates = contract.gate.metrics.get("rates", []) if contract.gate else []
    if as_json:
        about = {"bundle": str(folder), "id": contract.id, "map_reference": contract.map_reference}
        click.echo(json.dumps({**about, "metrics": contract.metrics, "rates": rates}, indent=2))
        return
    click.echo(f"{folder}: maps reach full colour at {contract.map_reference}")
    _print_areas(contract.metrics)
    for row in rates:
        click.echo(
            f"gate, {row['pictures_of']}, {row['copies']}: {row['kept']} of {row['pictures']} kept"
        )


_passphrase_option = click.option(
    "--passphrase-file",
    type=file_path,
    help="File with the private key's passphrase, readable only by its owner.",
)


@click.command()
@click.argument("out", type=file_path)
@_passphrase_option
@json_option
def keygen(*, out: Path, passphrase_file: Path | None, as_json: bool) -> None:
    """Make a key pair: the private key OUT and the public key OUT.pub (Ed25519, PEM).

    The private key signs bundles; keep it secret. The public key goes to the servers, whose
    configuration names it: trusted_keys = "PATH". Existing files are not overwritten.
    """
    from lungwatch.signing import write_key_pair

    public = out.with_name(out.name + ".pub")
    key = write_key_pair(out, public, _passphrase(passphrase_file))
    if as_json:
        print_json({"private_key": out, "public_key": public, "fingerprint": key})
    else:
        click.echo(f"{out}: private key, keep it secret\n{public}: public key {key}")


@click.command()
@click.argument("bundle", type=folder_path)
@click.option(
    "--key",
    "key_file",
    required=True,
    type=file_path,
    help="Private key, as written by `lungwatch model keygen`.",
)
@_passphrase_option
@json_option
def sign(*, bundle: Path, key_file: Path, passphrase_file: Path | None, as_json: bool) -> None:
    """Sign the bundle in the folder BUNDLE: its bundle.sig covers model, contract and card.

    The digests and the golden image are checked first. An earlier signature is replaced.
    """
    from lungwatch.bundle import SIGNATURE_FILE, read_bundle
    from lungwatch.daemon.pipeline.model import Classifier
    from lungwatch.files import write_atomic
    from lungwatch.signing import load_private_key
    from lungwatch.signing import sign as sign_statement

    key = load_private_key(key_file, _passphrase(passphrase_file))
    files = read_bundle(bundle)
    contract = Classifier.of(files).contract
    if not contract.id == files.id == bundle.absolute().name:
        raise ModelError(
            f"{bundle}: the folder, bundle.json ('{files.id}') and the model ('{contract.id}') "
            "must have the same name"
        )
    signature = sign_statement(files.statement(), key)
    path = bundle / SIGNATURE_FILE
    try:
        write_atomic(path, signature.to_bytes())
    except OSError as error:
        raise ModelError(f"{path} cannot be written: {error.strerror}") from error
    if as_json:
        print_json({"model": contract.id, "path": bundle, "signer": signature.fingerprint})
    else:
        click.echo(f"{cell_text(contract.id)}: signed by {signature.fingerprint}")


def _passphrase(file: Path | None) -> bytes | None:
    from lungwatch.signing import read_secret

    if file is None:
        return None
    passphrase = read_secret(file).rstrip(b"\r\n")
    if not passphrase:
        raise ConfigError(f"{file} holds no passphrase")
    return passphrase
