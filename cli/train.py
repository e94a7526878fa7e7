"""`lungwatch train`: build networks from labelled X-rays."""

import importlib
from collections.abc import Mapping

import click

# Command -> (module:attribute, one line of help), imported when it is used.
_COMMANDS: Mapping[str, tuple[str, str]] = {
    "baseline": (
        "lungwatch.cli.train_baseline:baseline",
        "Train, or tune, a network from scratch.",
    ),
    "transfer": (
        "lungwatch.cli.train_transfer:transfer",
        "Train a network on a backbone trained elsewhere.",
    ),
    "pretrain": (
        "lungwatch.cli.train_pretrain:pretrain",
        "Pretrain a backbone on labelled X-rays.",
    ),
    "lungs": ("lungwatch.cli.train_lungs:lungs", "Train a network that finds the lungs."),
    "guided": (
        "lungwatch.cli.train_guided:guided",
        "Train a network that is guided to the lungs.",
    ),
    "join": ("lungwatch.cli.train_join:join", "Join trained networks into one."),
}


class _TrainGroup(click.Group):
    """A group whose commands are imported when they are called."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002 - click's signature
        if cmd_name not in _COMMANDS:
            return None
        module, _, attribute = _COMMANDS[cmd_name][0].partition(":")
        command = getattr(importlib.import_module(module), attribute)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002 - click's signature
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, summary) in _COMMANDS.items()])


@click.group(cls=_TrainGroup)
def train() -> None:
    """Train a model (extra 'train')."""
