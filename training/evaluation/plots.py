"""Plots of data sets, training runs, evaluations and the release gate, as PNG."""

from collections.abc import Sequence
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from lungwatch import RESEARCH_USE_ONLY
from lungwatch.errors import MissingExtraError
from lungwatch.files import write_atomic
from lungwatch.preprocess import PreprocessSpec, content_of, enlarged
from lungwatch.training.data.check import Confound, DatasetCheck
from lungwatch.training.data.dataset import CLASSES, SPLITS
from lungwatch.training.data.pixels import FloatArray, LesionImage
from lungwatch.training.data.scan import HISTOGRAM_BINS, ScannedImage
from lungwatch.training.data.splits import SplitTable
from lungwatch.training.evaluation.evaluation import Scored
from lungwatch.training.evaluation.gate_rates import Rate
from lungwatch.training.evaluation.metrics import figures, roc_auc, roc_curve
from lungwatch.training.evaluation.release_data import CriterionCheck
from lungwatch.training.fitting.augmentation import NO_AUGMENTATION, Augmentation, augment

_GRID_COLUMNS = 8
_GRID_ROWS = 3
_TILE_PX = 96
_AUGMENTED = 6
_PAIRS_PER_ROW = 4
_MOST_PAIRS = 24
_MOST_TILES = 24
_BINS = 10
# Okabe & Ito's colours keep their difference for colour-blind eyes.
_COVID, _OTHERS, _SECOND = "#D55E00", "#0072B2", "#009E73"
_SPLIT_COLOURS = dict(zip(SPLITS, (_OTHERS, "#E69F00", _SECOND), strict=True))
_VERDICT_COLOURS = {"pass": _SECOND, "fail": _COVID}
_BARS = (
    ("peak on an opacity", "peak_on_lesion", "#D55E00"),
    ("… of a random point of the lungs", "random_point_of_lungs", "#999999"),
    ("… of another patient's map", "other_map_peak", "#999999"),
    ("share of the map on opacities", "map_on_lesion", "#0072B2"),
    ("… of another patient's map", "other_map_share", "#999999"),
    ("likeness of different patients' maps", "likeness_of_maps", "#009E73"),
)
_MOST_CASES = 20
_COLUMNS = 5


def draw_exploration(scans: Sequence[ScannedImage], *, seed: int) -> dict[str, bytes]:
    """Draw a data set: distribution, sizes, grey values, samples, augmentations.

    Parameters
    ----------
    scans
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
    axes.legend(loc="upper right")
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
        axes.legend(markerscale=2, loc="upper right")
    return to_png(figure)


def _histograms(scans: Sequence[ScannedImage], findings: Sequence[str]) -> bytes:
    figure = new_figure(6.0, 3.2)
    axes = figure.subplots()
    edges = np.linspace(0.0, 1.0, HISTOGRAM_BINS + 1)
    for finding in findings:
        mean = np.mean([k.histogram for k in scans if k.sample.finding == finding], axis=0)
        axes.stairs(mean, edges, label=finding)
    axes.set(xlabel="grey value (0..1)", ylabel="share of the pixels")
    axes.legend(loc="upper right")
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
            axes.legend(fontsize=8, loc="upper right")
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
        bars = axes.barh(at, counts / totals, left=left, color=_SPLIT_COLOURS[part], label=part)
        axes.bar_label(
            bars, [str(count or "") for count in counts], label_type="center", fontsize=7
        )
        left += counts / totals
    names = [f"{row.label} {row.source}".strip() for row in rows]
    axes.set_yticks(at, names, fontsize=8, parse_math=False)
    axes.set(xlim=(0.0, 1.0), xlabel="share of the images (number)")
    axes.legend(ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    return to_png(figure)


def draw_plots(scored: Scored, other: Scored | None = None) -> dict[str, bytes]:
    """Draw ROC, precision-recall, reliability, confusion matrix and score histogram.

    Parameters
    ----------
    scored
        The answers.
    other
        Another model's on the same cases, drawn beside them in the curves.

    Returns
    -------
    dict
        Name without suffix -> the bytes of a PNG file.
    """
    both = [scored] if other is None else [scored, other]
    return {
        "roc": _roc(both),
        "pr": _precision_recall(both),
        "reliability": _reliability(both),
        "confusion": _confusion(scored),
        "scores": _histogram(scored),
    }


def require_matplotlib() -> None:
    """Raise MissingExtraError if plots cannot be drawn, before the work that they show."""
    new_figure(1.0, 1.0)


def draw_gallery(strips: Sequence[tuple[str, Sequence[Any]]]) -> bytes:
    """Draw cases in rows of pictures.

    Parameters
    ----------
    strips
        For each case what stands beside it, and its pictures, uint8 (h, w) or RGB (h, w, 3):
        the X-ray, the map for COVID, the map for NEGATIVE.
    """
    heads = ("X-ray", "Grad-CAM, COVID", "Grad-CAM, NEGATIVE")
    figure = new_figure(7.5, 0.5 + 2.3 * len(strips))
    grid = figure.subplots(len(strips), len(heads), squeeze=False)
    for line, (caption, pictures) in zip(grid, strips, strict=True):
        for axes, picture in zip(line, pictures, strict=True):
            axes.imshow(picture, cmap="gray", vmin=0, vmax=255)
            axes.set(xticks=[], yticks=[])
        line[0].set_ylabel(caption, parse_math=False, fontsize=8)
    for axes, head in zip(grid[0], heads, strict=True):
        axes.set_title(head, fontsize=9)
    return _png(figure)


def draw_gate_rates(found: Sequence[Rate]) -> bytes:
    """Draw what a content gate kept, what it refused, and what the reader refused before it."""
    figure = new_figure(9, 1.2 + 0.35 * len(found))
    axes = figure.subplots()
    names = [f"{rate.folder}, {rate.variant} ({rate.pictures})" for rate in found]
    parts = (
        ("kept", _OTHERS, [rate.kept for rate in found]),
        ("refused by the gate", _COVID, [sum(rate.refused_by_gate.values()) for rate in found]),
        ("refused on reading", _SECOND, [sum(rate.refused_by_reader.values()) for rate in found]),
    )
    left = np.zeros(len(found))
    for label, colour, counts in parts:
        shares = np.array(counts) / [rate.pictures for rate in found]
        axes.barh(range(len(found)), shares, left=left, color=colour, label=label)
        left += shares
    axes.set_yticks(range(len(found)), names, fontsize=8, parse_math=False)
    axes.set(xlim=(0, 1), ylim=(len(found) - 0.4, -0.6), xlabel="share of the pictures")
    figure.legend(fontsize=8, loc="outside upper center", ncols=3, title="Content gate")
    return _png(figure)


def _roc(both: Sequence[Scored]) -> bytes:
    figure = new_figure(5, 5)
    axes = figure.subplots()
    for scored, colour in zip(both, (_COVID, _SECOND), strict=False):
        fpr, tpr, thresholds = roc_curve(scored.targets, scored.probabilities)
        area = roc_auc(scored.targets, scored.probabilities)
        axes.plot(fpr, tpr, color=colour, label=f"{_name(scored)}, area {area:.3f}")
        at = int(np.sum(thresholds >= scored.judgement.decision.threshold)) - 1
        axes.plot(fpr[at], tpr[at], "o", color=colour)
    axes.plot([0, 1], [0, 1], color="grey", linestyle=":", label="chance")
    axes.set(xlabel="1 - specificity", ylabel="sensitivity", title="ROC (dot: the threshold)")
    return _square(figure, axes)


def _precision_recall(both: Sequence[Scored]) -> bytes:
    figure = new_figure(5, 5)
    axes = figure.subplots()
    for scored, colour in zip(both, (_COVID, _SECOND), strict=False):
        y, p = scored.targets, scored.probabilities
        fpr, tpr, _ = roc_curve(y, p)
        tp, fp = tpr[1:] * y.sum(), fpr[1:] * (1 - y).sum()
        area = figures(y, p, 0.5).pr_auc
        label = f"{_name(scored)}, area {area:.3f}"
        axes.step(tpr[1:], tp / (tp + fp), where="pre", color=colour, label=label)
    share = float(both[0].targets.mean())
    axes.axhline(share, color="grey", linestyle=":", label=f"share of COVID, {share:.2f}")
    axes.set(xlabel="sensitivity (recall)", ylabel="precision", title="Precision and recall")
    return _square(figure, axes)


def _reliability(both: Sequence[Scored]) -> bytes:
    figure = new_figure(5, 5)
    axes = figure.subplots()
    for scored, colour in zip(both, (_COVID, _SECOND), strict=False):
        y, p = scored.targets, scored.probabilities
        index = np.minimum((p * _BINS).astype(np.intp), _BINS - 1)
        counts = np.bincount(index, minlength=_BINS)
        there = counts > 0
        stated = np.bincount(index, weights=p, minlength=_BINS)[there] / counts[there]
        seen = np.bincount(index, weights=y, minlength=_BINS)[there] / counts[there]
        axes.plot(stated, seen, color=colour, alpha=0.6, label=_name(scored))
        # Area for number: a bin of three cases must not look like one of three hundred.
        axes.scatter(stated, seen, s=300 * counts[there] / counts.max() + 8, color=colour)
    axes.plot([0, 1], [0, 1], color="grey", linestyle=":", label="as stated")
    axes.set(
        xlabel="mean probability in the bin",
        ylabel="share of COVID in the bin",
        title="Reliability (dots: number of cases)",
    )
    return _square(figure, axes)


def _confusion(scored: Scored) -> bytes:
    said, true = scored.called, scored.targets > 0.5
    counts = np.array(
        [
            [np.sum(~true & ~said), np.sum(~true & said)],
            [np.sum(true & ~said), np.sum(true & said)],
        ]
    )
    shares = counts / counts.sum(axis=1, keepdims=True)
    figure = new_figure(4.5, 4.2)
    axes = figure.subplots()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for row, column in np.ndindex(2, 2):
        share = shares[row, column]
        axes.text(
            column,
            row,
            f"{counts[row, column]}\n{share:.1%}",
            ha="center",
            va="center",
            color="white" if share > 0.6 else "black",
        )
    axes.set(
        xticks=[0, 1],
        xticklabels=["others", "COVID"],
        yticks=[0, 1],
        yticklabels=["others", "COVID"],
        xlabel="said",
        ylabel="labelled",
        title=f"Threshold {scored.judgement.decision.threshold:.4f}, abstention ignored",
    )
    return _png(figure)


def _histogram(scored: Scored) -> bytes:
    figure = new_figure(6, 4)
    axes = figure.subplots()
    groups = sorted({s.finding for s in scored.samples})
    colours = {"COVID": _COVID, "NORMAL": _OTHERS, "OTHER_PNEUMONIA": _SECOND}
    p = scored.probabilities
    for group in groups:
        chosen = p[[s.finding == group for s in scored.samples]]
        label = f"{group} ({len(chosen)})"
        axes.hist(chosen, bins=25, range=(0, 1), alpha=0.5, color=colours[group], label=label)
    decision = scored.judgement.decision
    axes.axvline(decision.threshold, color="black", label="threshold")
    if decision.uncertain_low < decision.uncertain_high:
        axes.axvspan(
            decision.uncertain_low,
            decision.uncertain_high,
            color="grey",
            alpha=0.2,
            label="abstains",
        )
    axes.set(xlabel="calibrated probability of COVID", ylabel="images", xlim=(0, 1))
    axes.legend(fontsize=8, loc="upper center")
    return _png(figure)


def _name(scored: Scored) -> str:
    # matplotlib takes $ for mathematics, and leaves a label that begins with _ out.
    return scored.judgement.name.replace("$", r"\$").lstrip("_")


def _square(figure: Any, axes: Any) -> bytes:  # noqa: ANN401  # see _figure
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="lower right")
    return _png(figure)


def _png(figure: Any) -> bytes:  # noqa: ANN401 - matplotlib has no types
    return to_png(figure, note=RESEARCH_USE_ONLY)


def draw_release_gate(checks: Sequence[CriterionCheck]) -> bytes:
    """Draw every value that was measured with its interval and its bound."""
    shown = [check for check in checks if check.value is not None]
    figure = new_figure(11, 1.2 + 0.24 * max(1, len(shown)))
    axes = figure.subplots()
    for line, check in enumerate(shown):
        colour = _VERDICT_COLOURS[check.verdict]
        if check.interval:
            axes.plot(check.interval, [line, line], color=colour, linewidth=2, alpha=0.6)
        axes.plot(check.value, line, "o", color=colour, markersize=5)
        axes.plot(check.criterion.bound, line, "|", color="black", markersize=10)
    names = [f"{check.criterion.name}: {check.on}" for check in shown]
    axes.set_yticks(range(len(shown)), names, fontsize=7, parse_math=False)
    axes.set(
        ylim=(len(shown) - 0.4, -0.6),
        xlabel="value with its 95 % interval; bar: the bound; green: pass, red: fail",
        title="Release gate",
    )
    axes.grid(alpha=0.3, axis="x")
    return _png(figure)


def draw_lesions(found: dict[str, Any]) -> bytes:
    """Draw where maps lie beside what chance and other patients' maps would reach."""
    bars = [bar for bar in _BARS if found[bar[1]] is not None]
    figure = new_figure(8, 3.2)
    axes = figure.subplots()
    for line, (_, key, colour) in enumerate(bars):
        axes.barh(line, found[key], color=colour, alpha=0.75)
        if ends := found["intervals"].get(key):
            axes.plot(ends, [line, line], color="black", linewidth=1.5)
    axes.set_yticks(range(len(bars)), [title for title, _, _ in bars], fontsize=8)
    axes.set(
        ylim=(len(bars) - 0.4, -0.6),
        xlim=(0, 1),
        xlabel=f"{found['images']} images with drawn opacities; line: 95 % interval",
    )
    axes.grid(alpha=0.3, axis="x")
    return _png(figure)


def draw_lesion_cases(
    images: Sequence[LesionImage], maps: FloatArray, spec: PreprocessSpec
) -> bytes:
    """Draw X-rays under the map for COVID, with the outline of the drawn opacities."""
    chosen = range(min(_MOST_CASES, len(images)))
    rows = -(-len(chosen) // _COLUMNS)
    figure = new_figure(2.4 * _COLUMNS, 2.6 * rows)
    grid = figure.subplots(rows, _COLUMNS, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for index, axes in zip(chosen, grid.flat, strict=False):
        image = images[index]
        shape = (image.opacity.shape[0], image.opacity.shape[1])
        plain = content_of(image.pixels[..., 0], image.shape, spec)
        plain = np.asarray(cv2.resize(plain, shape[::-1], interpolation=cv2.INTER_LINEAR))
        laid = enlarged(content_of(maps[index], image.shape, spec), shape)
        axes.imshow(plain, cmap="gray", vmin=0, vmax=1)
        axes.imshow(laid, cmap="inferno", alpha=0.45 * np.clip(laid, 0, 1), vmin=0, vmax=1)
        axes.contour(image.opacity, levels=[0.5], colors="#56B4E9", linewidths=1)
        row, column = np.unravel_index(int(np.argmax(laid)), shape)
        axes.plot(column, row, "+", color="white", markersize=8)
        axes.set_title(image.name[:24], fontsize=7, parse_math=False)
    return _png(figure)
