"""`lungwatch train`: build networks from labelled X-rays."""

import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lungwatch.cli.options import json_option

if TYPE_CHECKING:
    from lungwatch.training.train_baseline import Progress


@click.group()
def train() -> None:
    """Train a model (extra 'train')."""


@train.command()
@click.argument("data", type=click.Path(path_type=Path))
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    required=True,
    help="Run folder to fill: configuration, history, plots, metrics, model.keras.",
)
@click.option("--epochs", type=click.IntRange(1), default=40, show_default=True, help="At most.")
@click.option("--batch-size", type=click.IntRange(1), default=32, show_default=True)
@click.option("--learning-rate", type=float, default=1e-3, show_default=True)
@click.option("--dropout", type=click.FloatRange(0, 0.95), default=0.4, show_default=True)
@click.option(
    "--size", type=click.IntRange(32, 1024), default=128, show_default=True, help="Input side, px."
)
@click.option("--seed", type=click.IntRange(0), default=1, show_default=True)
@click.option("--resume", is_flag=True, help="Continue the interrupted run in the run folder.")
@json_option
def baseline(
    *,
    data: Path,
    out: Path,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    dropout: float,
    size: int,
    seed: int,
    resume: bool,
    as_json: bool,
) -> None:
    """Train the baseline network from scratch.

    DATA is a folder SPLIT/CLASS/ (splits train and val; classes COVID, NORMAL,
    OTHER_PNEUMONIA), or a manifest CSV or a folder with one (columns file, label, split).
    Training stops when the validation loss no longer falls.
    """
    from lungwatch.training.baseline import BaselineConfig
    from lungwatch.training.fit import FitConfig
    from lungwatch.training.train_baseline import train_baseline

    metrics = train_baseline(
        data,
        out,
        network=BaselineConfig(size_px=size, dropout=dropout),
        fitting=FitConfig(
            epochs=epochs, batch_size=batch_size, learning_rate=learning_rate, seed=seed
        ),
        resume=resume,
        progress=_progress(),
    )
    _report(metrics, out, as_json=as_json)


@train.command()
@click.argument("data", type=click.Path(path_type=Path))
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    required=True,
    help="Run folder to fill: configuration, history, plots, metrics, model.keras.",
)
@click.option(
    "--backbone",
    default="resnet50v2",
    show_default=True,
    help="efficientnet-lite0, or a network of keras.applications.",
)
@click.option(
    "--weights",
    default="imagenet",
    show_default=True,
    help="imagenet (fetched from the network), none, or a file: a Keras model, a trained run's "
    "model.keras, or weights as keras.applications takes them.",
)
@click.option(
    "--size", type=click.IntRange(32, 1024), default=128, show_default=True, help="Input side, px."
)
@click.option(
    "--freeze-epochs",
    type=click.IntRange(0),
    default=10,
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
@click.option("--batch-size", type=click.IntRange(1), default=32, show_default=True)
@click.option(
    "--learning-rate", type=float, default=1e-3, show_default=True, help="With it frozen."
)
@click.option("--fine-tune-learning-rate", type=float, default=1e-4, show_default=True)
@click.option("--dropout", type=click.FloatRange(0, 0.95), default=0.3, show_default=True)
@click.option(
    "--unfreeze",
    default="all",
    show_default=True,
    metavar="all|N",
    help="What is fine-tuned: all, or the last N convolutions.",
)
@click.option("--seed", type=click.IntRange(0), default=1, show_default=True)
@click.option("--resume", is_flag=True, help="Continue the interrupted run in the run folder.")
@json_option
def transfer(
    *,
    data: Path,
    out: Path,
    backbone: str,
    weights: str,
    size: int,
    freeze_epochs: int,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    fine_tune_learning_rate: float,
    dropout: float,
    unfreeze: str,
    seed: int,
    resume: bool,
    as_json: bool,
) -> None:
    """Train a network on a backbone trained elsewhere.

    DATA is as for `baseline`. First only the new head learns, then the backbone is fine-tuned
    with it, its batch norm in inference mode; if that does not lower the validation loss, the
    network with the frozen backbone is kept.
    """
    from lungwatch.training.fit import FitConfig
    from lungwatch.training.train_transfer import train_transfer
    from lungwatch.training.transfer import TransferConfig

    if unfreeze != "all" and not (unfreeze.isascii() and unfreeze.isdigit()):
        raise click.BadParameter("neither 'all' nor a number", param_hint="--unfreeze")

    def fitting(most: int, rate: float) -> FitConfig | None:
        if most == 0:
            return None
        return FitConfig(epochs=most, batch_size=batch_size, learning_rate=rate, seed=seed)

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
        frozen=fitting(freeze_epochs, learning_rate),
        tuning=fitting(epochs, fine_tune_learning_rate),
        resume=resume,
        progress=_progress(),
    )
    _report(metrics, out, as_json=as_json)


def _report(metrics: dict[str, Any], out: Path, *, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(metrics, indent=2))
        return
    found = metrics["validation"]
    phase = f" ({metrics['phase']})" if "phase" in metrics else ""
    click.echo(
        f"best epoch {metrics['best_epoch']} of {metrics['epochs']}{phase}; validation: "
        f"ROC-AUC {found['roc_auc']:.3f}, sensitivity {found['sensitivity']:.3f}, specificity "
        f"{found['specificity']:.3f} at threshold {metrics['decision']['threshold']:.3f}"
    )
    click.echo(f"run folder: {out}")


def _progress() -> "Progress":
    from lungwatch.training.train_baseline import Progress

    # Lines for a log file; on a terminal also a bar that is drawn over.
    terminal = sys.stderr.isatty()

    def on_batch(epoch: int, batch: int, batches: int) -> None:
        filled = math.floor(30 * batch / batches)
        bar = "#" * filled + "-" * (30 - filled)
        click.echo(f"\repoch {epoch} [{bar}] {batch}/{batches}", err=True, nl=False)

    def on_epoch(row: dict[str, float]) -> None:
        click.echo(
            f"{chr(13) if terminal else ''}epoch {row['epoch']}: loss {row['loss']:.4f}, "
            f"validation loss {row['val_loss']:.4f}, ROC-AUC {row['val_auc']:.4f}".ljust(60),
            err=True,
        )

    return Progress(on_batch=on_batch if terminal else None, on_epoch=on_epoch)
