"""How many images of each class and source a split has put where."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lungwatch.training.exploration_plots import new_figure, to_png
from lungwatch.training.look import Look
from lungwatch.training.samples import SPLITS, Split

_COLOURS = dict(zip(SPLITS, ("#0072B2", "#E69F00", "#009E73"), strict=True))


@dataclass(frozen=True, kw_only=True)
class Stratum:
    """Images of one class and source in each split."""

    label: str
    source: str
    train: int
    val: int
    test: int


@dataclass(frozen=True, kw_only=True)
class SplitTable:
    """A split in numbers.

    Attributes
    ----------
    images
        In all.
    groups
        Of one patient or X-ray, each in one split alone.
    strata
        By class and source.
    all
        Their sum.
    """

    images: int
    groups: int
    strata: list[Stratum]
    all: Stratum


def split_table(
    looks: Sequence[Look], groups: Sequence[int], splits: Sequence[Split]
) -> SplitTable:
    """Count; `groups` and `splits` are one an image."""
    kinds = [(look.sample.finding, look.sample.source) for look in looks]
    counts = Counter(zip(kinds, splits, strict=True))
    return SplitTable(
        images=len(looks),
        groups=len(set(groups)),
        strata=[
            Stratum(label=kind[0], source=kind[1], **{part: counts[kind, part] for part in SPLITS})
            for kind in sorted(set(kinds))
        ],
        all=Stratum(label="all", source="", **{part: splits.count(part) for part in SPLITS}),
    )


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
    # matplotlib takes $ for mathematics.
    axes.set_yticks(at, [name.replace("$", r"\$") for name in names], fontsize=8)
    axes.set(xlim=(0.0, 1.0), xlabel="share of the images (number)")
    axes.legend(ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    return to_png(figure)
