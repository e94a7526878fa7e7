"""Pictures of a run."""

from pathlib import Path
from typing import Any


def plot_history(history: list[dict[str, Any]], target: Path) -> None:
    """Draw losses and validation AUC over the epochs into a PNG file."""
    # The object interface: pyplot would look for a display and keep global state.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    epochs = [row["epoch"] for row in history]
    best = min(history, key=lambda row: row["val_loss_calibrated"])["epoch"]
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    losses, areas = figure.subplots(1, 2)
    losses.plot(epochs, [row["loss"] for row in history], label="training")
    losses.plot(epochs, [row["val_loss"] for row in history], label="validation")
    calibrated = [row["val_loss_calibrated"] for row in history]
    losses.plot(epochs, calibrated, label="validation, calibrated")
    losses.set(xlabel="epoch", ylabel="cross-entropy (nats)")
    areas.plot(epochs, [row["val_auc"] for row in history], color="tab:orange")
    areas.set(xlabel="epoch", ylabel="validation ROC-AUC")
    for axes in (losses, areas):
        axes.axvline(best, color="grey", linestyle=":", label=f"best epoch ({best:.0f})")
        axes.grid(alpha=0.3)
    losses.legend()
    figure.savefig(target, dpi=110)
