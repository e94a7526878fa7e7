"""Pictures of a release gate and of maps on drawn opacities, as PNG."""

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np

from lungwatch import RESEARCH_USE_ONLY
from lungwatch.lungfield import enlarged
from lungwatch.preprocess import PreprocessSpec, content_of
from lungwatch.training.exploration_plots import new_figure, to_png
from lungwatch.training.lesion_masks import LesionImage
from lungwatch.training.pixels import FloatArray
from lungwatch.training.release_criteria import Check

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


def _png(figure: Any) -> bytes:  # noqa: ANN401 - matplotlib has no types
    figure.supxlabel(RESEARCH_USE_ONLY, fontsize=7, color="dimgrey")
    return to_png(figure)
