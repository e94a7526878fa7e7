"""Options that `train transfer` and `train pretrain` have in common."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from lungwatch.cli.train_options import normalisation_options

if TYPE_CHECKING:
    from lungwatch.training.normalisation import Normalisation

Command = TypeVar("Command", bound=Callable[..., Any])

_BACKBONE_ALONE = "backbone"


def backbone_options(*, weights: str) -> Callable[[Command], Command]:
    """Add `--backbone` and `--weights`, by default those."""

    def add(command: Command) -> Command:
        command = click.option(
            "--weights",
            default=weights,
            show_default=True,
            help="imagenet (for efficientnet-lite0 from the extra 'lite0', else fetched from the "
            "network), none, a run folder, or a file: a Keras model or weights (.h5).",
        )(command)
        return click.option(
            "--backbone",
            default="ResNet50V2",
            show_default=True,
            help="efficientnet-lite0, or a network of keras.applications.",
        )(command)

    return add


def grey_options(command: Command) -> Command:
    """Add `--normalisation`, `--mean` and `--std`; see `normalisation_of`."""
    explained = "; or by the backbone's own scaling alone"
    return normalisation_options(_BACKBONE_ALONE, explained=explained)(command)


def normalisation_of(kind: str, mean: float | None, std: float | None) -> "Normalisation | None":
    """Read the options' values; None leaves the grey levels to the backbone.

    Raises
    ------
    ConfigError
        If mean and std do not belong to that kind.
    """
    from lungwatch.training.normalisation import Normalisation

    if kind == _BACKBONE_ALONE and mean is None and std is None:
        return None
    return Normalisation(
        kind="train" if kind == _BACKBONE_ALONE else kind,  # type: ignore[arg-type]  # a choice
        mean=mean,
        std=std,
    )
