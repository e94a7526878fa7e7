"""`lungwatch train findings`: COVID and opacity of a network that sees the lungs alone."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from lungwatch.cli.options import json_option
from lungwatch.cli.train_options import (
    data_argument,
    leaks_option,
    leave_out_option,
    progress,
    report,
)

if TYPE_CHECKING:
    from lungwatch.training.leaks import LeakPolicy


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
    from lungwatch.training.train_findings import train_findings

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
