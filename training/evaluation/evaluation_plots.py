"""Plots of an evaluation and of the release gate, as PNG."""

import importlib
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np

from lungwatch import RESEARCH_USE_ONLY
from lungwatch.errors import MissingExtraError
from lungwatch.preprocess import PreprocessSpec, content_of, enlarged
from lungwatch.training.data.pixels import FloatArray, LesionImage
from lungwatch.training.data.plots import new_figure, to_png
from lungwatch.training.evaluation.evaluation import Scored
from lungwatch.training.evaluation.gate_rates import Rate
from lungwatch.training.evaluation.metrics import figures, roc_auc, roc_curve
from lungwatch.training.evaluation.release_criteria import Check

_BINS = 10
# Okabe & Ito's colours keep their difference for colour-blind eyes.
_COVID, _OTHERS, _SECOND = "#D55E00", "#0072B2", "#009E73"
# Okabe & Ito's colours keep their difference for colour-blind eyes.
_COLOURS = {"pass": "#009E73", "fail": "#D55E00"}
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
    """Make sure that pictures can be drawn, before the work whose result they show.

    Raises
    ------
    MissingExtraError
        If matplotlib is not installed.
    """
    try:
        importlib.import_module("matplotlib")
    except ImportError as error:
        raise MissingExtraError("drawing plots", "train") from error


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
    axes.legend(fontsize=8)
    return _png(figure)


def _name(scored: Scored) -> str:
    # matplotlib takes $ for mathematics, and leaves a label that begins with _ out.
    return scored.judgement.name.replace("$", r"\$").lstrip("_")


def _square(figure: Any, axes: Any) -> bytes:  # noqa: ANN401  # see _figure
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return _png(figure)


def _png(figure: Any) -> bytes:  # noqa: ANN401 - matplotlib has no types
    return to_png(figure, note=RESEARCH_USE_ONLY)


def draw_release_gate(checks: Sequence[Check]) -> bytes:
    """Draw every value that was measured with its interval and its bound."""
    shown = [check for check in checks if check.value is not None]
    figure = new_figure(11, 1.2 + 0.24 * max(1, len(shown)))
    axes = figure.subplots()
    for line, check in enumerate(shown):
        colour = _COLOURS[check.verdict]
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
