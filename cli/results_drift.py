"""`lungwatch results stats --drift`: the newest results against a reference."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from lungwatch import RESEARCH_USE_ONLY
from lungwatch.cli.output import cell_text, print_json, print_table

if TYPE_CHECKING:
    from lungwatch.daemon.drift import Drift, ReferenceChoice


def print_drift(
    home: Path | None,
    config_path: Path | None,
    reference: "ReferenceChoice | None",
    *,
    as_json: bool,
) -> None:
    """Look for drift and print what is found.

    Parameters
    ----------
    reference
        "site" or "bundle"; None: as configured.

    Raises
    ------
    ModelError
        If the bundle is damaged, or has no reference of its own and that is asked for.
    """
    from lungwatch.bundle import read_bundle
    from lungwatch.daemon.config import load_config
    from lungwatch.daemon.drift import look
    from lungwatch.daemon.model import find_bundle
    from lungwatch.db.migrate import open_existing
    from lungwatch.driftreference import DriftReference

    config = load_config(config_path, home)
    chosen = reference or config.drift_reference
    files = read_bundle(find_bundle(config.model, config.home))
    files.check_digests()
    bundle = DriftReference.from_json(files.drift) if files.drift is not None else None
    engine = open_existing(config.database_url)
    try:
        found = look(engine, files.model_sha256, bundle, reference=chosen, since=config.drift_since)
    finally:
        engine.dispose()
    if as_json:
        print_json(found)
    else:
        _print(found, files.id)


def _print(found: "Drift", model: str) -> None:
    click.echo(f"Model {cell_text(model)}. Drift: {cell_text(found.summary())}\n")
    if found.scopes:
        print_table(
            ("station", "results", "compared with"),
            [(one.station or "(all)", one.results, one.reference) for one in found.scopes],
        )
        click.echo()
    if found.tests:
        print_table(
            (
                "station",
                "what",
                "alarm",
                "distance",
                "p",
                "reference",
                "window",
                "differs",
                "since",
            ),
            [
                (
                    test.station or "(all)",
                    test.what,
                    "ALARM" if test.alarm else None,
                    test.statistic,
                    f"{test.p:.1e}",
                    test.reference_count,
                    test.window_count,
                    test.told,
                    test.since,
                )
                for test in found.tests
            ],
        )
        if not any(test.what.startswith("component_") for test in found.tests):
            click.echo(
                "\nThe embedding is not compared: the results have no components, for which the "
                "bundle needs a drift.json (docs/monitoring.md)."
            )
        click.echo(
            f"\nAlarms are wrong in at most 1 of {round(1 / found.false_alarm_rate)} windows of a "
            "station without any shift; they say nothing of accuracy."
        )
    click.echo(RESEARCH_USE_ONLY)
