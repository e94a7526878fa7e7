"""What a data set looks like, in pictures."""

from collections.abc import Sequence
from dataclasses import replace
from io import BytesIO
from typing import Any

import cv2
import numpy as np

from lungwatch.errors import MissingExtraError
from lungwatch.training.augment import NO_AUGMENTATION, Augmentation, augment
from lungwatch.training.pixels import FloatArray
from lungwatch.training.samples import FINDINGS
from lungwatch.training.scan import HISTOGRAM_BINS, Look

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
        pictures[f"Samples of {finding}"] = _grid(tiles, _GRID_COLUMNS)
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
        pictures[title] = _grid(tiles, len(tiles))
    return pictures


def _grid(tiles: Sequence[FloatArray], columns: int) -> bytes:
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
    figure = _figure(6.0, 3.2)
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
    return _png(figure)


def _scatter(looks: Sequence[Look], findings: Sequence[str]) -> bytes:
    figure = _figure(9.0, 3.8)
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
    return _png(figure)


def _histograms(looks: Sequence[Look], findings: Sequence[str]) -> bytes:
    figure = _figure(6.0, 3.2)
    axes = figure.subplots()
    edges = np.linspace(0.0, 1.0, HISTOGRAM_BINS + 1)
    for finding in findings:
        mean = np.mean([k.histogram for k in looks if k.sample.finding == finding], axis=0)
        axes.stairs(mean, edges, label=finding)
    axes.set(xlabel="grey value (0..1)", ylabel="share of the pixels")
    axes.legend()
    axes.grid(alpha=0.3)
    return _png(figure)


def _figure(width_in: float, height_in: float) -> Any:  # noqa: ANN401 - matplotlib has no types
    # The object interface: pyplot would look for a display and keep global state.
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("drawing plots", "train") from error
    figure = Figure(figsize=(width_in, height_in), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _png(figure: Any) -> bytes:  # noqa: ANN401 - matplotlib has no types
    file = BytesIO()
    figure.savefig(file, format="png", dpi=100)
    return file.getvalue()
