"""`lungwatch calibrate`: a site's own probability, threshold and uncertain band."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lungwatch import RESEARCH_USE_ONLY, __version__
from lungwatch.cli.audit import note, noting_failure
from lungwatch.cli.options import home_options, json_option
from lungwatch.cli.output import cell_text, print_fields, print_json
from lungwatch.errors import LungwatchError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy import Engine

    from lungwatch.db.scored import ScoredCase
    from lungwatch.sitecalibration import SiteCalibration
    from lungwatch.training.truth_file import Truths

_ACTION = "calibrate"


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
    from lungwatch.daemon.config import load_config
    from lungwatch.daemon.home import Home
    from lungwatch.daemon.model import Classifier, find_bundle
    from lungwatch.daemon.ownership import check_database
    from lungwatch.daemon.trust import Trust
    from lungwatch.db.migrate import open_database
    from lungwatch.sitecalibration import calibration_path, remove_calibration, write_calibration

    if (labels is None) != remove:
        raise click.UsageError("give either --labels FILE.csv or --remove")
    config = load_config(config_path, home)
    place = Home(config.home)
    classifier = Classifier.load(
        find_bundle(model or config.model, config.home), trust=Trust.of(config)
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
                with noting_failure(engine, _ACTION, targets), _writing(path):
                    remove_calibration(place.calibrations, name, sha256)
                note(engine, _ACTION, targets=targets, detail={"removed": True})
            if as_json:
                print_json({"model": name, "removed": not dry_run, "path": path})
            else:
                done = "would be removed" if dry_run else "removed"
                click.echo(f"{path} {done}; the bundle's own decides from the next start on")
            return
        record, counts = _fit(engine, labels, error=error, model=name, model_sha256=sha256)
        path = calibration_path(place.calibrations, name, sha256)
        if not dry_run:
            with noting_failure(engine, _ACTION, targets), _writing(path):
                write_calibration(place.calibrations, record)
            detail = {"calibration": record.id, "error": error, **counts}
            note(engine, _ACTION, targets=targets, detail=detail)
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
    from lungwatch.db.scored import scored_cases
    from lungwatch.training.site_calibration import calibrate_site
    from lungwatch.training.truth_file import read_truths

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
    from lungwatch.db.scored import scored_cases
    from lungwatch.training.truth_file import read_truths

    cases = scored_cases(engine, "")
    chosen, _ = _identify(read_truths(labels), cases)
    return {case.sha256: chosen[case.image_id] for case in cases if case.image_id in chosen}


def _identify(
    truths: "Truths", cases: "Sequence[ScoredCase]"
) -> tuple[dict[int, bool], dict[str, bool]]:
    """Return the truth of each image that is known, and the identifiers that are not."""
    from lungwatch.training.truth_file import nearest

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
    from lungwatch.training.truth_file import named

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
