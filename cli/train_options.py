"""Options that the `train` commands share, and what they say while they work."""

import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from lungwatch.cli.options import label_map_option

if TYPE_CHECKING:
    from lungwatch.training.progress import Progress

Command = TypeVar("Command", bound=Callable[..., Any])


def data_argument(command: Command) -> Command:
    """Add the argument DATA, passed as `data`."""
    return click.argument("data", type=click.Path(path_type=Path))(command)


def batch_size_option(*, default: int) -> Callable[[Command], Command]:
    """Return the option `--batch-size`, passed as `batch_size`."""
    return click.option(
        "--batch-size",
        type=click.IntRange(1),
        default=default,
        show_default=True,
        help="Images of a step.",
    )


def dropout_option(*, default: float) -> Callable[[Command], Command]:
    """Return the option `--dropout`, passed as `dropout`."""
    return click.option(
        "--dropout",
        type=click.FloatRange(0, 0.95),
        default=default,
        show_default=True,
        help="Share of the features left out in training, before the last layer.",
    )


def run_options(command: Command) -> Command:
    """Add `--out`, `--seed` and `--resume`."""
    options = [
        click.option(
            "--out",
            type=click.Path(file_okay=False, path_type=Path),
            required=True,
            help="Run folder to fill: configuration, history, plots, metrics, model.keras.",
        ),
        click.option(
            "--seed",
            type=click.IntRange(0),
            default=1,
            show_default=True,
            help="Of every random choice: the same seed gives the same numbers.",
        ),
        click.option(
            "--resume", is_flag=True, help="Continue the interrupted run in the run folder."
        ),
    ]
    return _all(options, command)


size_option = click.option(
    "--size", type=click.IntRange(32, 1024), default=128, show_default=True, help="Input side, px."
)

leave_out_option = click.option(
    "--leave-out",
    metavar="SOURCE",
    help="Learn nothing from this source, so that it can test what was learnt.",
)

leaks_option = click.option(
    "--leaks",
    type=click.Choice(["refuse", "drop", "allow"]),
    default="refuse",
    show_default=True,
    help="X-rays or patients that stand in two splits: stop, leave them out of the one that is "
    "learnt from, or do not look.",
)


def data_options(command: Command) -> Command:
    """Add `--size`, `--leave-out`, `--leaks` and `--label-map`."""
    options = [
        size_option,
        leave_out_option,
        leaks_option,
        label_map_option,
    ]
    return _all(options, command)


def normalisation_options(*further: str, explained: str = "") -> Callable[[Command], Command]:
    """Add `--normalisation`, also of further kinds, which are explained; `--mean` and `--std`."""
    options = [
        click.option(
            "--normalisation",
            type=click.Choice(["train", "all", "fixed", "image", *further]),
            default="train",
            show_default=True,
            help="Grey levels by mean and deviation of the training set, of all splits, as given, "
            f"or of each image{explained}.",
        ),
        click.option("--mean", type=float, help="For 'fixed', 0..1; 0.5 if not given."),
        click.option("--std", type=float, help="For 'fixed', 0..1; 0.25 if not given."),
    ]
    return lambda command: _all(options, command)


def report(metrics: dict[str, Any], out: Path, *, as_json: bool) -> None:
    """Print what came out of a run."""
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


def progress() -> "Progress":
    """Lines for a log file; on a terminal also a bar that is drawn over."""
    from lungwatch.training.progress import Progress

    terminal = sys.stderr.isatty()
    start = "\r" if terminal else ""

    def on_batch(epoch: int, batch: int, batches: int) -> None:
        filled = math.floor(30 * batch / batches)
        bar = "#" * filled + "-" * (30 - filled)
        click.echo(f"\repoch {epoch} [{bar}] {batch}/{batches}", err=True, nl=False)

    def on_epoch(row: dict[str, float]) -> None:
        line = f"epoch {row['epoch']}: loss {row['loss']:.4f}"
        if "val_loss" in row:
            line += f", validation loss {row['val_loss']:.4f}"
        if "val_auc" in row:
            line += f", ROC-AUC {row['val_auc']:.4f}"
        click.echo(start + line.ljust(60), err=True)

    def on_trial(row: dict[str, Any]) -> None:
        said = row["error"] if row["value"] is None else f"{row['value']:.4f}"
        click.echo(start + f"trial {row['number']} {row['state']}: {said}".ljust(60), err=True)

    return Progress(on_batch=on_batch if terminal else None, on_epoch=on_epoch, on_trial=on_trial)


def _figures(found: dict[str, Any]) -> str:
    return (
        f"ROC-AUC {found['roc_auc']:.3f}, sensitivity {found['sensitivity']:.3f}, specificity "
        f"{found['specificity']:.3f}"
    )


def _all(options: Sequence[Callable[[Any], Any]], command: Command) -> Command:
    for option in reversed(options):
        command = option(command)
    return command
