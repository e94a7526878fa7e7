"""`lungwatch model`: the model bundles that are there, what they say, whether it is true."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lungwatch import RESEARCH_USE_ONLY
from lungwatch.cli.model_activate import activate
from lungwatch.cli.model_renew import renew
from lungwatch.cli.model_signing import keygen, sign
from lungwatch.cli.options import home_options, json_option
from lungwatch.cli.output import cell_text, print_fields, print_json, print_table
from lungwatch.errors import ModelError

if TYPE_CHECKING:
    from lungwatch.daemon.config import Config
    from lungwatch.daemon.trust import Trust
    from lungwatch.gate import GateContract

_MIB = 1 << 20


@click.group()
def model() -> None:
    """List, show, verify, activate, sign and renew model bundles.

    Research use only; not a medical device.
    """


model.add_command(activate)
model.add_command(keygen)
model.add_command(sign)
model.add_command(renew)


@model.command(name="list")
@home_options
@json_option
def list_command(home: Path | None, config_path: Path | None, as_json: bool) -> None:
    """List the bundles that ship and those in HOME/models."""
    from lungwatch.daemon.model import list_bundles
    from lungwatch.daemon.trust import Trust

    config = _config(home, config_path)
    trust = Trust.of(config)
    found = [_summary(bundle, trust) for bundle in list_bundles(config.home)]
    if as_json:
        print_json(found)
    elif not found:
        click.echo("No model bundles.")
    else:
        print_table(
            ("bundle", "family", "MiB", "threshold", "gate", "figures", "path"),
            [
                (
                    entry["bundle"],
                    entry["error"] or entry["family"],
                    f"{entry['size_bytes'] / _MIB:.1f}",
                    entry["threshold"],
                    ", ".join(entry["gate"]) or "none",
                    _figures(entry["metrics"]),
                    entry["path"],
                )
                for entry in found
            ],
        )
        click.echo(f"\n{RESEARCH_USE_ONLY}")


@model.command()
@click.argument("name_or_path")
@home_options
@json_option
def show(name_or_path: str, home: Path | None, config_path: Path | None, as_json: bool) -> None:
    """Print a model's contract and its card."""
    from lungwatch.bundle import read_bundle
    from lungwatch.daemon.home import Home
    from lungwatch.daemon.model import Classifier, find_bundle
    from lungwatch.daemon.trust import Trust
    from lungwatch.sitecalibration import read_calibration

    config = _config(home, config_path)
    bundle = find_bundle(name_or_path, config.home)
    files = read_bundle(bundle)
    found = Classifier.of(files, trust=Trust.of(config)).contract
    contract = asdict(found)
    site = read_calibration(Home(config.home).calibrations, found.id, files.model_sha256)
    text = None if files.card is None else files.card.decode("utf-8", "replace")
    if as_json:
        told_of_site = None if site is None else {"id": site.id, **asdict(site)}
        print_json({**contract, "path": bundle, "card": text, "site_calibration": told_of_site})
        return
    # The card tells provenance and figures in a form for people.
    told = {"provenance", "metrics"} if text else set()
    print_fields(_flat({name: value for name, value in contract.items() if name not in told}))
    click.echo(f"\n{site.text if site else 'No calibration of this site: the contract decides.'}")
    lines = (text or "This bundle has no card.").splitlines()
    # Whoever made the bundle wrote it: it must not steer the terminal.
    click.echo("\n" + "\n".join(cell_text(line) if line else "" for line in lines))
    click.echo(f"\n{RESEARCH_USE_ONLY}")


@model.command()
@click.argument("name_or_path", required=False)
@home_options
@json_option
def verify(
    name_or_path: str | None, home: Path | None, config_path: Path | None, as_json: bool
) -> None:
    """Prove that a bundle is what it says.

    Its digest and contract are checked, whose it is (where 'trusted_keys' is set, a trusted
    signer's), and its golden picture is replayed on this machine. Without a name, the bundle
    that the daemon would use.
    """
    from lungwatch.bundle import read_bundle
    from lungwatch.daemon.model import Classifier, find_bundle
    from lungwatch.daemon.trust import Trust

    config = _config(home, config_path)
    files = read_bundle(find_bundle(name_or_path or config.model, config.home))
    trust = Trust.of(config)
    classifier = Classifier.of(files, trust=trust)
    provenance = trust.provenance(files)
    gate = classifier.contract.gate
    told = f"content gate: {_checks(gate)}" if gate else "no content gate"
    drift = classifier.drift.source if classifier.drift else None
    if as_json:
        print_json(
            {
                "model": classifier.contract.id,
                "sha256": classifier.sha256,
                "path": files.folder,
                "signer": provenance.signer,
                "shipped": provenance.is_shipped,
                "trusted": provenance.is_trusted,
                "gate": [] if gate is None else [check.name for check in gate.checks],
                "drift": drift,
            }
        )
    else:
        click.echo(
            f"{cell_text(classifier.contract.id)}: digest, contract and golden picture are right "
            f"(SHA-256 {classifier.sha256}); {told}; reference for drift: "
            f"{cell_text(drift or 'none')}; {provenance.text}"
        )


def _checks(gate: "GateContract") -> str:
    return ", ".join(f"{cell_text(check.name)} from {check.threshold:.3f}" for check in gate.checks)


def _config(home: Path | None, config_path: Path | None) -> "Config":
    from lungwatch.daemon.config import load_config

    return load_config(config_path, home)


def _summary(bundle: Path, trust: "Trust") -> dict[str, Any]:
    """Describe a bundle; a broken one is listed with what is wrong with it."""
    entry: dict[str, Any] = {
        "bundle": bundle.name,
        "name": None,
        "version": None,
        "family": None,
        "size_bytes": sum(file.stat().st_size for file in bundle.iterdir() if file.is_file()),
        "threshold": None,
        "findings": [],
        "gate": [],
        "metrics": {},
        "path": str(bundle),
        "error": None,
    }
    from lungwatch.contract import COVID_FINDING
    from lungwatch.daemon.model import Classifier

    try:
        contract = Classifier.load(bundle, trust=trust).contract
    except ModelError as error:
        return {**entry, "error": str(error)}
    return {
        **entry,
        "name": contract.name,
        "version": contract.version,
        "family": contract.family,
        "threshold": contract.decision.threshold,
        "findings": [COVID_FINDING, *(finding.name for finding in contract.findings)],
        "gate": [check.name for check in contract.gate.checks] if contract.gate else [],
        "metrics": contract.metrics,
    }


def _figures(metrics: dict[str, Any]) -> str:
    """Return the AUC and accuracy of each data set, where a contract has them."""
    parts = []
    for dataset, figures in metrics.items():
        if isinstance(figures, dict):
            named = [
                f"{name} {figures[key]:.3f}"
                for key, name in (("roc_auc", "AUC"), ("accuracy", "accuracy"))
                if isinstance(figures.get(key), float)
            ]
            if named:
                parts.append(f"{dataset}: {' '.join(named)}")
    return "; ".join(parts)


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            is_nested = isinstance(value, dict) or (
                isinstance(value, tuple) and any(isinstance(one, dict) for one in value)
            )
            flat[prefix + name] = json.dumps(value) if is_nested else value
    return flat
