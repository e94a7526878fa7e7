"""`lungwatch pacs echo`: ask whether the other side is there, and knows us."""

from pathlib import Path

import click

from lungwatch.cli.options import home_options, json_option
from lungwatch.cli.output import cell_text, print_json


@click.command()
@click.argument("destinations", nargs=-1, metavar="[AETITLE@HOST:PORT]...")
@home_options
@json_option
def echo(
    *, destinations: tuple[str, ...], home: Path | None, config_path: Path | None, as_json: bool
) -> None:
    """Send a C-ECHO to destinations, the configured ones if none is named.

    Exit code 1 if one of them does not answer.
    """
    from lungwatch.daemon.config import load_config
    from lungwatch.daemon.outbox.destination import parse_destination
    from lungwatch.daemon.outbox.scu import StorageUser, TlsFiles, UnreachableError
    from lungwatch.errors import ConfigError

    config = load_config(config_path, home)
    names = destinations or config.pacs_destinations
    if not names:
        raise ConfigError("nobody to ask: set 'pacs_destinations', or name one")
    user = StorageUser(config.pacs_ae_title, TlsFiles.of(config))
    answers = []
    for destination in map(parse_destination, names):
        try:
            user.echo(destination)
            problem = None
        except UnreachableError as error:
            problem = str(error)
        answers.append(
            {"destination": destination.name, "answers": problem is None, "problem": problem}
        )
    if as_json:
        print_json(answers)
    else:
        for answer in answers:
            # What the other side answered may steer the terminal.
            click.echo(cell_text(f"{answer['destination']}: {answer['problem'] or 'answers'}"))
    if any(answer["problem"] for answer in answers):
        raise click.exceptions.Exit(1)
