"""`lungwatch train` of classifiers: `baseline`, `transfer`, `guided`, `findings`, `join`."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lungwatch.cli.options import (
    any_path,
    backbone_options,
    batch_size_option,
    data_argument,
    data_options,
    dropout_option,
    epochs_option,
    grey_options,
    json_option,
    label_map_option,
    leaks_option,
    learning_rate_option,
    leave_out_option,
    normalisation_of,
    normalisation_options,
    patience_option,
    run_options,
    setting,
    size_option,
)
from lungwatch.cli.train import print_classifier, training_progress

if TYPE_CHECKING:
    from lungwatch.training.data.dataset import LabelMap
    from lungwatch.training.data.duplicates import LeakPolicy


def _filters(_context: click.Context, _parameter: click.Parameter, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(word) for word in text.split(","))
    except ValueError as error:
        raise click.BadParameter(f"{text!r}: give whole numbers, as 32,64,96") from error


@click.command()
@data_argument
@run_options()
@data_options
@normalisation_options()
@epochs_option(default=40)
@patience_option(default=8)
@click.option("--no-early-stopping", is_flag=True, help="Run all epochs; the best one is kept.")
@batch_size_option(default=32)
@learning_rate_option(default=1e-3, of="initial, of Adam")
@click.option(
    "--filters",
    callback=_filters,
    default="32,64,96,128,192",
    show_default=True,
    help="Channels of the convolution blocks.",
)
@setting(
    "--dense-units", 128, click.IntRange(1), "Units of the hidden layer after the convolutions."
)
@dropout_option(default=0.4)
@click.option(
    "--tune",
    is_flag=True,
    help="Search learning rate, width, dense units and dropout; needs a test split.",
)
@setting("--trials", 20, click.IntRange(1), "Number of trials.")
@setting(
    "--sampler",
    "tpe",
    click.Choice(["tpe", "random", "grid"]),
    "Choice of the next trial: by the earlier trials (tpe), at random, or in order (grid).",
)
@setting("--tune-epochs", 20, click.IntRange(1), "Maximum number of epochs of a trial.")
@setting(
    "--extensions",
    2,
    click.IntRange(0),
    "Further rounds if the best value lies at the edge of its range.",
)
@click.option("--no-retrain", is_flag=True, help="Keep the network of the best trial.")
@json_option
def baseline(*, data: Path, out: Path, resume: bool, as_json: bool, **options: Any) -> None:  # noqa: ANN401 - click's options by name
    """Train the baseline network from scratch.

    DATA is a folder SPLIT/CLASS/ (splits train and val; classes COVID, NORMAL,
    OTHER_PNEUMONIA), or a manifest CSV or a folder with one (columns file, label, split).
    Training stops when the validation loss no longer falls. With --tune the best network is
    trained again on the training split and two thirds of the validation split, calibrated on the
    other third, and tested once.
    """
    from lungwatch.training.fitting.search import SearchConfig
    from lungwatch.training.fitting.trainer import FitConfig
    from lungwatch.training.networks.backbones import BaselineConfig, Normalisation
    from lungwatch.training.recipes.classifiers import TuneConfig, train_baseline

    tuning = TuneConfig(
        search=SearchConfig(
            sampler=options["sampler"],
            trials=options["trials"],
            extensions=options["extensions"],
            seed=options["seed"],
        ),
        epochs=options["tune_epochs"],
        retrain=not options["no_retrain"],
    )
    with training_progress() as progress:
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
            normalisation=Normalisation(
                kind=options["normalisation"], mean=options["mean"], std=options["std"]
            ),
            leave_out=options["leave_out"],
            leaks=options["leaks"],
            labels=options["labels"],
            tuning=tuning if options["tune"] else None,
            resume=resume,
            progress=progress,
        )
    print_classifier(metrics, out, as_json=as_json)


@click.command()
@data_argument
@run_options()
@backbone_options(weights="imagenet")
@click.option(
    "--grid",
    is_flag=True,
    help="Search batch size, learning rate and dropout with the backbone frozen.",
)
@setting(
    "--freeze-epochs",
    40,
    click.IntRange(0),
    "Maximum number of epochs with the backbone frozen; 0 skips this phase.",
)
@setting("--epochs", 20, click.IntRange(0), "Maximum number of epochs of fine-tuning; 0 skips it.")
@patience_option(default=5)
@setting(
    "--copies",
    6,
    click.IntRange(0),
    "Augmented copies of each training image for the frozen phase; 0: no augmentation.",
)
@batch_size_option(default=32)
@learning_rate_option(default=1e-3, of="with the backbone frozen")
@setting("--fine-tune-learning-rate", 1e-4, float, "Learning rate of fine-tuning.")
@dropout_option(default=0.3)
@click.option(
    "--unfreeze",
    default="all",
    show_default=True,
    metavar="all|N",
    help="Blocks to fine-tune: all, or the last N.",
)
@click.option(
    "--retrain/--no-retrain",
    default=True,
    show_default=True,
    help="Train again on the training split and two thirds of the validation split; the other "
    "third calibrates.",
)
@grey_options
@data_options
@json_option
def transfer(*, data: Path, out: Path, resume: bool, as_json: bool, **options: Any) -> None:  # noqa: ANN401 - click's options by name
    """Train a network on a pretrained backbone.

    DATA is as for `baseline`. First only the new head is trained, on features of augmented
    copies of the images; then the backbone is fine-tuned with it, its batch normalisation in
    inference mode. If that does not lower the validation loss, the network with the frozen
    backbone is kept. The kept phases are repeated on training and validation images, and the
    network is tested once.
    """
    from lungwatch.training.fitting.frozen import HEAD_GRID, HeadConfig
    from lungwatch.training.fitting.trainer import FitConfig
    from lungwatch.training.networks.backbones import TransferConfig
    from lungwatch.training.recipes.classifiers import train_transfer

    unfreeze: str = options["unfreeze"]
    if unfreeze != "all" and not (unfreeze.isascii() and unfreeze.isdigit()):
        raise click.BadParameter("neither 'all' nor a number", param_hint="--unfreeze")
    shared = {name: options[name] for name in ("batch_size", "patience", "seed")}
    frozen = HeadConfig(
        epochs=max(1, options["freeze_epochs"]),
        learning_rate=options["learning_rate"],
        copies=options["copies"],
        **shared,
    )
    tuning = FitConfig(
        epochs=max(1, options["epochs"]), learning_rate=options["fine_tune_learning_rate"], **shared
    )
    with training_progress() as progress:
        metrics = train_transfer(
            data,
            out,
            network=TransferConfig(
                backbone=options["backbone"],
                weights=options["weights"],
                size_px=options["size"],
                dropout=options["dropout"],
                unfreeze=None if unfreeze == "all" else int(unfreeze),
            ),
            frozen=frozen if options["freeze_epochs"] else None,
            tuning=tuning if options["epochs"] else None,
            grid=HEAD_GRID if options["grid"] else None,
            retrain=options["retrain"],
            normalisation=normalisation_of(
                options["normalisation"], options["mean"], options["std"]
            ),
            leave_out=options["leave_out"],
            leaks=options["leaks"],
            labels=options["labels"],
            resume=resume,
            progress=progress,
        )
    print_classifier(metrics, out, as_json=as_json)


@click.command()
@data_argument
@run_options()
@data_options
@backbone_options(weights="imagenet")
@click.option("--lungs", type=any_path, required=True, help="Run folder of `train lungs`.")
@click.option(
    "--stride",
    type=click.Choice(["8", "16", "32"]),
    help="Cut the backbone at its last map of this stride, in pixels; uncut if not given.",
)
@epochs_option(default=8, stops_early=False)
@batch_size_option(default=32)
@learning_rate_option(default=3e-4, of="maximum")
@dropout_option(default=0.3)
@setting(
    "--other-target",
    0.1,
    float,
    "Target of other pneumonias, 0..1; above 0, any opacity raises the score.",
)
@setting("--ranking", 0.25, float, "Weight of the ranking loss over the classes of each source.")
@setting("--lung-weight", 0.5, float, "Weight of the loss of evidence outside the lungs.")
@setting(
    "--lung-crop", 0.4, click.FloatRange(0, 1), "Probability of cropping an image to its lungs."
)
@setting(
    "--surroundings",
    0.4,
    click.FloatRange(0, 1),
    "Probability of replacing everything around the lungs by another image's.",
)
@click.option(
    "--disguise",
    "strength",
    type=click.Choice(["mild", "strong"]),
    default="mild",
    show_default=True,
    help="Domain randomisation: strength of changes of exposure, sharpness and compression.",
)
@setting(
    "--exchange-histograms",
    0.0,
    click.FloatRange(0, 1),
    "Probability of matching an image's grey levels to another source's.",
)
@click.option(
    "--group-robust",
    type=click.FloatRange(0),
    metavar="STEP",
    default=0.0,
    show_default=True,
    help="Step size of group weights (group DRO over classes of sources), e.g. 0.01; 0: off.",
)
@click.option(
    "--domain-adversarial",
    type=click.FloatRange(0),
    metavar="WEIGHT",
    default=0.0,
    show_default=True,
    help="Final weight of the reversed gradient of a source classifier (DANN), e.g. 0.1; 0: off.",
)
@json_option
def guided(*, data: Path, out: Path, resume: bool, as_json: bool, **options: Any) -> None:  # noqa: ANN401 - click's options by name
    """Train a network with lung masks as guidance.

    DATA is as for `baseline`, best with sources and other pneumonias in its manifest. Frame,
    annotations and surroundings of the images are randomised; classes are ranked within each
    source; evidence outside the lungs is penalised. All epochs run and the last weights are kept.
    """
    from lungwatch.training.fitting.augmentation import (
        STRONG_RANDOMISATION,
        DomainRandomisation,
        Framing,
    )
    from lungwatch.training.fitting.trainer import FitConfig
    from lungwatch.training.networks.backbones import TransferConfig
    from lungwatch.training.recipes.guided import Guidance, Objective, cosine_rates, train_guided

    disguise = STRONG_RANDOMISATION if options["strength"] == "strong" else DomainRandomisation()
    with training_progress() as progress:
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
            leaks=options["leaks"],
            labels=options["labels"],
            resume=resume,
            progress=progress,
        )
    print_classifier(metrics, out, as_json=as_json)


@click.command()
@data_argument
@run_options(seed=False)
@click.option(
    "--fields",
    type=any_path,
    metavar="RUN",
    required=True,
    multiple=True,
    help="Run folder of `train fields`: the feature network. Repeatable: the features of several "
    "networks are concatenated.",
)
@click.option(
    "--gate",
    type=any_path,
    metavar="RUN",
    required=True,
    help="Run folder of `train gate`: the lung segmentation.",
)
@size_option(default=320)
@click.option(
    "--penalty",
    type=click.FloatRange(min=0, min_open=True),
    help="L2 penalty of the head; chosen by leaving sources out if not given.",
)
@leave_out_option
@leaks_option
@json_option
def findings(
    *,
    data: Path,
    out: Path,
    resume: bool,
    fields: tuple[Path, ...],
    gate: Path,
    size: int,
    penalty: float | None,
    leave_out: str | None,
    leaks: "LeakPolicy",
    as_json: bool,
) -> None:
    """Fit and calibrate a COVID head to DATA on frozen features of the lungs.

    The network segments the lungs and sees only them; its map covers the whole image. It exports
    like any other.
    """
    from lungwatch.training.recipes.assembly import train_findings

    with training_progress() as progress:
        metrics = train_findings(
            data,
            out,
            fields=fields,
            gate=gate,
            size_px=size,
            penalty=penalty,
            leave_out=leave_out,
            leaks=leaks,
            resume=resume,
            progress=progress,
        )
    print_classifier(metrics, out, as_json=as_json)


@click.command()
@click.argument("runs", nargs=-1, required=True, type=any_path)
@click.option(
    "--data",
    type=any_path,
    required=True,
    help="Data set: the validation split calibrates, the test split is evaluated.",
)
@run_options(seed=False)
@click.option(
    "--lungs",
    type=any_path,
    metavar="RUN",
    help="Run folder of `train lungs`: crops the input to the bounding box of the lungs.",
)
@leave_out_option
@leaks_option
@label_map_option
@json_option
def join(
    *,
    runs: tuple[Path, ...],
    data: Path,
    out: Path,
    resume: bool,
    lungs: Path | None,
    leave_out: str | None,
    leaks: "LeakPolicy",
    labels: "LabelMap | None",
    as_json: bool,
) -> None:
    """Join trained networks into an ensemble, whose logit is the mean of theirs.

    RUNS are finished run folders with the same input, and the same source left out, if any. The
    ensemble exports like any other network; its map is the sum of its members' maps.
    """
    from lungwatch.training.recipes.assembly import train_join

    with training_progress() as progress:
        metrics = train_join(
            list(runs),
            data,
            out,
            lungs=lungs,
            leave_out=leave_out,
            leaks=leaks,
            labels=labels,
            resume=resume,
            progress=progress,
        )
    print_classifier(metrics, out, as_json=as_json)
