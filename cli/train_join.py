"""`lungwatch train join`: several networks as one."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from lungwatch.cli.options import json_option, label_map_option
from lungwatch.cli.train_options import leaks_option, leave_out_option, progress, report

if TYPE_CHECKING:
    from lungwatch.training.label_map import LabelMap
    from lungwatch.training.leaks import LeakPolicy


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
    from lungwatch.training.train_join import train_join

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
