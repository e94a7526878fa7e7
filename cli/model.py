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
from lungwatch.cli.keeping import note, noting_failure
from lungwatch.cli.options import home_options, json_option
from lungwatch.cli.output import cell_text, print_fields, print_json, print_table
from lungwatch.errors import ConfigError, LungwatchError, ModelError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy import Engine

    from lungwatch.contract import GateContract
    from lungwatch.daemon.config import Config
    from lungwatch.daemon.home import Home
    from lungwatch.daemon.pipeline.model import BundlePolicy, Classifier
    from lungwatch.db.rescoring import ScoredCase
    from lungwatch.sitecalibration import SiteCalibration
    from lungwatch.training.evaluation.calibration import Truths


_ACTION = "model activate"

_MOST_FLIPPED = 0.05

_LEAST_COMPARED = 30

_VARIABLE = "LUNGWATCH_MODEL"


@click.command()
@click.argument("name_or_path")
@home_options
@click.option("--yes", is_flag=True, help="Do not ask.")
def activate(name_or_path: str, home: Path | None, config_path: Path | None, yes: bool) -> None:
    """Have the daemon use another bundle from its next start on.

    The bundle is verified first, as by `model verify`, and compared with the model in use on the
    images that both have scored (`lungwatch rescore --model NAME` makes them). It asks before
    more than 5 % of the decisions change, with fewer than 30 images to compare, for a model
    without a content gate, and where a site calibration would be lost. It writes the key 'model'
    into the configuration file, and leaves the rest of the file as it is.
    """
    from lungwatch.daemon.configfile import load_config, set_text
    from lungwatch.daemon.home import Home, check_database
    from lungwatch.daemon.pipeline.model import BundlePolicy, Classifier, find_bundle, list_bundles
    from lungwatch.db.maintenance import open_database

    config = load_config(config_path, home)
    if _VARIABLE in os.environ:
        raise ConfigError(
            f"{_VARIABLE} is set in the environment and overrides the configuration file; unset it"
        )
    folder = find_bundle(name_or_path, config.home)
    trust = BundlePolicy.of(config)
    wanted = Classifier.load(folder, trust=trust)
    by_name = (one for one in list_bundles(config.home) if one.name == folder.name)
    value = folder.name if next(by_name, None) == folder else str(folder.absolute())
    path = config_path or config.home / "lungwatch.toml"
    place = Home(config.home)
    engine = open_database(config.database_url)
    try:
        check_database(place, engine)
        try:
            current: Classifier | None = Classifier.load(
                find_bundle(config.model, config.home), trust=trust
            )
        except LungwatchError as error:
            current = None
            doubts = [f"the model in use, {config.model}, cannot be loaded: {error}"]
        detail: dict[str, object] = {"before": config.model}
        if current is not None:
            if current.sha256 == wanted.sha256 and value == config.model:
                click.echo(cell_text(f"{wanted.contract.id} is the model in use"))
                return
            doubts, compared = _doubts(engine, place, current, wanted)
            detail |= compared
        if doubts and not yes:
            _ask(wanted.contract.id, doubts)
        targets = [f"model {wanted.contract.id}"]
        with noting_failure(engine, _ACTION, targets):
            set_text(path, "model", value)
        note(engine, _ACTION, targets=targets, detail=detail)
    finally:
        engine.dispose()
    click.echo(
        cell_text(f"{path}: model = {value}; a running daemon uses it once it is started again")
    )


def _doubts(
    engine: "Engine", home: "Home", current: "Classifier", wanted: "Classifier"
) -> tuple[list[str], dict[str, object]]:
    """Compare, print the shift, and return what speaks for asking first, and figures for audit."""
    from lungwatch.cli.results import print_shift, shift_of
    from lungwatch.db.rescoring import known_models, scored_pairs
    from lungwatch.sitecalibration import read_calibration

    doubts = []
    if wanted.gate is None and current.gate is not None:
        doubts.append("it has no content gate: whatever the file says is a chest is scored")
    site, own = (
        read_calibration(home.calibrations, one.contract.id, one.sha256)
        for one in (current, wanted)
    )
    if site is not None and own is None:
        doubts.append(
            f"{current.contract.id} has a calibration of this site, and it has none "
            f"(`lungwatch calibrate --model {wanted.contract.id}`)"
        )
    if current.sha256 == wanted.sha256:
        return doubts, {}
    numbers = {model.sha256: model.id for model in known_models(engine)}
    before, after = numbers.get(current.sha256), numbers.get(wanted.sha256)
    pairs = [] if before is None or after is None else scored_pairs(engine, before, after)
    if not pairs:
        doubts.append(
            f"no image was scored by both (`lungwatch rescore --model {wanted.contract.id}`)"
        )
        return doubts, {"compared": 0}
    shift = shift_of(pairs)
    click.echo(cell_text(f"{wanted.contract.id} (B) after {current.contract.id} (A)") + "\n")
    print_shift(shift)
    click.echo()
    if shift.images < _LEAST_COMPARED:
        doubts.append(f"only {shift.images} images were scored by both")
    if shift.flipped > _MOST_FLIPPED:
        doubts.append(f"{shift.flipped:.1%} of {shift.images} decisions change")
    return doubts, {"compared": shift.images, "flipped": round(shift.flipped, 6)}


def _ask(model: str, doubts: list[str]) -> None:
    """Ask whether to go on, or refuse where nobody can answer."""
    reasons = "; ".join(doubts)
    if not sys.stdin.isatty():
        raise LungwatchError(
            f"{model} is not activated: {reasons}; give --yes to activate it all the same"
        )
    click.confirm(cell_text(f"{model}: {reasons}. Activate it all the same?"), abort=True)


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
    from lungwatch.daemon.pipeline.model import BundlePolicy, list_bundles

    config = _config(home, config_path)
    trust = BundlePolicy.of(config)
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
    from lungwatch.daemon.pipeline.model import BundlePolicy, Classifier, find_bundle
    from lungwatch.sitecalibration import read_calibration

    config = _config(home, config_path)
    bundle = find_bundle(name_or_path, config.home)
    files = read_bundle(bundle)
    found = Classifier.of(files, trust=BundlePolicy.of(config)).contract
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
    from lungwatch.daemon.pipeline.model import BundlePolicy, Classifier, find_bundle

    config = _config(home, config_path)
    files = read_bundle(find_bundle(name_or_path or config.model, config.home))
    trust = BundlePolicy.of(config)
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
    from lungwatch.daemon.configfile import load_config

    return load_config(config_path, home)


def _summary(bundle: Path, trust: "BundlePolicy") -> dict[str, Any]:
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
    from lungwatch.daemon.pipeline.model import Classifier

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


_CALIBRATE_ACTION = "calibrate"


@click.command()
@home_options
@click.option(
    "--labels",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE.csv",
    help="Known truth: a column sha256, sop_uid, id (of the result) or accession, and a column "
    "truth with COVID or other.",
)
@click.option(
    "--error",
    type=click.FloatRange(0.001, 0.5, max_open=True),
    default=0.05,
    show_default=True,
    help="Share of each class that may be given the other's label.",
)
@click.option("--model", help="Bundle, by name or path; the configured one if not given.")
@click.option("--remove", is_flag=True, help="Let the bundle's own calibration decide again.")
@click.option("--dry-run", is_flag=True, help="Show what would come of it, write nothing.")
@json_option
def calibrate(
    *,
    home: Path | None,
    config_path: Path | None,
    labels: Path | None,
    error: float,
    model: str | None,
    remove: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Fit probability, threshold and uncertain band to this site's own cases.

    From results whose truth is known: Platt scaling of the recorded logits, and a band by
    conformal prediction: of each class at most the stated share is given the other's label, the
    rest is told apart or UNCERTAIN. It takes at least 30 cases of each class, one a patient. The
    record is kept in HOME/calibrations, the daemon loads it at its next start, and every row
    names the one that decided it. Results that are there stay as they are.
    """
    from lungwatch.daemon.configfile import load_config
    from lungwatch.daemon.home import Home, check_database
    from lungwatch.daemon.pipeline.model import BundlePolicy, Classifier, find_bundle
    from lungwatch.db.maintenance import open_database
    from lungwatch.sitecalibration import calibration_path, remove_calibration, write_calibration

    if (labels is None) != remove:
        raise click.UsageError("give either --labels FILE.csv or --remove")
    config = load_config(config_path, home)
    place = Home(config.home)
    classifier = Classifier.load(
        find_bundle(model or config.model, config.home), trust=BundlePolicy.of(config)
    )
    name, sha256 = classifier.contract.id, classifier.sha256
    engine = open_database(config.database_url)
    try:
        check_database(place, engine)
        targets = [f"model {name}"]
        if labels is None:
            path = calibration_path(place.calibrations, name, sha256)
            if not path.exists():
                raise LungwatchError(f"there is no calibration of {name} in {place.calibrations}")
            if not dry_run:
                with noting_failure(engine, _CALIBRATE_ACTION, targets), _writing(path):
                    remove_calibration(place.calibrations, name, sha256)
                note(engine, _CALIBRATE_ACTION, targets=targets, detail={"removed": True})
            if as_json:
                print_json({"model": name, "removed": not dry_run, "path": path})
            else:
                done = "would be removed" if dry_run else "removed"
                click.echo(f"{path} {done}; the bundle's own decides from the next start on")
            return
        record, counts = _fit(engine, labels, error=error, model=name, model_sha256=sha256)
        path = calibration_path(place.calibrations, name, sha256)
        if not dry_run:
            with noting_failure(engine, _CALIBRATE_ACTION, targets), _writing(path):
                write_calibration(place.calibrations, record)
            detail = {"calibration": record.id, "error": error, **counts}
            note(engine, _CALIBRATE_ACTION, targets=targets, detail=detail)
    finally:
        engine.dispose()
    if as_json:
        print_json(
            {
                "id": record.id,
                **asdict(record),
                "cases": counts,
                "path": None if dry_run else path,
            }
        )
        return
    _print(record, path, dry_run=dry_run)


def _fit(
    engine: "Engine", labels: Path, *, error: float, model: str, model_sha256: str
) -> tuple["SiteCalibration", dict[str, int]]:
    """Match truths and results, say what did not match, and fit."""
    from lungwatch.db.rescoring import scored_cases
    from lungwatch.training.evaluation.calibration import calibrate_site, read_truths

    truths = read_truths(labels)
    matched, counts = _match(truths, scored_cases(engine, model_sha256), model)
    record = calibrate_site(
        targets=[covid for covid, _ in matched],
        logits=[logit for _, logit in matched],
        error=error,
        model=model,
        model_sha256=model_sha256,
        made_at=datetime.now(UTC),
        made_with=__version__,
    )
    return record, counts


def truth_by_image(engine: "Engine", labels: Path) -> dict[str, bool]:
    """Return which images of the record a truth file knows, by SHA-256: True for COVID."""
    from lungwatch.db.rescoring import scored_cases
    from lungwatch.training.evaluation.calibration import read_truths

    cases = scored_cases(engine, "")
    chosen, _ = _identify(read_truths(labels), cases)
    return {case.sha256: chosen[case.image_id] for case in cases if case.image_id in chosen}


def _identify(
    truths: "Truths", cases: "Sequence[ScoredCase]"
) -> tuple[dict[int, bool], dict[str, bool]]:
    """Return the truth of each image that is known, and the identifiers that are not."""
    from lungwatch.training.evaluation.calibration import nearest

    by_name: dict[str, list[ScoredCase]] = {}
    for case in cases:
        for name in _names(case, truths.kind):
            by_name.setdefault(name, []).append(case)
    unknown = {name: covid for name, covid in truths.covid.items() if name not in by_name}
    if len(unknown) == len(truths.covid):
        raise LungwatchError(
            f"none of the {len(unknown)} identifiers ({truths.kind}) is in the record"
            f"{nearest(unknown, by_name)}"
        )
    chosen = {
        case.image_id: covid
        for name, covid in truths.covid.items()
        for case in by_name.get(name, ())
    }
    return chosen, unknown


def _match(
    truths: "Truths", cases: "Sequence[ScoredCase]", model: str
) -> tuple[list[tuple[bool, float]], dict[str, int]]:
    """Return truth and logit of each case that has both, one a patient, and what was counted."""
    from lungwatch.training.evaluation.calibration import named

    chosen, unknown = _identify(truths, cases)
    matched: list[tuple[bool, float]] = []
    unscored, repeated, patients = 0, 0, set()
    for case in cases:
        if case.image_id not in chosen:
            continue
        if case.logit is None:
            unscored += 1
        elif case.patient_id is not None and case.patient_id in patients:
            # Images of one patient are no independent cases, which the error's proof asks for.
            repeated += 1
        else:
            patients.add(case.patient_id)
            matched.append((chosen[case.image_id], case.logit))
    counts = {
        "matched": len(matched),
        "unknown": len(unknown),
        "unknown_labels": sum(truths.unknown_labels.values()),
        "contradictory": len(truths.contradictory),
        "unscored": unscored,
        "repeated_patients": repeated,
    }
    remarks = (
        ("identifiers that are not in the record", counts["unknown"], named(unknown)),
        (
            "lines with a truth other than COVID and other",
            counts["unknown_labels"],
            named(truths.unknown_labels),
        ),
        (
            "identifiers with both truths, left out",
            counts["contradictory"],
            named(truths.contradictory),
        ),
        (
            f"images without a score of {model}",
            unscored,
            f"`lungwatch rescore --model {model}` makes it",
        ),
        ("further images of the same patients, left out", repeated, "one a patient counts"),
    )
    for what, count, remark in remarks:
        if count:
            click.echo(cell_text(f"{what}: {count} ({remark})"), err=True)
    return matched, counts


def _names(case: "ScoredCase", kind: str) -> "Sequence[str]":
    if kind == "id":
        return [str(number) for number in case.result_ids]
    value: str | None = getattr(case, kind)
    return [] if value is None else [value]


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turn what keeps a file from being written into one clear line."""
    try:
        yield
    except OSError as error:
        raise LungwatchError(f"cannot write {path}: {error.strerror}") from error


def _print(record: "SiteCalibration", path: Path, *, dry_run: bool) -> None:
    decision = record.decision
    fields: dict[str, Any] = {
        "calibration": record.id,
        "model": record.model,
        "cases": f"{record.covid_cases} COVID, {record.other_cases} other",
        "error": f"at most {record.error:.1%} of each class is given the other's label",
        "threshold": decision.threshold,
        "uncertain": f"from {decision.uncertain_low:.4f} to {decision.uncertain_high:.4f}",
        "abstention": f"{record.abstention:.1%} of these cases ({record.covid_abstention:.1%} of "
        f"COVID, {record.other_abstention:.1%} of the others)",
        "probability": f"slope {record.calibration.slope:.4g}, "
        f"intercept {record.calibration.intercept:.4g}; ECE {record.ece:.3f} on these cases",
        "AUC": record.roc_auc,
        "method": record.method,
        "file": "none (dry run)" if dry_run else path,
    }
    print_fields(fields)
    if not dry_run:
        click.echo("\nThe daemon uses it from its next start on.")
    click.echo(f"\n{RESEARCH_USE_ONLY}")
