"""`lungwatch train transfer`: a network on a backbone trained elsewhere."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from lungwatch.cli.options import json_option
from lungwatch.cli.train_backbone import backbone_options, grey_options, normalisation_of
from lungwatch.cli.train_options import (
    batch_size_option,
    data_argument,
    data_options,
    dropout_option,
    progress,
    report,
    run_options,
)

if TYPE_CHECKING:
    from lungwatch.training.label_map import LabelMap


@click.command()
@data_argument
@run_options
@backbone_options(weights="imagenet")
@click.option(
    "--grid",
    is_flag=True,
    help="Search batch size, learning rate and dropout with the backbone frozen.",
)
@click.option(
    "--freeze-epochs",
    type=click.IntRange(0),
    default=40,
    show_default=True,
    help="At most, with the backbone frozen; 0 leaves this phase out.",
)
@click.option(
    "--epochs",
    type=click.IntRange(0),
    default=20,
    show_default=True,
    help="At most, of fine-tuning; 0 leaves it out.",
)
@click.option(
    "--patience",
    type=click.IntRange(1),
    default=5,
    show_default=True,
    help="Epochs without a lower validation loss after which a phase ends.",
)
@click.option(
    "--copies",
    type=click.IntRange(0),
    default=6,
    show_default=True,
    help="Changed copies of each training image for the frozen phase; 0: as they are.",
)
@batch_size_option(default=32)
@click.option(
    "--learning-rate", type=float, default=1e-3, show_default=True, help="With it frozen."
)
@click.option(
    "--fine-tune-learning-rate",
    type=float,
    default=1e-4,
    show_default=True,
    help="When it is fine-tuned.",
)
@dropout_option(default=0.3)
@click.option(
    "--unfreeze",
    default="all",
    show_default=True,
    metavar="all|N",
    help="What is fine-tuned: all, or the last N blocks.",
)
@click.option(
    "--retrain/--no-retrain",
    default=True,
    show_default=True,
    help="Repeat what was kept on train and two thirds of val; the third calibrates.",
)
@grey_options
@data_options
@json_option
def transfer(
    *,
    data: Path,
    out: Path,
    backbone: str,
    weights: str,
    size: int,
    grid: bool,
    freeze_epochs: int,
    epochs: int,
    patience: int,
    copies: int,
    batch_size: int,
    learning_rate: float,
    fine_tune_learning_rate: float,
    dropout: float,
    unfreeze: str,
    retrain: bool,
    normalisation: str,
    mean: float | None,
    std: float | None,
    leave_out: str | None,
    leaks: str,
    labels: "LabelMap | None",
    seed: int,
    resume: bool,
    as_json: bool,
) -> None:
    """Train a network on a backbone trained elsewhere.

    DATA is as for `baseline`. First only the new head learns, on features of changed copies of
    the images; then the backbone is fine-tuned with it, its batch norm in inference mode. If
    that does not lower the validation loss, the network with the frozen backbone is kept. What
    is kept is repeated on training and validation images, and tested once.
    """
    from lungwatch.training.fit_config import FitConfig
    from lungwatch.training.fit_head import HeadConfig
    from lungwatch.training.train_transfer import train_transfer
    from lungwatch.training.transfer import TransferConfig
    from lungwatch.training.transfer_grid import GRID

    if unfreeze != "all" and not (unfreeze.isascii() and unfreeze.isdigit()):
        raise click.BadParameter("neither 'all' nor a number", param_hint="--unfreeze")
    frozen = HeadConfig(
        epochs=max(1, freeze_epochs),
        batch_size=batch_size,
        learning_rate=learning_rate,
        patience=patience,
        seed=seed,
        copies=copies,
    )
    tuning = FitConfig(
        epochs=max(1, epochs),
        batch_size=batch_size,
        learning_rate=fine_tune_learning_rate,
        patience=patience,
        seed=seed,
    )
    metrics = train_transfer(
        data,
        out,
        network=TransferConfig(
            backbone=backbone,
            weights=weights,
            size_px=size,
            dropout=dropout,
            unfreeze=None if unfreeze == "all" else int(unfreeze),
        ),
        frozen=frozen if freeze_epochs else None,
        tuning=tuning if epochs else None,
        grid=GRID if grid else None,
        retrain=retrain,
        normalisation=normalisation_of(normalisation, mean, std),
        leave_out=leave_out,
        leaks=leaks,  # type: ignore[arg-type]  # the choices are its values
        labels=labels,
        resume=resume,
        progress=progress(),
    )
    report(metrics, out, as_json=as_json)
