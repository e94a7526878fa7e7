"""`lungwatch train gate`: a network that says whether a picture can be judged."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lungwatch.cli.options import json_option, label_map_option
from lungwatch.cli.output import print_table
from lungwatch.cli.train_options import batch_size_option, data_argument, progress, run_options

if TYPE_CHECKING:
    from lungwatch.training.label_map import LabelMap


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
    from lungwatch.training.train_gate import GateFitConfig, train_gate

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
