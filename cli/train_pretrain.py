"""`lungwatch train pretrain`: a backbone from labelled X-rays."""

import json
from pathlib import Path

import click

from lungwatch.cli.options import json_option
from lungwatch.cli.train_backbone import backbone_options, grey_options, normalisation_of
from lungwatch.cli.train_options import (
    batch_size_option,
    dropout_option,
    progress,
    run_options,
    size_option,
)


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
    from lungwatch.training.fit_tasks import TasksConfig
    from lungwatch.training.pretrain import PretrainConfig
    from lungwatch.training.tasks import parse_tasks
    from lungwatch.training.train_pretrain import train_pretrain

    metrics = train_pretrain(
        data,
        out,
        network=PretrainConfig(backbone=backbone, weights=weights, size_px=size, dropout=dropout),
        task_weights=parse_tasks(tasks),
        fitting=TasksConfig(
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
