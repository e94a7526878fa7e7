"""`lungwatch train lungs`: a network that finds the lungs."""

import json
from pathlib import Path

import click

from lungwatch.cli.options import json_option
from lungwatch.cli.train_options import batch_size_option, run_options


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
    from lungwatch.training.train_lungs import LungFitConfig, train_lungs

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
        on_epoch=on_epoch,
    )
    if as_json:
        click.echo(json.dumps(metrics, indent=2))
        return
    click.echo(
        f"Dice {metrics['dice']:.3f} (lowest {metrics['dice_lowest']:.3f}), intersection over "
        f"union {metrics['iou']:.3f}, on {metrics['val']} pairs held out"
    )
    click.echo(f"run folder: {out}")
