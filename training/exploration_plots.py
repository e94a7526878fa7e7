"""What a data set looks like, in pictures."""

from collections.abc import Sequence
from dataclasses import replace
from io import BytesIO
from typing import Any

import cv2
import numpy as np

from lungwatch.errors import MissingExtraError
from lungwatch.training.augment import NO_AUGMENTATION, Augmentation, augment
from lungwatch.training.look import HISTOGRAM_BINS, Look
from lungwatch.training.pixels import FloatArray
from lungwatch.training.samples import FINDINGS

_GRID_COLUMNS = 8
_GRID_ROWS = 3
_TILE_PX = 96
_AUGMENTED = 6


def draw_exploration(looks: Sequence[Look], *, seed: int) -> dict[str, bytes]:
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
    findings = [f for f in FINDINGS if any(look.sample.finding == f for look in looks)]
    pictures = {
        "Images by split and class": _distribution(looks, findings),
        "Sizes, means and standard deviations": _scatter(looks, findings),
        "Grey values, mean histogram of each class": _histograms(looks, findings),
    }
    for finding in findings:
        members = [look for look in looks if look.sample.finding == finding]
        chosen = rng.permutation(len(members))[: _GRID_COLUMNS * _GRID_ROWS]
        tiles = [members[index].thumbnail for index in chosen]
        pictures[f"Samples of {finding}"] = draw_grid(tiles, _GRID_COLUMNS)
    original = looks[int(rng.integers(len(looks)))].thumbnail
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


def _distribution(looks: Sequence[Look], findings: Sequence[str]) -> bytes:
    splits = sorted(
        {look.sample.split or "unsplit" for look in looks},
        key=["train", "val", "test", "unsplit"].index,
    )
    figure = new_figure(6.0, 3.2)
    axes = figure.subplots()
    base = np.zeros(len(splits))
    for finding in findings:
        counts = np.array(
            [
                sum(
                    look.sample.finding == finding and (look.sample.split or "unsplit") == split
                    for look in looks
                )
                for split in splits
            ]
        )
        axes.bar(splits, counts, bottom=base, label=finding)
        base += counts
    axes.set(ylabel="images")
    axes.legend()
    return to_png(figure)


def _scatter(looks: Sequence[Look], findings: Sequence[str]) -> bytes:
    figure = new_figure(9.0, 3.8)
    sizes, greys = figure.subplots(1, 2)
    for finding in findings:
        members = [look for look in looks if look.sample.finding == finding]
        style = {"s": 6, "alpha": 0.4, "label": finding}
        sizes.scatter([m.columns for m in members], [m.rows for m in members], **style)
        greys.scatter([m.mean for m in members], [m.std for m in members], **style)
    sizes.set(xlabel="width (pixels)", ylabel="height (pixels)")
    greys.set(xlabel="mean grey value of an image (0..1)", ylabel="its standard deviation")
    for axes in (sizes, greys):
        axes.grid(alpha=0.3)
        axes.legend(markerscale=2)
    return to_png(figure)


def _histograms(looks: Sequence[Look], findings: Sequence[str]) -> bytes:
    figure = new_figure(6.0, 3.2)
    axes = figure.subplots()
    edges = np.linspace(0.0, 1.0, HISTOGRAM_BINS + 1)
    for finding in findings:
        mean = np.mean([k.histogram for k in looks if k.sample.finding == finding], axis=0)
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


def to_png(figure: Any) -> bytes:  # noqa: ANN401 - matplotlib has no types
    """Return a figure as the bytes of a PNG file."""
    file = BytesIO()
    # Without the version of matplotlib in it, the same figures give the same bytes.
    figure.savefig(file, format="png", dpi=100, metadata={"Software": None})
    return file.getvalue()
