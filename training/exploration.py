"""What a data set looks like, in numbers."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lungwatch.training.label_map import LabelCount
from lungwatch.training.look import Look
from lungwatch.training.samples import Sample
from lungwatch.training.scan import Unreadable

# Iglewicz & Hoaglin 1993: modified z-scores beyond 3.5 are potential outliers.
_MAX_ROBUST_Z = 3.5
_MEASURES = ("mean", "std", "p01", "p50", "p99")


@dataclass(frozen=True, kw_only=True)
class PixelStatistics:
    """Grey values (0..1) of one split and class; every image weighs the same.

    Attributes
    ----------
    split, finding
        The group; "all" for everything.
    images
        Number of images.
    mean, std
        Of all the pixels together.
    mean_of_means, std_of_means
        How the images' own means are distributed.
    mean_of_stds, std_of_stds
        How the images' own standard deviations are distributed.
    """

    split: str
    finding: str
    images: int
    mean: float
    std: float
    mean_of_means: float
    std_of_means: float
    mean_of_stds: float
    std_of_stds: float


@dataclass(frozen=True, kw_only=True)
class Outlier:
    """An image whose grey values are unlike the others'.

    Attributes
    ----------
    file
        The image.
    measure
        What is furthest off: mean, std, or a percentile.
    value
        Its value, 0..1.
    robust_z
        Its distance from the median in robust standard deviations.
    """

    file: Path
    measure: str
    value: float
    robust_z: float


@dataclass(frozen=True, kw_only=True)
class Exploration:
    """A data set in numbers.

    Attributes
    ----------
    location
        The folder or manifest.
    files
        Number of files listed.
    distribution
        Split -> finding -> number of files.
    sources
        "source/FINDING" -> number of files.
    formats, sizes
        Format, and "COLUMNSxROWS" (the twenty commonest), -> number of images.
    size_range
        Smallest and largest width and height, in pixels.
    statistics
        By split and class, the whole and its classes first.
    outliers
        The furthest off first.
    unreadable
        File -> reason.
    unused_labels
        Labels and class folders whose images are not among the files, each with their number.
    """

    location: Path
    files: int
    distribution: Mapping[str, Mapping[str, int]]
    sources: Mapping[str, int]
    formats: Mapping[str, int]
    sizes: Mapping[str, int]
    size_range: Mapping[str, int]
    statistics: Sequence[PixelStatistics]
    outliers: Sequence[Outlier]
    unreadable: Mapping[str, str]
    unused_labels: Sequence[str] = ()


def explore(
    location: Path,
    samples: Sequence[Sample],
    looks: Sequence[Look],
    unreadable: Sequence[Unreadable],
    labels: LabelCount | None = None,
) -> Exploration:
    """Sum up a data set that has been scanned."""
    distribution: dict[str, Counter[str]] = defaultdict(Counter)
    for sample in samples:
        distribution[sample.split or "unsplit"][sample.finding] += 1
    widths, heights = [look.columns for look in looks], [look.rows for look in looks]
    return Exploration(
        location=location,
        files=len(samples),
        distribution={split: dict(counts) for split, counts in distribution.items()},
        sources=dict(Counter(f"{s.source or 'unknown'}/{s.finding}" for s in samples)),
        formats=dict(Counter(look.format for look in looks)),
        sizes=dict(Counter(f"{look.columns}x{look.rows}" for look in looks).most_common(20)),
        size_range={
            "width_min_px": min(widths, default=0),
            "width_max_px": max(widths, default=0),
            "height_min_px": min(heights, default=0),
            "height_max_px": max(heights, default=0),
        },
        statistics=_by_group(looks),
        outliers=find_outliers(looks),
        unreadable={str(bad.sample.path): bad.reason for bad in unreadable},
        unused_labels=labels.lines() if labels else [],
    )


def per_image(looks: Sequence[Look]) -> list[dict[str, object]]:
    """List what was measured of each image, for a table."""
    return [
        {
            "file": str(look.sample.path),
            "split": look.sample.split or "",
            "label": look.sample.finding,
            "source": look.sample.source,
            "format": look.format,
            "width_px": look.columns,
            "height_px": look.rows,
            **{name: round(getattr(look, name), 6) for name in _MEASURES},
            "border": round(look.border, 4),
            "text_marks": look.text_marks,
        }
        for look in looks
    ]


def find_outliers(looks: Sequence[Look]) -> list[Outlier]:
    """List images with a modified z-score beyond 3.5 in any measure, the furthest off first."""
    if not looks:
        return []
    values = np.array([[getattr(look, name) for name in _MEASURES] for look in looks])
    away = values - np.median(values, axis=0)
    spread = np.median(np.abs(away), axis=0)
    # Where most images agree exactly (say, on black), any difference would be infinitely far.
    scores = np.where(spread > 1e-6, 0.6745 * away / np.maximum(spread, 1e-6), 0.0)
    found = []
    for look, row, seen in zip(looks, scores, values, strict=True):
        worst = int(np.argmax(np.abs(row)))
        if abs(row[worst]) > _MAX_ROBUST_Z:
            found.append(
                Outlier(
                    file=look.sample.path,
                    measure=_MEASURES[worst],
                    value=float(seen[worst]),
                    robust_z=float(row[worst]),
                )
            )
    return sorted(found, key=lambda outlier: -abs(outlier.robust_z))


def _by_group(looks: Sequence[Look]) -> list[PixelStatistics]:
    groups: dict[tuple[str, str], list[Look]] = defaultdict(list)
    for look in looks:
        split, finding = look.sample.split or "unsplit", look.sample.finding
        for key in {("all", "all"), ("all", finding), (split, "all"), (split, finding)}:
            groups[key].append(look)
    order = {"all": 0, "train": 1, "val": 2, "test": 3, "unsplit": 4}
    keys = sorted(groups, key=lambda key: (order[key[0]], key[1] != "all", key[1]))
    return [_statistics(*key, groups[key]) for key in keys]


def _statistics(split: str, finding: str, looks: Sequence[Look]) -> PixelStatistics:
    means = np.array([look.mean for look in looks])
    stds = np.array([look.std for look in looks])
    variance = float(np.mean(stds**2 + means**2) - means.mean() ** 2)
    return PixelStatistics(
        split=split,
        finding=finding,
        images=len(looks),
        mean=float(means.mean()),
        std=max(0.0, variance) ** 0.5,
        mean_of_means=float(means.mean()),
        std_of_means=float(means.std()),
        mean_of_stds=float(stds.mean()),
        std_of_stds=float(stds.std()),
    )
