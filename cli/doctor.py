"""`lungwatch doctor`: whether everything is there that a run needs."""

import logging
import sys
from dataclasses import asdict
from pathlib import Path

import click

from lungwatch.cli.options import home_options, json_option
from lungwatch.cli.output import cell_text, print_json

_MARKS = {True: ("ok", "green"), False: ("FAILED", "red"), None: ("-", "yellow")}


@click.command()
@home_options
@json_option
def doctor(home: Path | None, config_path: Path | None, as_json: bool) -> None:
    """Check configuration, folders, database, model and clock, and run a synthetic X-ray.

    Exits with 1 if a check fails. Research use only; not a medical device.
    """
    from lungwatch.daemon.checkup import check_up
    from lungwatch.daemon.config import load_config

    # The synthetic run would log its own events between the lines.
    logging.getLogger("lungwatch").addHandler(logging.NullHandler())
    logging.getLogger("lungwatch").propagate = False
    checks = []
    for check in check_up(load_config(config_path, home)):
        checks.append(check)
        if not as_json:
            mark, colour = _MARKS[check.ok]
            told = cell_text(f"{check.name}: {check.detail}")
            click.echo(f"{click.style(f'{mark:>6}', fg=colour)}  {told}")
    if as_json:
        print_json([asdict(check) for check in checks])
    sys.exit(1 if any(check.ok is False for check in checks) else 0)
