"""`lungwatch train`: the group, and `pretrain`, `lungs`, `gate`, `fields`."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lungwatch.cli.main import LazyGroup
from lungwatch.cli.options import (
    any_path,
    backbone_options,
    batch_size_option,
    data_argument,
    dropout_option,
    epochs_option,
    grey_options,
    json_option,
    label_map_option,
    learning_rate_option,
    normalisation_of,
    patience_option,
    run_options,
    setting,
    size_option,
    step_options,
)
from lungwatch.cli.output import ProgressBar, print_table

if TYPE_CHECKING:
    from lungwatch.training.data.dataset import LabelMap
    from lungwatch.training.fitting.run import Progress


_COMMANDS: Mapping[str, tuple[str, str]] = {
    "baseline": (
        "lungwatch.cli.train_classifiers:baseline",
        "Train or tune a network from scratch.",
    ),
    "transfer": (
        "lungwatch.cli.train_classifiers:transfer",
        "Train a network on a pretrained backbone.",
    ),
    "pretrain": ("lungwatch.cli.train:pretrain", "Pretrain a backbone on labelled X-rays."),
    "lungs": ("lungwatch.cli.train:lungs", "Train a lung segmentation network."),
    "gate": ("lungwatch.cli.train:gate", "Train a content gate."),
    "fields": ("lungwatch.cli.train:fields", "Train a network on lung fields."),
    "findings": (
        "lungwatch.cli.train_classifiers:findings",
        "Train the findings of a network that sees only the lungs.",
    ),
    "guided": (
        "lungwatch.cli.train_classifiers:guided",
        "Train a network with lung masks as guidance.",
    ),
    "join": ("lungwatch.cli.train_classifiers:join", "Join trained networks into an ensemble."),
}


@click.group(cls=LazyGroup, places=_COMMANDS)
def train() -> None:
    """Train a model (extra 'train')."""


@contextmanager
def training_progress() -> Iterator["Progress"]:
    """Show the progress of a training on stderr: a bar on a terminal, a line for each epoch."""
    from lungwatch.training.fitting.run import Progress

    figures = {"val_loss": "validation loss", "val_auc": "ROC-AUC", "val_dice": "Dice"}
    with ProgressBar("reading images") as bar:

        def on_epoch(row: dict[str, float]) -> None:
            measured = "".join(
                f", {name} {row[key]:.4f}" for key, name in figures.items() if key in row
            )
            bar.print_line(f"epoch {row['epoch']}: loss {row['loss']:.4f}{measured}")

        def on_trial(row: dict[str, Any]) -> None:
            outcome = row["error"] if row["value"] is None else f"{row['value']:.4f}"
            bar.print_line(f"trial {row['number']} {row['state']}: {outcome}")

        yield Progress(
            on_read=bar.advance,
            on_batch=lambda epoch, batch, batches: bar.update(batch, batches, f"epoch {epoch}"),
            on_epoch=on_epoch,
            on_trial=on_trial,
        )


def print_classifier(metrics: dict[str, Any], out: Path, *, as_json: bool) -> None:
    """Print the metrics of a trained classifier."""
    if as_json:
        click.echo(json.dumps(metrics, indent=2))
        return
    phase = f" ({metrics['phase']})" if "phase" in metrics else ""
    if "search" in metrics:
        best = metrics["search"]["best"]
        chosen = ", ".join(f"{name} {value:.4g}" for name, value in best["parameters"].items())
        click.echo(f"best of {metrics['search']['trials']} trials: {best['number']} ({chosen})")
    click.echo(
        f"best epoch {metrics['best_epoch']} of {metrics['epochs']}{phase}; validation: "
        f"{_figures(metrics['validation'])} at threshold {metrics['decision']['threshold']:.3f}"
    )
    if "test" in metrics:
        click.echo(f"test: {_figures(metrics['test'])}")
    click.echo(f"run folder: {out}")


def _figures(found: dict[str, Any]) -> str:
    return (
        f"ROC-AUC {found['roc_auc']:.3f}, sensitivity {found['sensitivity']:.3f}, specificity "
        f"{found['specificity']:.3f}"
    )


@click.command()
@click.argument("data", nargs=-1, required=True, type=any_path)
@run_options()
@backbone_options(weights="none")
@size_option(default=128)
@epochs_option(default=30)
@patience_option(default=8)
@click.option(
    "--task",
    "tasks",
    multiple=True,
    default=("finding", "covid"),
    show_default=True,
    metavar="NAME[=WEIGHT]",
    help="Task: finding (class), covid (COVID or not), source (collection). Repeatable.",
)
@batch_size_option(default=32)
@learning_rate_option(default=1e-3, of="initial, of Adam")
@dropout_option(default=0.2)
@grey_options
@json_option
def pretrain(
    *,
    data: tuple[Path, ...],
    out: Path,
    resume: bool,
    as_json: bool,
    **options: Any,  # noqa: ANN401 - click's options by name
) -> None:
    """Pretrain a backbone on labelled X-rays, for `transfer --weights RUN`.

    Each DATA is a folder CLASS/ or SPLIT/CLASS/, or a manifest CSV or a folder with one; classes
    may have any names. Of a data set without splits, 15 % are held out for validation; test
    splits are not read. The whole network is trained, batch normalisation included.
    """
    from lungwatch.training.fitting.trainer import FitConfig
    from lungwatch.training.recipes.pretrain import PretrainConfig, parse_tasks, train_pretrain

    with training_progress() as progress:
        metrics = train_pretrain(
            data,
            out,
            network=PretrainConfig(
                backbone=options["backbone"],
                weights=options["weights"],
                size_px=options["size"],
                dropout=options["dropout"],
            ),
            task_weights=parse_tasks(options["tasks"]),
            fitting=FitConfig(
                epochs=options["epochs"],
                batch_size=options["batch_size"],
                learning_rate=options["learning_rate"],
                patience=options["patience"],
                seed=options["seed"],
            ),
            normalisation=normalisation_of(
                options["normalisation"], options["mean"], options["std"]
            ),
            resume=resume,
            progress=progress,
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
@click.argument("masks", type=any_path)
@run_options()
@epochs_option(default=25, stops_early=False)
@batch_size_option(default=16)
@learning_rate_option(default=2e-3, of="initial, of Adam")
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
    """Train a lung segmentation network, for `train guided`.

    MASKS is a folder with images/NAME.* and masks/NAME.png, white where there is lung. A
    seventh of the pairs is held out for validation.
    """
    from lungwatch.training.recipes.lungs import LungFitConfig, train_lungs

    with training_progress() as progress:
        metrics = train_lungs(
            masks,
            out,
            fitting=LungFitConfig(
                epochs=epochs, batch_size=batch_size, learning_rate=learning_rate, seed=seed
            ),
            resume=resume,
            progress=progress,
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
@run_options()
@click.option(
    "--masks",
    type=any_path,
    required=True,
    help="Folder with images/NAME.* and masks/NAME.png, white where there is lung.",
)
@size_option(default=160)
@setting("--mask-steps", 450, click.IntRange(1), "Training steps on the lung masks alone.")
@step_options(steps=1600, batch_size=128, learning_rate=1.5e-3, checkpoint_steps=100)
@click.option(
    "--leave-out",
    metavar="SOURCE",
    multiple=True,
    help="Exclude this source from training, and test on it. Repeatable.",
)
@label_map_option
@json_option
def gate(
    *,
    data: Path,
    masks: Path,
    out: Path,
    resume: bool,
    leave_out: tuple[str, ...],
    labels: "LabelMap | None",
    as_json: bool,
    **options: Any,  # noqa: ANN401 - click's options by name
) -> None:
    """Train a content gate on the X-rays of DATA, all of them frontal, of a chest and upright.

    Pictures to refuse are made from them (rotated, inverted, cropped) or drawn. Near duplicates
    of images of other splits are left out. `lungwatch model renew` and `lungwatch export` put
    the gate into a bundle.
    """
    from lungwatch.training.recipes.lungs import GateFitConfig, train_gate

    with training_progress() as progress:
        metrics = train_gate(
            data,
            masks,
            out,
            fitting=GateFitConfig(
                size_px=options["size"],
                imagenet=not options["random_start"],
                mask_steps=options["mask_steps"],
                steps=options["steps"],
                batch_size=options["batch_size"],
                learning_rate=options["learning_rate"],
                seed=options["seed"],
                checkpoint_steps=options["checkpoint_steps"],
            ),
            leave_out=leave_out,
            labels=labels,
            resume=resume,
            progress=progress,
        )
    if as_json:
        click.echo(json.dumps(metrics, indent=2))
        return
    print_table(
        ("pictures of", "number", "kept", "refused by"),
        [
            (
                name,
                found["pictures"],
                f"{found['kept'] / found['pictures']:.1%}",
                ", ".join(f"{check} {count}" for check, count in found["refused"].items())
                or "none",
            )
            for name, found in metrics["rates"].items()
        ],
    )
    click.echo(f"\nDice of the lungs on masks held out: {metrics['dice']:.3f}")
    click.echo(f"run folder: {out}")


@click.command()
@click.argument("fields", type=any_path)
@run_options()
@click.option(
    "--pairs",
    type=any_path,
    metavar="DATA",
    help="Data set of whole X-rays; its sources with both NORMAL and OTHER_PNEUMONIA are added.",
)
@click.option(
    "--gate",
    type=any_path,
    metavar="RUN",
    help="Run folder of `train gate`, or a bundle with a gate; segments the lungs of --pairs.",
)
@size_option(default=192)
@setting(
    "--pair-share",
    0.25,
    click.FloatRange(0, 1, max_open=True),
    "Share of --pairs in each mini-batch.",
)
@setting(
    "--fewest",
    50,
    click.IntRange(1),
    "Minimum of training images of each class that a source of --pairs must have.",
)
@step_options(steps=500, batch_size=128, learning_rate=1e-3, checkpoint_steps=50)
@json_option
def fields(
    *,
    fields: Path,
    out: Path,
    resume: bool,
    pairs: Path | None,
    gate: Path | None,
    as_json: bool,
    **options: Any,  # noqa: ANN401 - click's options by name
) -> None:
    """Train a network on FIELDS: lungs cut out of X-rays, black around them.

    FIELDS is a data set with the labels NORMAL, OTHER (abnormal, but no opacity) and OPACITY.
    `lungwatch train findings` makes it a network for whole X-rays.
    """
    from lungwatch.training.recipes.fields import FieldFitConfig, train_fields

    with training_progress() as progress:
        metrics = train_fields(
            fields,
            out,
            fitting=FieldFitConfig(
                size_px=options["size"],
                imagenet=not options["random_start"],
                steps=options["steps"],
                batch_size=options["batch_size"],
                pair_share=options["pair_share"],
                fewest=options["fewest"],
                learning_rate=options["learning_rate"],
                seed=options["seed"],
                checkpoint_steps=options["checkpoint_steps"],
            ),
            pairs=pairs,
            gate=gate,
            resume=resume,
            progress=progress,
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
