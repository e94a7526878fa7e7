"""`lungwatch train`: build networks from labelled X-rays."""

from collections.abc import Mapping

import click

from lungwatch.cli.lazy_group import LazyGroup

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
    "gate": (
        "lungwatch.cli.train_gate:gate",
        "Train a network that says whether a picture can be judged.",
    ),
    "fields": (
        "lungwatch.cli.train_fields:fields",
        "Train a network on lung fields.",
    ),
    "findings": (
        "lungwatch.cli.train_findings:findings",
        "Train the findings of a network that sees the lungs alone.",
    ),
    "guided": (
        "lungwatch.cli.train_guided:guided",
        "Train a network that is guided to the lungs.",
    ),
    "join": ("lungwatch.cli.train_join:join", "Join trained networks into one."),
}


@click.group(cls=LazyGroup, places=_COMMANDS)
def train() -> None:
    """Train a model (extra 'train')."""
