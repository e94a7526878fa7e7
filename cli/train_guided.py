"""`lungwatch train guided`: a network that is guided to the lungs."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lungwatch.cli.options import json_option
from lungwatch.cli.train_backbone import backbone_options
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
    from lungwatch.training.leaks import LeakPolicy

_STRIDES = ("8", "16", "32")


@click.command()
@data_argument
@run_options
@data_options
@backbone_options(weights="imagenet")
@click.option(
    "--lungs",
    type=click.Path(path_type=Path),
    required=True,
    help="Run folder of `train lungs`.",
)
@click.option(
    "--stride",
    type=click.Choice(_STRIDES),
    help="Cut the backbone at its last map of this many pixels a cell; all of it if not given.",
)
@click.option("--epochs", type=click.IntRange(1), default=8, show_default=True, help="All run.")
@batch_size_option(default=32)
@click.option(
    "--learning-rate", type=float, default=3e-4, show_default=True, help="Of the steepest epoch."
)
@dropout_option(default=0.3)
@click.option(
    "--other-target",
    type=float,
    default=0.1,
    show_default=True,
    help="Target of other pneumonias, 0..1: above 0, any opacity shall raise the score.",
)
@click.option(
    "--ranking",
    type=float,
    default=0.25,
    show_default=True,
    help="Weight of the right order of findings within each source.",
)
@click.option(
    "--lung-weight",
    type=float,
    default=0.5,
    show_default=True,
    help="Weight of evidence outside the lungs.",
)
@click.option(
    "--lung-crop",
    type=click.FloatRange(0, 1),
    default=0.4,
    show_default=True,
    help="How often an image is shown cropped to its lungs.",
)
@click.option(
    "--surroundings",
    type=click.FloatRange(0, 1),
    default=0.4,
    show_default=True,
    help="How often what is around the lungs is exchanged for another image's.",
)
@click.option(
    "--disguise",
    "strength",
    type=click.Choice(["mild", "strong"]),
    default="mild",
    show_default=True,
    help="Changes of exposure, sharpness and compression.",
)
@click.option(
    "--exchange-histograms",
    type=click.FloatRange(0, 1),
    default=0.0,
    show_default=True,
    help="How often an image is shown with the grey levels of another source's.",
)
@click.option(
    "--group-robust",
    type=click.FloatRange(0),
    metavar="STEP",
    default=0.0,
    show_default=True,
    help="Step by which findings of a source that are learnt badly gain weight (group DRO), "
    "about 0.01.",
)
@click.option(
    "--domain-adversarial",
    type=click.FloatRange(0),
    metavar="WEIGHT",
    default=0.0,
    show_default=True,
    help="Weight at the end of a reversed gradient of telling sources apart (DANN), about 0.1.",
)
@json_option
def guided(*, data: Path, out: Path, resume: bool, as_json: bool, **options: Any) -> None:  # noqa: ANN401 - click's options by name
    """Train a network that is guided to the lungs.

    DATA is as for `baseline`, best with sources and other pneumonias in its manifest. Images
    are shown in changing frames, marks and surroundings; findings are put in order within each
    source; evidence outside the lungs costs. All epochs run and the last weights are kept.
    """
    from dataclasses import replace

    from lungwatch.training.disguise import STRONG, Disguise
    from lungwatch.training.fit_config import FitConfig
    from lungwatch.training.framing import Framing
    from lungwatch.training.guidance import Guidance
    from lungwatch.training.objective import Objective
    from lungwatch.training.train_guided import cosine_rates, train_guided
    from lungwatch.training.transfer import TransferConfig

    leaks: LeakPolicy = options["leaks"]
    disguise = STRONG if options["strength"] == "strong" else Disguise()
    metrics = train_guided(
        data,
        out,
        lungs=options["lungs"],
        network=TransferConfig(
            backbone=options["backbone"],
            weights=options["weights"],
            size_px=options["size"],
            dropout=options["dropout"],
        ),
        stride=int(options["stride"]) if options["stride"] else None,
        fitting=FitConfig(
            epochs=options["epochs"],
            batch_size=options["batch_size"],
            learning_rate=options["learning_rate"],
            learning_rates=cosine_rates(options["epochs"], options["learning_rate"]),
            patience=None,
            keep="last",
            average=0.98,
            seed=options["seed"],
        ),
        guidance=Guidance(
            framing=Framing(lung_crop=options["lung_crop"]),
            disguise=replace(disguise, surroundings=options["surroundings"]),
            objective=Objective(
                other_target=options["other_target"],
                ranking=options["ranking"],
                lungs=options["lung_weight"],
            ),
            group_robust=options["group_robust"],
            domain_adversarial=options["domain_adversarial"],
            exchange_histograms=options["exchange_histograms"],
        ),
        leave_out=options["leave_out"],
        leaks=leaks,
        labels=options["labels"],
        resume=resume,
        progress=progress(),
    )
    report(metrics, out, as_json=as_json)
