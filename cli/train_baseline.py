"""`lungwatch train baseline`: a network from scratch, tuned if so wished."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lungwatch.cli.options import json_option
from lungwatch.cli.train_options import (
    batch_size_option,
    data_argument,
    data_options,
    dropout_option,
    normalisation_options,
    progress,
    report,
    run_options,
)

if TYPE_CHECKING:
    from lungwatch.training.leaks import LeakPolicy
    from lungwatch.training.normalisation import NormalisationKind
    from lungwatch.training.sampler import SamplerKind


def _filters(_context: click.Context, _parameter: click.Parameter, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(word) for word in text.split(","))
    except ValueError as error:
        raise click.BadParameter(f"{text!r}: write whole numbers, as 32,64,96") from error


@click.command()
@data_argument
@run_options
@data_options
@normalisation_options()
@click.option("--epochs", type=click.IntRange(1), default=40, show_default=True, help="At most.")
@click.option(
    "--patience",
    type=click.IntRange(1),
    default=8,
    show_default=True,
    help="Epochs without a lower validation loss after which training stops.",
)
@click.option("--no-early-stopping", is_flag=True, help="Run all epochs; the best one is kept.")
@batch_size_option(default=32)
@click.option(
    "--learning-rate", type=float, default=1e-3, show_default=True, help="Adam's, at the start."
)
@click.option(
    "--filters",
    callback=_filters,
    default="32,64,96,128,192",
    show_default=True,
    help="Channels of the convolution blocks.",
)
@click.option(
    "--dense-units",
    type=click.IntRange(1),
    default=128,
    show_default=True,
    help="Of the hidden layer after the convolutions.",
)
@dropout_option(default=0.4)
@click.option(
    "--tune",
    is_flag=True,
    help="Search learning rate, width, dense units and dropout; needs a test split.",
)
@click.option("--trials", type=click.IntRange(1), default=20, show_default=True, help="At first.")
@click.option(
    "--sampler",
    type=click.Choice(["tpe", "random", "grid"]),
    default="tpe",
    show_default=True,
    help="How the next trial is chosen: by the ones before it, at random, or each in turn.",
)
@click.option(
    "--tune-epochs", type=click.IntRange(1), default=20, show_default=True, help="Of a trial."
)
@click.option(
    "--extensions",
    type=click.IntRange(0),
    default=2,
    show_default=True,
    help="Further rounds, should the best value lie at an edge of its range.",
)
@click.option("--no-retrain", is_flag=True, help="Keep the best trial's network.")
@json_option
def baseline(*, data: Path, out: Path, resume: bool, as_json: bool, **options: Any) -> None:  # noqa: ANN401 - click's options by name
    """Train the baseline network from scratch.

    DATA is a folder SPLIT/CLASS/ (splits train and val; classes COVID, NORMAL,
    OTHER_PNEUMONIA), or a manifest CSV or a folder with one (columns file, label, split).
    Training stops when the validation loss no longer falls. With --tune the best network is
    trained anew on train and two thirds of val, calibrated on the third, and tested once.
    """
    from lungwatch.training.baseline import BaselineConfig
    from lungwatch.training.fit_config import FitConfig
    from lungwatch.training.normalisation import Normalisation
    from lungwatch.training.search import SearchConfig
    from lungwatch.training.train_baseline import train_baseline
    from lungwatch.training.tune import TuneConfig

    kind: NormalisationKind = options["normalisation"]
    leaks: LeakPolicy = options["leaks"]
    sampler: SamplerKind = options["sampler"]
    tuning = TuneConfig(
        search=SearchConfig(
            sampler=sampler,
            trials=options["trials"],
            extensions=options["extensions"],
            seed=options["seed"],
        ),
        epochs=options["tune_epochs"],
        retrain=not options["no_retrain"],
    )
    metrics = train_baseline(
        data,
        out,
        network=BaselineConfig(
            size_px=options["size"],
            filters=options["filters"],
            dense_units=options["dense_units"],
            dropout=options["dropout"],
        ),
        fitting=FitConfig(
            epochs=options["epochs"],
            batch_size=options["batch_size"],
            learning_rate=options["learning_rate"],
            patience=None if options["no_early_stopping"] else options["patience"],
            seed=options["seed"],
        ),
        normalisation=Normalisation(kind=kind, mean=options["mean"], std=options["std"]),
        leave_out=options["leave_out"],
        leaks=leaks,
        labels=options["labels"],
        tuning=tuning if options["tune"] else None,
        resume=resume,
        progress=progress(),
    )
    report(metrics, out, as_json=as_json)
