"""Pictures of a run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def plot_history(
    history: Sequence[dict[str, Any]], target: Path, *, boundary: int | None = None
) -> None:
    """Draw losses, accuracies and validation AUC over the epochs into a PNG file.

    What a history has no column for is left out. After the epoch `boundary`, a line marks the
    beginning of fine-tuning.
    """
    # The object interface: pyplot would look for a display and keep global state.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    epochs = [row["epoch"] for row in history]
    figure = Figure(figsize=(12, 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    panels = {
        "cross-entropy (nats)": {
            "loss": "training",
            "val_loss": "validation",
            "val_loss_calibrated": "validation, calibrated",
        },
        "accuracy, uncalibrated": {"accuracy": "training", "val_accuracy": "validation"},
        "ROC-AUC": {"val_auc": "validation"},
    }
    for axes, (title, curves) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        for name, label in curves.items():
            if name in history[0]:
                axes.plot(epochs, [row[name] for row in history], ".-", label=label)
        if "val_loss_calibrated" in history[0]:
            best = min(history, key=lambda row: row["val_loss_calibrated"])["epoch"]
            axes.axvline(best, color="grey", linestyle=":", label=f"best epoch ({best:.0f})")
        if boundary:
            axes.axvline(boundary + 0.5, color="tab:red", linestyle="--", label="fine-tuning")
        axes.set(xlabel="epoch", ylabel=title)
        axes.grid(alpha=0.3)
        if axes.get_lines():
            axes.legend(fontsize=8)
    figure.savefig(target, dpi=110)


def plot_group_weights(rows: Sequence[dict[str, Any]], target: Path) -> None:
    """Draw how the weights of groups moved over the epochs into a PNG file.

    Parameters
    ----------
    rows
        One an epoch: `epoch`, and the weight of each group by its name; together 1.
    target
        The file.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    epochs = [row["epoch"] for row in rows]
    for name in rows[0]:
        if name != "epoch":
            axes.plot(epochs, [row[name] for row in rows], ".-", label=name)
    axes.set(xlabel="epoch", ylabel="weight of the group", ylim=(0.0, None))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(target, dpi=110)


def plot_search(rows: Sequence[dict[str, Any]], logarithmic: dict[str, bool], target: Path) -> None:
    """Draw the value of a search's finished trials against each parameter into a PNG file.

    Parameters
    ----------
    rows
        Of the search's table.
    logarithmic
        The parameters, and whether their axis is.
    target
        The file.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    done = [row for row in rows if row["state"] == "done"]
    figure = Figure(figsize=(3.2 * len(logarithmic), 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    values = [row["value"] for row in done]
    best = min(range(len(done)), key=values.__getitem__) if done else 0
    grid = figure.subplots(1, len(logarithmic), sharey=True, squeeze=False)[0]
    for axes, (name, is_logarithmic) in zip(grid, logarithmic.items(), strict=True):
        x = [row[name] for row in done]
        marks = axes.scatter(x, values, c=[row["round"] for row in done], s=18)
        if done:
            axes.scatter(x[best], values[best], s=90, facecolors="none", edgecolors="tab:red")
        if is_logarithmic:
            axes.set_xscale("log")
        axes.set(xlabel=name)
        axes.grid(alpha=0.3)
    grid[0].set_ylabel("value (less is better)")
    if len({row["round"] for row in done}) > 1:
        figure.colorbar(marks, ax=list(grid), label="round")
    figure.savefig(target, dpi=110)
