"""`lungwatch model list/show/verify/activate`, and `lungwatch calibrate`."""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lungwatch import RESEARCH_USE_ONLY, __version__
from lungwatch.cli.export import keygen, renew, sign
from lungwatch.cli.main import Site, audited, home_options
from lungwatch.cli.options import existing_file, json_option, setting
from lungwatch.cli.output import cell_text, print_fields, print_json, print_table
from lungwatch.errors import ConfigError, LungwatchError, ModelError

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from lungwatch.bundle import SiteCalibration
    from lungwatch.contract import GateContract
    from lungwatch.daemon.pipeline.model import BundlePolicy, Classifier

_MIB = 1 << 20

# Above these, `activate` asks before it changes the configuration.
_MAX_FLIPPED = 0.05
_MIN_COMPARED = 30


@click.group()
def model() -> None:
    """List, show, verify, activate, sign and renew model bundles.

    Research use only; not a medical device.
    """


model.add_command(keygen)
model.add_command(sign)
model.add_command(renew)


@model.command(name="list")
@home_options
@json_option
def list_command(site: Site, *, as_json: bool) -> None:
    """List the bundles that ship with lungwatch and those in HOME/models."""
    from lungwatch.daemon.pipeline.model import BundlePolicy, list_bundles

    trust = BundlePolicy.of(site.config)
    found = [_summary(bundle, trust) for bundle in list_bundles(site.config.home)]
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
def show(site: Site, *, name_or_path: str, as_json: bool) -> None:
    """Print a model's contract and its card."""
    from lungwatch.bundle import read_bundle, read_calibration
    from lungwatch.daemon.pipeline.model import BundlePolicy, Classifier, find_bundle

    bundle = find_bundle(name_or_path, site.config.home)
    files = read_bundle(bundle)
    found = Classifier.of(files, trust=BundlePolicy.of(site.config)).contract
    contract = asdict(found)
    calibration = read_calibration(site.home.calibrations, found.id, files.model_sha256)
    card = None if files.card is None else files.card.decode("utf-8", "replace")
    if as_json:
        site_calibration = calibration and {"id": calibration.id, **asdict(calibration)}
        print_json({**contract, "path": bundle, "card": card, "site_calibration": site_calibration})
        return
    # The card has provenance and figures in a form for people.
    in_card = {"provenance", "metrics"} if card else set()
    print_fields(_flat({name: value for name, value in contract.items() if name not in in_card}))
    click.echo(
        "\n" + (calibration.text if calibration else "No site calibration: the contract's applies.")
    )
    lines = (card or "This bundle has no card.").splitlines()
    # A card comes from outside and may hold terminal escape sequences.
    click.echo("\n" + "\n".join(cell_text(line) if line else "" for line in lines))
    click.echo(f"\n{RESEARCH_USE_ONLY}")


@model.command()
@click.argument("name_or_path", required=False)
@home_options
@json_option
def verify(site: Site, *, name_or_path: str | None, as_json: bool) -> None:
    """Verify a bundle: digests, contract, signature, golden image.

    The signature must be a trusted signer's where 'trusted_keys' is set, and the golden image is
    replayed on this machine. Without a name, the bundle that the daemon would use.
    """
    from lungwatch.bundle import read_bundle
    from lungwatch.daemon.pipeline.model import BundlePolicy, Classifier, find_bundle

    files = read_bundle(find_bundle(name_or_path or site.config.model, site.config.home))
    trust = BundlePolicy.of(site.config)
    classifier = Classifier.of(files, trust=trust)
    provenance = trust.provenance(files)
    gate = classifier.contract.gate
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
            f"{cell_text(classifier.contract.id)}: digest, contract and golden image are right "
            f"(SHA-256 {classifier.sha256}); {_gate_text(gate)}; drift reference: "
            f"{cell_text(drift or 'none')}; {provenance.text}"
        )


def _gate_text(gate: "GateContract | None") -> str:
    if gate is None:
        return "no content gate"
    checks = (f"{cell_text(check.name)} from {check.threshold:.3f}" for check in gate.checks)
    return f"content gate: {', '.join(checks)}"


def _summary(bundle: Path, trust: "BundlePolicy") -> dict[str, Any]:
    """Describe a bundle; a broken one by its error."""
    from lungwatch.contract import COVID_FINDING
    from lungwatch.daemon.pipeline.model import Classifier

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
    """Return ROC-AUC and accuracy of each data set of a contract."""
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
    """Return nested values under dotted names; tuples of objects as JSON."""
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


@model.command()
@click.argument("name_or_path")
@home_options
@click.option("--yes", is_flag=True, help="Do not ask for confirmation.")
def activate(site: Site, *, name_or_path: str, yes: bool) -> None:
    """Make the daemon use another bundle from its next start on.

    The bundle is verified first, as by `model verify`, and compared with the current model on the
    images that both have scored (`lungwatch rescore --model NAME` scores them). Confirmation is
    asked for if more than 5 % of the decisions change, there are fewer than 30 images to compare,
    the model has no content gate, or a site calibration would no longer apply. Only the key
    'model' of the configuration file is changed.
    """
    from lungwatch.daemon.configfile import set_text
    from lungwatch.daemon.pipeline.model import BundlePolicy, Classifier, find_bundle, list_bundles

    config = site.config
    if "LUNGWATCH_MODEL" in os.environ:
        raise ConfigError(
            "LUNGWATCH_MODEL in the environment overrides the configuration file; unset it"
        )
    folder = find_bundle(name_or_path, config.home)
    trust = BundlePolicy.of(config)
    wanted = Classifier.load(folder, trust=trust)
    by_name = (one for one in list_bundles(config.home) if one.name == folder.name)
    value = folder.name if next(by_name, None) == folder else str(folder.absolute())
    path = site.config_path or config.home / "lungwatch.toml"
    with site.database(migrate=True, owned=True) as engine:
        detail: dict[str, object] = {"before": config.model}
        try:
            current = Classifier.load(find_bundle(config.model, config.home), trust=trust)
        except LungwatchError as error:
            doubts = [f"the current model, {config.model}, cannot be loaded: {error}"]
        else:
            if current.sha256 == wanted.sha256 and value == config.model:
                click.echo(cell_text(f"{wanted.contract.id} is the current model"))
                return
            doubts, compared = _compare_with_current(engine, site, current, wanted)
            detail |= compared
        if doubts and not yes:
            _confirm(wanted.contract.id, doubts)
        with audited(engine, "model activate", f"model {wanted.contract.id}", detail):
            set_text(path, "model", value)
    click.echo(cell_text(f"{path}: model = {value}; the daemon uses it after its next start"))


def _compare_with_current(
    engine: "Engine", site: Site, current: "Classifier", wanted: "Classifier"
) -> tuple[list[str], dict[str, object]]:
    """Print the shift between the models; return reasons to ask first, and figures for audit."""
    # At the top it would load the database package for every command of the group.
    from lungwatch.bundle import read_calibration
    from lungwatch.cli.results import print_shift, shift_of
    from lungwatch.db.rescoring import known_models, scored_pairs

    doubts = []
    if wanted.gate is None and current.gate is not None:
        doubts.append("it has no content gate, which refuses pictures of anything but a chest")
    before, after = (
        read_calibration(site.home.calibrations, one.contract.id, one.sha256)
        for one in (current, wanted)
    )
    if before is not None and after is None:
        doubts.append(
            f"{current.contract.id} has a site calibration, and it has none "
            f"(`lungwatch calibrate --model {wanted.contract.id}`)"
        )
    if current.sha256 == wanted.sha256:
        return doubts, {}
    ids = {model.sha256: model.id for model in known_models(engine)}
    a, b = ids.get(current.sha256), ids.get(wanted.sha256)
    pairs = [] if a is None or b is None else scored_pairs(engine, a, b)
    if not pairs:
        doubts.append(
            f"no image was scored by both (`lungwatch rescore --model {wanted.contract.id}`)"
        )
        return doubts, {"compared": 0}
    shift = shift_of(pairs)
    click.echo(cell_text(f"{wanted.contract.id} (B) after {current.contract.id} (A)") + "\n")
    print_shift(shift)
    click.echo()
    if shift.images < _MIN_COMPARED:
        doubts.append(f"only {shift.images} images were scored by both")
    if shift.flipped > _MAX_FLIPPED:
        doubts.append(f"{shift.flipped:.1%} of {shift.images} decisions change")
    return doubts, {"compared": shift.images, "flipped": round(shift.flipped, 6)}


def _confirm(model_id: str, doubts: list[str]) -> None:
    """Ask for confirmation; without a terminal, refuse."""
    reasons = "; ".join(doubts)
    if not sys.stdin.isatty():
        raise LungwatchError(
            f"{model_id} is not activated: {reasons}; give --yes to activate it all the same"
        )
    click.confirm(cell_text(f"{model_id}: {reasons}. Activate it all the same?"), abort=True)


@click.command()
@home_options
@click.option(
    "--labels",
    type=existing_file,
    metavar="FILE.csv",
    help="Truth file: a column sha256, sop_uid, id (of the result) or accession, and a column "
    "truth with COVID or other.",
)
@setting(
    "--error",
    0.05,
    click.FloatRange(0.001, 0.5, max_open=True),
    "Maximum share of each class that gets the other class's label.",
)
@click.option("--model", help="Bundle, by name or path; the configured one if not given.")
@click.option("--remove", is_flag=True, help="Remove the site calibration: the bundle's applies.")
@click.option("--dry-run", is_flag=True, help="Print the result, write nothing.")
@json_option
def calibrate(
    *,
    site: Site,
    labels: Path | None,
    error: float,
    model: str | None,
    remove: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Calibrate probability, threshold and uncertain band on this site's own cases.

    From results whose truth is known: Platt scaling of the recorded logits, and an uncertain band
    by conformal prediction, such that at most the given share of each class gets the other
    class's label. Needs at least 30 cases of each class, one a patient. The calibration is
    stored in HOME/calibrations, the daemon loads it at its next start, and every result names the
    calibration that decided it. Existing results do not change.
    """
    from lungwatch.bundle import calibration_path, remove_calibration, write_calibration
    from lungwatch.daemon.pipeline.model import BundlePolicy, Classifier, find_bundle

    if (labels is None) != remove:
        raise click.UsageError("give either --labels FILE.csv or --remove")
    folder = site.home.calibrations
    bundle = find_bundle(model or site.config.model, site.config.home)
    classifier = Classifier.load(bundle, trust=BundlePolicy.of(site.config))
    name, sha256 = classifier.contract.id, classifier.sha256
    path = calibration_path(folder, name, sha256)
    target = f"model {name}"
    with site.database(migrate=True, owned=True) as engine:
        if labels is None:
            if not path.exists():
                raise LungwatchError(f"there is no calibration of {name} in {folder}")
            if not dry_run:
                with audited(engine, "calibrate", target, {"removed": True}), _writing(path):
                    remove_calibration(folder, name, sha256)
            if as_json:
                print_json({"model": name, "removed": not dry_run, "path": path})
            else:
                done = "would be removed" if dry_run else "removed"
                click.echo(f"{path} {done}; the bundle's calibration applies from the next start")
            return
        record, counts = _fit(engine, labels, error=error, model=name, model_sha256=sha256)
        if not dry_run:
            detail = {"calibration": record.id, "error": error, **counts}
            with audited(engine, "calibrate", target, detail), _writing(path):
                write_calibration(folder, record)
    if as_json:
        told = {"id": record.id, **asdict(record)}
        print_json({**told, "cases": counts, "path": None if dry_run else path})
    else:
        _print_calibration(record, path, dry_run=dry_run)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise LungwatchError(f"cannot write {path}: {error.strerror}") from error


def _fit(
    engine: "Engine", labels: Path, *, error: float, model: str, model_sha256: str
) -> tuple["SiteCalibration", dict[str, int]]:
    """Match truths with results, print what does not match, and fit."""
    from lungwatch.cli.results import identify_truths
    from lungwatch.db.rescoring import known_cases, scored_cases
    from lungwatch.training.evaluation.calibration import calibrate_site, named, read_truths

    truths = read_truths(labels)
    cases = scored_cases(engine, model_sha256)
    covid, unknown = identify_truths(truths, cases)
    known = known_cases(cases, covid)
    counts = {
        "matched": len(known.covid),
        "unknown": len(unknown),
        "unknown_labels": sum(truths.unknown_labels.values()),
        "contradictory": len(truths.contradictory),
        "unscored": known.unscored,
        "repeated_patients": known.repeated,
    }
    remarks = {
        "unknown": ("identifiers that are not in the database", named(unknown)),
        "unknown_labels": ("lines with neither COVID nor other", named(truths.unknown_labels)),
        "contradictory": ("identifiers with both truths, left out", named(truths.contradictory)),
        "unscored": (
            f"images without a score of {model}",
            f"`lungwatch rescore --model {model}` scores them",
        ),
        "repeated_patients": ("further images of the same patients, left out", "one a patient"),
    }
    for name, (what, remark) in remarks.items():
        if counts[name]:
            click.echo(cell_text(f"{what}: {counts[name]} ({remark})"), err=True)
    record = calibrate_site(
        targets=known.covid,
        logits=known.logits,
        error=error,
        model=model,
        model_sha256=model_sha256,
        made_at=datetime.now(UTC),
        made_with=__version__,
    )
    return record, counts


def _print_calibration(record: "SiteCalibration", path: Path, *, dry_run: bool) -> None:
    decision = record.decision
    print_fields(
        {
            "calibration": record.id,
            "model": record.model,
            "cases": f"{record.covid_cases} COVID, {record.other_cases} other",
            "error": f"at most {record.error:.1%} of each class gets the other class's label",
            "threshold": decision.threshold,
            "uncertain": f"from {decision.uncertain_low:.4f} to {decision.uncertain_high:.4f}",
            "abstention": f"{record.abstention:.1%} of these cases ({record.covid_abstention:.1%} "
            f"of COVID, {record.other_abstention:.1%} of the others)",
            "probability": f"slope {record.calibration.slope:.4g}, "
            f"intercept {record.calibration.intercept:.4g}; ECE {record.ece:.3f} on these cases",
            "AUC": record.roc_auc,
            "method": record.method,
            "file": "none (dry run)" if dry_run else path,
        }
    )
    if not dry_run:
        click.echo("\nThe daemon uses it from its next start on.")
    click.echo(f"\n{RESEARCH_USE_ONLY}")
