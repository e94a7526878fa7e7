"""`lungwatch model activate`: another bundle for the daemon, proved and compared before."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lungwatch.cli.audit import note, noting_failure
from lungwatch.cli.options import home_options
from lungwatch.cli.output import cell_text
from lungwatch.errors import ConfigError, LungwatchError

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from lungwatch.daemon.home import Home
    from lungwatch.daemon.model import Classifier

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
    from lungwatch.daemon.config import load_config
    from lungwatch.daemon.configedit import set_text
    from lungwatch.daemon.home import Home
    from lungwatch.daemon.model import Classifier, find_bundle, list_bundles
    from lungwatch.daemon.ownership import check_database
    from lungwatch.daemon.trust import Trust
    from lungwatch.db.migrate import open_database

    config = load_config(config_path, home)
    if _VARIABLE in os.environ:
        raise ConfigError(
            f"{_VARIABLE} is set in the environment and overrides the configuration file; unset it"
        )
    folder = find_bundle(name_or_path, config.home)
    trust = Trust.of(config)
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
    from lungwatch.cli.results_compare import print_shift, shift_of
    from lungwatch.db.scored import known_models, scored_pairs
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
