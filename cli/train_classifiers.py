"""`lungwatch train` of classifiers: `baseline`, `transfer`, `guided`, `findings`, `join`."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lungwatch.cli.options import (
    backbone_options,
    batch_size_option,
    data_argument,
    data_options,
    dropout_option,
    grey_options,
    json_option,
    label_map_option,
    leaks_option,
    leave_out_option,
    normalisation_of,
    normalisation_options,
    progress,
    report,
    run_options,
)

if TYPE_CHECKING:
    from lungwatch.training.data.dataset import LabelMap
    from lungwatch.training.data.duplicates import LeakPolicy
    from lungwatch.training.fitting.search import SamplerKind
    from lungwatch.training.networks.backbones import NormalisationKind


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
    from lungwatch.training.fitting.search import SearchConfig
    from lungwatch.training.fitting.trainer import FitConfig
    from lungwatch.training.networks.backbones import BaselineConfig, Normalisation
    from lungwatch.training.recipes.baseline import TuneConfig, train_baseline

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
    from lungwatch.training.fitting.frozen import HEAD_GRID, HeadConfig
    from lungwatch.training.fitting.trainer import FitConfig
    from lungwatch.training.networks.backbones import TransferConfig
    from lungwatch.training.recipes.transfer import train_transfer

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
        grid=HEAD_GRID if grid else None,
        retrain=retrain,
        normalisation=normalisation_of(normalisation, mean, std),
        leave_out=leave_out,
        leaks=leaks,  # type: ignore[arg-type]  # the choices are its values
        labels=labels,
        resume=resume,
        progress=progress(),
    )
    report(metrics, out, as_json=as_json)


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

    from lungwatch.training.fitting.augmentation import (
        STRONG_RANDOMISATION,
        DomainRandomisation,
        Framing,
    )
    from lungwatch.training.fitting.objectives import Objective
    from lungwatch.training.fitting.trainer import FitConfig
    from lungwatch.training.networks.backbones import TransferConfig
    from lungwatch.training.recipes.guided import Guidance, cosine_rates, train_guided

    leaks: LeakPolicy = options["leaks"]
    disguise = STRONG_RANDOMISATION if options["strength"] == "strong" else DomainRandomisation()
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


@click.command()
@data_argument
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    required=True,
    help="Run folder to fill.",
)
@click.option("--resume", is_flag=True, help="Do it again in a run folder that was begun.")
@click.option(
    "--fields",
    type=click.Path(path_type=Path),
    metavar="RUN",
    required=True,
    multiple=True,
    help="Run folder of `train fields`: what the network knows of lungs. Repeatable: the features "
    "of several seeds lie side by side.",
)
@click.option(
    "--gate",
    type=click.Path(path_type=Path),
    metavar="RUN",
    required=True,
    help="Run folder of `train gate`: its network finds the lungs.",
)
@click.option("--size", type=click.IntRange(32, 1024), default=320, show_default=True, help="px.")
@click.option(
    "--penalty",
    type=click.FloatRange(min=0, min_open=True),
    help="Of the head's weights. Chosen by sources left out if not given.",
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
    leaks: str,
    as_json: bool,
) -> None:
    """Fit COVID to DATA on the lungs' features, which stay as they are, and calibrate it.

    The network finds the lungs by itself and sees them alone; its map is of the whole image. It
    exports like any other.
    """
    from lungwatch.training.recipes.assembly import train_findings

    policy: LeakPolicy = leaks  # type: ignore[assignment]  # click has checked it
    metrics = train_findings(
        data,
        out,
        fields=fields,
        gate=gate,
        size_px=size,
        penalty=penalty,
        leave_out=leave_out,
        leaks=policy,
        resume=resume,
        progress=progress(),
    )
    report(metrics, out, as_json=as_json)


@click.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    required=True,
    help="Data set whose validation split calibrates, and whose test split is measured.",
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    required=True,
    help="Run folder to fill.",
)
@click.option("--resume", is_flag=True, help="Do it again in a run folder that was begun.")
@click.option(
    "--lungs",
    type=click.Path(path_type=Path),
    metavar="RUN",
    help="Run folder of `train lungs`: the joint network finds the lungs' box and sees that alone.",
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
    leaks: str,
    labels: "LabelMap | None",
    as_json: bool,
) -> None:
    """Join trained networks into one, whose logit is the mean of theirs.

    RUNS are finished run folders with the same input, trained without the same source if
    without any. The joint network exports like any
    other; its map is the sum of its members'.
    """
    from lungwatch.training.recipes.assembly import train_join

    policy: LeakPolicy = leaks  # type: ignore[assignment]  # click has checked it
    metrics = train_join(
        list(runs),
        data,
        out,
        lungs=lungs,
        leave_out=leave_out,
        leaks=policy,
        labels=labels,
        resume=resume,
        progress=progress(),
    )
    report(metrics, out, as_json=as_json)
