"""`lungwatch train fields`: a network that tells what lungs show, by their field alone."""

import json
from pathlib import Path

import click

from lungwatch.cli.options import json_option
from lungwatch.cli.output import print_table
from lungwatch.cli.train_options import batch_size_option, progress, run_options


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
    from lungwatch.training.train_fields import FieldFitConfig, train_fields

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
