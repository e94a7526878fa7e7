"""`lungwatch train`: the group, and `pretrain`, `lungs`, `gate`, `fields`."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lungwatch.cli.main import LazyGroup
from lungwatch.cli.options import (
    backbone_options,
    batch_size_option,
    data_argument,
    dropout_option,
    grey_options,
    json_option,
    label_map_option,
    normalisation_of,
    progress,
    run_options,
    size_option,
)
from lungwatch.cli.output import print_table

if TYPE_CHECKING:
    from lungwatch.training.data.dataset import LabelMap


# Command -> (module:attribute, one line of help), imported when it is used.
_COMMANDS: Mapping[str, tuple[str, str]] = {
    "baseline": (
        "lungwatch.cli.train_classifiers:baseline",
        "Train, or tune, a network from scratch.",
    ),
    "transfer": (
        "lungwatch.cli.train_classifiers:transfer",
        "Train a network on a backbone trained elsewhere.",
    ),
    "pretrain": (
        "lungwatch.cli.train:pretrain",
        "Pretrain a backbone on labelled X-rays.",
    ),
    "lungs": ("lungwatch.cli.train:lungs", "Train a network that finds the lungs."),
    "gate": (
        "lungwatch.cli.train:gate",
        "Train a network that says whether a picture can be judged.",
    ),
    "fields": (
        "lungwatch.cli.train:fields",
        "Train a network on lung fields.",
    ),
    "findings": (
        "lungwatch.cli.train_classifiers:findings",
        "Train the findings of a network that sees the lungs alone.",
    ),
    "guided": (
        "lungwatch.cli.train_classifiers:guided",
        "Train a network that is guided to the lungs.",
    ),
    "join": ("lungwatch.cli.train_classifiers:join", "Join trained networks into one."),
}


@click.group(cls=LazyGroup, places=_COMMANDS)
def train() -> None:
    """Train a model (extra 'train')."""


@click.command()
@click.argument("data", nargs=-1, required=True, type=click.Path(path_type=Path))
@run_options
@backbone_options(weights="none")
@size_option
@click.option("--epochs", type=click.IntRange(1), default=30, show_default=True, help="At most.")
@click.option(
    "--patience",
    type=click.IntRange(1),
    default=8,
    show_default=True,
    help="Epochs without a lower validation loss after which training stops.",
)
@click.option(
    "--task",
    "tasks",
    multiple=True,
    default=("finding", "covid"),
    show_default=True,
    metavar="NAME[=WEIGHT]",
    help="finding (which class), covid (COVID or not), source (which collection); repeatable.",
)
@batch_size_option(default=32)
@click.option(
    "--learning-rate", type=float, default=1e-3, show_default=True, help="Adam's, at the start."
)
@dropout_option(default=0.2)
@grey_options
@json_option
def pretrain(
    *,
    data: tuple[Path, ...],
    out: Path,
    backbone: str,
    weights: str,
    size: int,
    epochs: int,
    patience: int,
    tasks: tuple[str, ...],
    batch_size: int,
    learning_rate: float,
    dropout: float,
    normalisation: str,
    mean: float | None,
    std: float | None,
    seed: int,
    resume: bool,
    as_json: bool,
) -> None:
    """Pretrain a backbone on labelled X-rays, for `transfer --weights RUN`.

    Each DATA is a folder CLASS/ or SPLIT/CLASS/, or a manifest CSV or a folder with one; classes
    may have any names. Where nothing is split, 15 % are held out for validation; test splits are
    not read. All of the network learns, batch norm included.
    """
    from lungwatch.training.fitting.trainer import FitConfig
    from lungwatch.training.recipes.pretrain import PretrainConfig, parse_tasks, train_pretrain

    metrics = train_pretrain(
        data,
        out,
        network=PretrainConfig(backbone=backbone, weights=weights, size_px=size, dropout=dropout),
        task_weights=parse_tasks(tasks),
        fitting=FitConfig(
            epochs=epochs,
            batch_size=batch_size,
            learning_rate=learning_rate,
            patience=patience,
            seed=seed,
        ),
        normalisation=normalisation_of(normalisation, mean, std),
        resume=resume,
        progress=progress(),
    )
    if as_json:
        click.echo(json.dumps(metrics, indent=2))
        return
    click.echo(f"best epoch {metrics['best_epoch']} of {metrics['epochs']}")
    for task, found in metrics["validation"].items():
        areas = ", ".join(f"{name} {area:.3f}" for name, area in found["roc_auc"].items())
        click.echo(f"{task}: accuracy {found['accuracy']:.3f}; ROC-AUC {areas}")
    click.echo(f"run folder: {out}")


@click.command()
@click.argument("masks", type=click.Path(path_type=Path))
@run_options
@click.option("--epochs", type=click.IntRange(1), default=25, show_default=True, help="All run.")
@batch_size_option(default=16)
@click.option(
    "--learning-rate",
    type=float,
    default=2e-3,
    show_default=True,
    help="Adam's, of the first step.",
)
@json_option
def lungs(
    *,
    masks: Path,
    out: Path,
    seed: int,
    resume: bool,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    as_json: bool,
) -> None:
    """Train a network that finds the lungs, for `train guided`.

    MASKS is a folder with images/NAME.* and masks/NAME.png, white where there is lung. A
    seventh of the pairs is held out to measure.
    """
    from lungwatch.training.fitting.run import Progress
    from lungwatch.training.recipes.lungs import LungFitConfig, train_lungs

    def on_epoch(row: dict[str, float]) -> None:
        click.echo(
            f"epoch {row['epoch']}: loss {row['loss']:.4f}, Dice {row['val_dice']:.4f}", err=True
        )

    metrics = train_lungs(
        masks,
        out,
        fitting=LungFitConfig(
            epochs=epochs, batch_size=batch_size, learning_rate=learning_rate, seed=seed
        ),
        resume=resume,
        progress=Progress(on_epoch=on_epoch),
    )
    if as_json:
        click.echo(json.dumps(metrics, indent=2))
        return
    click.echo(
        f"Dice {metrics['dice']:.3f} (lowest {metrics['dice_lowest']:.3f}), intersection over "
        f"union {metrics['iou']:.3f}, on {metrics['val']} pairs held out"
    )
    click.echo(f"run folder: {out}")


@click.command()
@data_argument
@run_options
@click.option(
    "--masks",
    type=click.Path(path_type=Path),
    required=True,
    help="Folder with images/NAME.* and masks/NAME.png, white where there is lung.",
)
@click.option("--size", type=click.IntRange(32, 1024), default=160, show_default=True, help="px.")
@click.option(
    "--mask-steps",
    type=click.IntRange(1),
    default=450,
    show_default=True,
    help="Steps on the lung masks alone.",
)
@click.option(
    "--steps", type=click.IntRange(1), default=1600, show_default=True, help="Steps on everything."
)
@batch_size_option(default=128)
@click.option(
    "--learning-rate",
    type=float,
    default=1.5e-3,
    show_default=True,
    help="AdamW's, of the steepest step.",
)
@click.option(
    "--checkpoint-steps",
    type=click.IntRange(1),
    default=100,
    show_default=True,
    help="Make the run safe after every so many steps.",
)
@click.option(
    "--random-start", is_flag=True, help="Start from random weights instead of ImageNet's."
)
@click.option(
    "--leave-out",
    metavar="SOURCE",
    multiple=True,
    help="Learn nothing from this source, and measure on it; repeatable.",
)
@label_map_option
@json_option
def gate(
    *,
    data: Path,
    masks: Path,
    out: Path,
    seed: int,
    resume: bool,
    size: int,
    mask_steps: int,
    steps: int,
    batch_size: int,
    learning_rate: float,
    checkpoint_steps: int,
    random_start: bool,
    leave_out: tuple[str, ...],
    labels: "LabelMap | None",
    as_json: bool,
) -> None:
    """Train a content gate on the X-rays of DATA, all of them frontal, of a chest and upright.

    What is to be refused is made from them (turned, inverted, cut) or drawn. Near copies of
    other splits' images are left out. `lungwatch model renew` and `lungwatch export` put the
    gate into a bundle.
    """
    from lungwatch.training.recipes.lungs import GateFitConfig, train_gate

    metrics = train_gate(
        data,
        masks,
        out,
        fitting=GateFitConfig(
            size_px=size,
            imagenet=not random_start,
            mask_steps=mask_steps,
            steps=steps,
            batch_size=batch_size,
            learning_rate=learning_rate,
            seed=seed,
            checkpoint_steps=checkpoint_steps,
        ),
        leave_out=leave_out,
        labels=labels,
        resume=resume,
        progress=progress(),
    )
    if as_json:
        click.echo(json.dumps(metrics, indent=2))
        return
    print_table(
        ("pictures of", "number", "kept", "refused by"),
        [_row(name, found) for name, found in metrics["rates"].items()],
    )
    click.echo(f"\nDice of the lungs on masks held out: {metrics['dice']:.3f}")
    click.echo(f"run folder: {out}")


def _row(name: str, found: dict[str, Any]) -> tuple[str, int, str, str]:
    refused = ", ".join(f"{check} {count}" for check, count in found["refused"].items())
    return name, found["pictures"], f"{found['kept'] / found['pictures']:.1%}", refused or "none"


@click.command()
@click.argument("fields", type=click.Path(path_type=Path))
@run_options
@click.option(
    "--pairs",
    type=click.Path(path_type=Path),
    metavar="DATA",
    help="Data set of whole X-rays: its sources with both normals and other pneumonias join in.",
)
@click.option(
    "--gate",
    type=click.Path(path_type=Path),
    metavar="RUN",
    help="Run folder of `train gate`, or a bundle with a gate: finds the lungs of --pairs.",
)
@click.option("--size", type=click.IntRange(32, 1024), default=192, show_default=True, help="px.")
@click.option("--steps", type=click.IntRange(1), default=500, show_default=True, help="All steps.")
@batch_size_option(default=128)
@click.option(
    "--pair-share",
    type=click.FloatRange(0, 1, max_open=True),
    default=0.25,
    show_default=True,
    help="Share of each batch that is of --pairs.",
)
@click.option(
    "--fewest",
    type=click.IntRange(1),
    default=50,
    show_default=True,
    help="Training images of each finding that a source of --pairs must have.",
)
@click.option(
    "--learning-rate",
    type=float,
    default=1e-3,
    show_default=True,
    help="AdamW's, of the steepest step.",
)
@click.option(
    "--checkpoint-steps",
    type=click.IntRange(1),
    default=50,
    show_default=True,
    help="Make the run safe after every so many steps.",
)
@click.option(
    "--random-start", is_flag=True, help="Start from random weights instead of ImageNet's."
)
@json_option
def fields(
    *,
    fields: Path,
    out: Path,
    seed: int,
    resume: bool,
    pairs: Path | None,
    gate: Path | None,
    size: int,
    steps: int,
    batch_size: int,
    pair_share: float,
    fewest: int,
    learning_rate: float,
    checkpoint_steps: int,
    random_start: bool,
    as_json: bool,
) -> None:
    """Train a network on FIELDS: lungs cut out of X-rays, black around them.

    FIELDS is a data set with the labels NORMAL, OTHER (abnormal, but no opacity) and OPACITY.
    `lungwatch train findings` makes a network for whole X-rays of it.
    """
    from lungwatch.training.recipes.fields import FieldFitConfig, train_fields

    metrics = train_fields(
        fields,
        out,
        fitting=FieldFitConfig(
            size_px=size,
            imagenet=not random_start,
            steps=steps,
            batch_size=batch_size,
            pair_share=pair_share,
            fewest=fewest,
            learning_rate=learning_rate,
            seed=seed,
            checkpoint_steps=checkpoint_steps,
        ),
        pairs=pairs,
        gate=gate,
        resume=resume,
        progress=progress(),
    )
    if as_json:
        click.echo(json.dumps(metrics, indent=2))
        return
    print_table(
        ("source", "validation", "by opacity", "by abnormality"),
        [
            (source, name, f"{found['opacity']:.3f}", f"{found['abnormal']:.3f}")
            for source, names in metrics["validation"].items()
            for name, found in names.items()
        ],
    )
    click.echo(f"run folder: {out}")
