"""Plot of the samples of a long run, and a verdict by the slope after the warm-up."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

# The first part of a run loads libraries, fills caches and pools.
_WARM_UP = 0.3
_LEAK_MB_PER_1000 = 5.0
_LEAK_PER_1000 = 0.5


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One look at the daemon; RSS of the children together."""

    at_s: float
    files: int
    descriptors: int
    threads: int
    rss_mb: float
    children: int
    children_rss_mb: float


def growth(samples: list[Sample], name: str) -> tuple[float, bool] | None:
    """Return a figure's growth for 1,000 files after the warm-up, and whether it is sure.

    It is sure where the rise over all that was judged is beyond three standard deviations of
    what the figure does anyway, around its trend. None if too little was judged.
    """
    late = [s for s in samples if s.files >= _WARM_UP * samples[-1].files]
    files = np.array([sample.files for sample in late], float)
    if len(late) < 10 or files.max() == files.min():
        return None
    values = np.array([getattr(sample, name) for sample in late], float)
    slope, start = np.polyfit(files, values, 1)
    noise = float(np.std(values - (slope * files + start)))
    rise = float(slope * (files.max() - files.min()))
    return float(slope * 1000), rise > 3 * noise


def verdict(samples: list[Sample]) -> str:
    """Say what grew, for 1,000 files."""
    if not samples:
        return "no samples"
    names = ("descriptors", "threads", "rss_mb", "children_rss_mb")
    found = {name: growth(samples, name) for name in names}
    known = {name: value for name, value in found.items() if value is not None}
    if len(known) < len(names):
        return "too short to judge"
    limits = {name: _LEAK_MB_PER_1000 if name.endswith("mb") else _LEAK_PER_1000 for name in names}
    grows = [name for name, (slope, is_sure) in known.items() if is_sure and slope > limits[name]]
    shown = ", ".join(f"{name} {slope:+.2f}" for name, (slope, _) in known.items())
    return f"{'GROWS: ' + ', '.join(grows) if grows else 'flat'} ({shown} per 1,000 files)"


def plot(samples: list[Sample], target: Path) -> None:
    """Draw the figures over the files; without matplotlib (extra `train`) nothing is drawn."""
    try:
        from matplotlib import pyplot as plt  # noqa: PLC0415 - an extra
    except ImportError:
        return
    figure, (upper, lower) = plt.subplots(2, 1, sharex=True, figsize=(8, 5))
    files = [sample.files for sample in samples]
    upper.plot(files, [s.rss_mb for s in samples], label="daemon")
    upper.plot(files, [s.children_rss_mb for s in samples], label="decoders together")
    upper.set_ylabel("RSS (MiB)")
    lower.plot(files, [s.descriptors for s in samples], label="descriptors")
    lower.plot(files, [s.threads for s in samples], label="threads")
    lower.set_xlabel("files ended")
    for axes in (upper, lower):
        axes.axvspan(0, _WARM_UP * files[-1], color="0.92", label="warm-up, not judged")
        axes.set_ylim(bottom=0)
        axes.legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(target, dpi=100)
    plt.close(figure)
