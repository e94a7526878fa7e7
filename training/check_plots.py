"""What a check of a data set found, in pictures."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lungwatch.training.confounds import Confound
from lungwatch.training.dataset_check import DatasetCheck
from lungwatch.training.exploration_plots import draw_grid, new_figure, to_png
from lungwatch.training.look import Look

_PAIRS_PER_ROW = 4
_MOST_PAIRS = 24
_MOST_TILES = 24


def draw_check(found: DatasetCheck, looks: Sequence[Look]) -> dict[str, bytes]:
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
    thumbnails = {look.sample.path: look.thumbnail for look in looks}
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
    # matplotlib takes $ for mathematics.
    axes.set_yticks(at, [label.replace("$", r"\$") for label in labels], fontsize=7)
    return to_png(figure)
