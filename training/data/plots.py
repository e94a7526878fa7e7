"""Plots of data sets and of training runs, as PNG."""

from collections.abc import Sequence
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from lungwatch.errors import MissingExtraError
from lungwatch.files import write_atomic
from lungwatch.training.data.check import Confound, DatasetCheck
from lungwatch.training.data.dataset import CLASSES, SPLITS
from lungwatch.training.data.pixels import FloatArray
from lungwatch.training.data.scan import HISTOGRAM_BINS, ScannedImage
from lungwatch.training.data.splits import SplitTable
from lungwatch.training.fitting.augmentation import NO_AUGMENTATION, Augmentation, augment

_GRID_COLUMNS = 8
_GRID_ROWS = 3
_TILE_PX = 96
_AUGMENTED = 6
_PAIRS_PER_ROW = 4
_MOST_PAIRS = 24
_MOST_TILES = 24
_COLOURS = dict(zip(SPLITS, ("#0072B2", "#E69F00", "#009E73"), strict=True))


def draw_exploration(scans: Sequence[ScannedImage], *, seed: int) -> dict[str, bytes]:
    """Draw a data set: distribution, sizes, grey values, samples, augmentations.

    Parameters
    ----------
    looks
        The readable images; at least one.
    seed
        Of the samples shown and of the augmentations.

    Returns
    -------
    dict
        Caption -> the bytes of a PNG file.

    Raises
    ------
    MissingExtraError
        If matplotlib is not installed.
    """
    rng = np.random.default_rng(seed)
    findings = [f for f in CLASSES if any(item.sample.finding == f for item in scans)]
    pictures = {
        "Images by split and class": _distribution(scans, findings),
        "Sizes, means and standard deviations": _scatter(scans, findings),
        "Grey values, mean histogram of each class": _histograms(scans, findings),
    }
    for finding in findings:
        members = [item for item in scans if item.sample.finding == finding]
        chosen = rng.permutation(len(members))[: _GRID_COLUMNS * _GRID_ROWS]
        tiles = [members[index].thumbnail for index in chosen]
        pictures[f"Samples of {finding}"] = draw_grid(tiles, _GRID_COLUMNS)
    original = scans[int(rng.integers(len(scans)))].thumbnail
    return pictures | _augmentations(original, seed)


def _augmentations(original: FloatArray, seed: int) -> dict[str, bytes]:
    whole = Augmentation()
    kinds = {name: replace(NO_AUGMENTATION, **{name: value}) for name, value in vars(whole).items()}
    batch = np.repeat(original[None, :, :, None], _AUGMENTED, axis=0)
    pictures = {}
    for name, limits in {**kinds, "all combined": whole}.items():
        changed = augment(batch, limits, np.random.default_rng(seed))
        tiles = [original, *changed[:, :, :, 0]]
        limit = "" if name == "all combined" else f" up to {getattr(whole, name)}"
        title = f"Augmentation: {name}{limit} (first: the original)"
        pictures[title] = draw_grid(tiles, len(tiles))
    return pictures


def draw_grid(tiles: Sequence[FloatArray], columns: int) -> bytes:
    """Draw thumbnails, float32 0..1, in rows of so many; the bytes of a PNG file."""
    columns = min(columns, len(tiles))
    rows = -(-len(tiles) // columns)
    canvas = np.full((rows * _TILE_PX, columns * _TILE_PX), 255, dtype=np.uint8)
    for index, tile in enumerate(tiles):
        top, left = (_TILE_PX * part for part in divmod(index, columns))
        inner = _TILE_PX - 2
        large = cv2.resize(tile, (inner, inner), interpolation=cv2.INTER_LINEAR)
        grey = np.round(np.clip(large, 0.0, 1.0) * 255).astype(np.uint8)
        canvas[top : top + inner, left : left + inner] = grey
    done, data = cv2.imencode(".png", canvas)
    assert done
    return data.tobytes()


def _distribution(scans: Sequence[ScannedImage], findings: Sequence[str]) -> bytes:
    splits = sorted(
        {item.sample.split or "unsplit" for item in scans},
        key=["train", "val", "test", "unsplit"].index,
    )
    figure = new_figure(6.0, 3.2)
    axes = figure.subplots()
    base = np.zeros(len(splits))
    for finding in findings:
        counts = np.array(
            [
                sum(
                    item.sample.finding == finding and (item.sample.split or "unsplit") == split
                    for item in scans
                )
                for split in splits
            ]
        )
        axes.bar(splits, counts, bottom=base, label=finding)
        base += counts
    axes.set(ylabel="images")
    axes.legend()
    return to_png(figure)


def _scatter(scans: Sequence[ScannedImage], findings: Sequence[str]) -> bytes:
    figure = new_figure(9.0, 3.8)
    sizes, greys = figure.subplots(1, 2)
    for finding in findings:
        members = [item for item in scans if item.sample.finding == finding]
        style = {"s": 6, "alpha": 0.4, "label": finding}
        sizes.scatter([m.columns for m in members], [m.rows for m in members], **style)
        greys.scatter([m.mean for m in members], [m.std for m in members], **style)
    sizes.set(xlabel="width (pixels)", ylabel="height (pixels)")
    greys.set(xlabel="mean grey value of an image (0..1)", ylabel="its standard deviation")
    for axes in (sizes, greys):
        axes.grid(alpha=0.3)
        axes.legend(markerscale=2)
    return to_png(figure)


def _histograms(scans: Sequence[ScannedImage], findings: Sequence[str]) -> bytes:
    figure = new_figure(6.0, 3.2)
    axes = figure.subplots()
    edges = np.linspace(0.0, 1.0, HISTOGRAM_BINS + 1)
    for finding in findings:
        mean = np.mean([k.histogram for k in scans if k.sample.finding == finding], axis=0)
        axes.stairs(mean, edges, label=finding)
    axes.set(xlabel="grey value (0..1)", ylabel="share of the pixels")
    axes.legend()
    axes.grid(alpha=0.3)
    return to_png(figure)


def new_figure(width_in: float, height_in: float) -> Any:  # noqa: ANN401 - matplotlib has no types
    """Open a figure.

    Raises
    ------
    MissingExtraError
        If matplotlib is not installed.
    """
    # The object interface: pyplot would look for a display and keep global state.
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("drawing plots", "train") from error
    figure = Figure(figsize=(width_in, height_in), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def to_png(figure: Any, *, note: str = "") -> bytes:  # noqa: ANN401 - matplotlib has no types
    """Return a figure, perhaps with a note below it, as the bytes of a PNG file."""
    if note:
        figure.supxlabel(note, fontsize=7, color="dimgrey")
    file = BytesIO()
    # Without the version of matplotlib in it, the same figures give the same bytes.
    figure.savefig(file, format="png", dpi=110, metadata={"Software": None})
    return file.getvalue()


def draw_check(found: DatasetCheck, scans: Sequence[ScannedImage]) -> dict[str, bytes]:
    """Draw the confounds, the first duplicates side by side, and what is to be looked at.

    Returns
    -------
    dict
        Caption -> the bytes of a PNG file.

    Raises
    ------
    MissingExtraError
        If matplotlib is not installed.
    """
    thumbnails = {item.sample.path: item.thumbnail for item in scans}
    pictures = {}
    if found.confounds:
        pictures["COVID told without the lungs"] = _confounds(found.confounds)
    pairs = found.duplicates[:_MOST_PAIRS]
    if pairs:
        tiles = [thumbnails[path] for pair in pairs for path in (pair.first, pair.second)]
        caption = f"Pairs that show the same X-ray (the first {len(pairs)}, side by side)"
        pictures[caption] = draw_grid(tiles, 2 * _PAIRS_PER_ROW)
    listed: dict[str, Sequence[Path]] = {
        "Mostly border (heuristic)": found.mostly_border,
        "Burnt-in text candidates (heuristic)": found.text_candidates,
    }
    for caption, paths in listed.items():
        if paths:
            tiles = [thumbnails[path] for path in paths[:_MOST_TILES]]
            pictures[f"{caption}, the first {len(tiles)}"] = draw_grid(tiles, 8)
    return pictures


def _confounds(confounds: Sequence[Confound]) -> bytes:
    labels = [f"{c.against}, {c.among}: {c.feature}" for c in confounds]
    figure = new_figure(8.0, 0.8 + 0.22 * len(labels))
    axes = figure.subplots()
    at = np.arange(len(labels))[::-1]
    errors = [c.fold_std for c in confounds]
    axes.barh(at, [c.roc_auc for c in confounds], xerr=errors, color="#0072B2", alpha=0.7)
    axes.axvline(0.5, color="grey", linestyle=":")
    axes.set(xlabel="ROC-AUC (bar: standard deviation over folds)", xlim=(0.0, 1.05))
    axes.set_yticks(at, labels, fontsize=7, parse_math=False)
    return to_png(figure)


def plot_history(
    history: Sequence[dict[str, Any]], target: Path, *, boundary: int | None = None
) -> None:
    """Draw losses, accuracies and validation AUC over the epochs into a PNG file.

    What a history has no column for is left out. After the epoch `boundary`, a line marks the
    beginning of fine-tuning.
    """
    epochs = [row["epoch"] for row in history]
    figure = new_figure(12, 3.5)
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
    write_atomic(target, to_png(figure))


def plot_group_weights(rows: Sequence[dict[str, Any]], target: Path) -> None:
    """Draw how the weights of groups moved over the epochs into a PNG file.

    Parameters
    ----------
    rows
        One an epoch: `epoch`, and the weight of each group by its name; together 1.
    target
        The file.
    """
    figure = new_figure(7.5, 3.5)
    axes = figure.subplots()
    epochs = [row["epoch"] for row in rows]
    for name in rows[0]:
        if name != "epoch":
            axes.plot(epochs, [row[name] for row in rows], ".-", label=name)
    axes.set(xlabel="epoch", ylabel="weight of the group", ylim=(0.0, None))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    write_atomic(target, to_png(figure))


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
    done = [row for row in rows if row["state"] == "done"]
    figure = new_figure(3.2 * len(logarithmic), 3.2)
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
    write_atomic(target, to_png(figure))


def draw_split(table: SplitTable) -> bytes:
    """Draw the shares of the splits within each stratum as a PNG.

    Raises
    ------
    MissingExtraError
        If matplotlib is not installed.
    """
    rows = [*table.strata, table.all]
    figure = new_figure(7.0, 1.2 + 0.3 * len(rows))
    axes = figure.subplots()
    at = np.arange(len(rows))[::-1]
    left = np.zeros(len(rows))
    totals = np.array([row.train + row.val + row.test for row in rows])
    for part in SPLITS:
        counts = np.array([getattr(row, part) for row in rows])
        bars = axes.barh(at, counts / totals, left=left, color=_COLOURS[part], label=part)
        axes.bar_label(
            bars, [str(count or "") for count in counts], label_type="center", fontsize=7
        )
        left += counts / totals
    names = [f"{row.label} {row.source}".strip() for row in rows]
    axes.set_yticks(at, names, fontsize=8, parse_math=False)
    axes.set(xlim=(0.0, 1.0), xlabel="share of the images (number)")
    axes.legend(ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    return to_png(figure)
