"""Writes gate.png, a content gate's scores: python docs/images/gate.py --keep DIR --refuse DIR.

DIR holds chest X-rays (`--keep`), or pictures of something else (`--refuse`); both repeatable.
Needs the extra `train`. No X-ray is shown.
"""

import argparse
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from lungwatch import RESEARCH_USE_ONLY
from lungwatch.contract import GATE_SCORES, INPUT
from lungwatch.daemon.pipeline.model import Classifier, find_bundle
from lungwatch.errors import FileRejected
from lungwatch.imaging.reader import read_radiograph
from lungwatch.models import SHIPPED_DEFAULT
from lungwatch.preprocess import preprocess
from lungwatch.training.evaluation.gate_rates import image_files, turned_copies
from lungwatch.training.evaluation.scorers import onnx_session

_PLACE = Path(__file__).with_suffix(".png")
_TITLES = {
    "frontal": "frontal chest X-ray?",
    "upright": "upright?",
    "polarity": "air dark?",
    "lungs": "lungs in sight?",
    "familiar": "like the X-rays learnt from?",
}
_COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:red")
_EDGE = 4.0  # of the axis: scores beyond 0.0001 and 0.9999 stand at its ends


def main(model: str, keep: Sequence[Path], refuse: Sequence[Path]) -> None:
    """Ask the gate and draw what it says."""
    bundle = find_bundle(model)
    classifier = Classifier.load(bundle)
    gate = classifier.gate
    assert gate is not None, "the bundle has no content gate"
    session = onnx_session((bundle / "gate.onnx").read_bytes(), "the gate")

    def ask(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        parts = np.array_split(pixels, max(1, len(pixels) // 32))
        return np.concatenate([session.run([GATE_SCORES], {INPUT: part})[0] for part in parts])

    def read(path: Path) -> NDArray[np.float32] | None:
        try:
            return preprocess(read_radiograph(path).pixels, gate.contract.preprocess)
        except FileRejected:
            return None

    def of(folders: Sequence[Path]) -> NDArray[np.float32]:
        files = [file for folder in folders for file in image_files(folder)]
        with ThreadPoolExecutor(2) as pool:
            return np.stack([one for one in pool.map(read, files) if one is not None])

    chests, others = of(keep), of(refuse)
    copies = turned_copies(chests)
    turned = np.concatenate([one for name, one in copies.items() if name != "inverted"])
    groups = {
        "chest X-rays": ask(chests),
        "turned by 90°, 180°, 270°": ask(turned),
        "inverted": ask(copies["inverted"]),
        "something else": ask(others),
    }
    mpl.rcParams["svg.hashsalt"] = "lungwatch"
    figure = Figure(figsize=(10, 8), layout="constrained")
    axes = figure.subplots(len(_TITLES), 1, sharex=True)
    bins = np.linspace(-_EDGE, _EDGE, 65)
    for column, (check, axis) in enumerate(zip(gate.contract.checks, axes, strict=True)):
        for colour, (name, scores) in zip(_COLOURS, groups.items(), strict=True):
            chance = np.clip(scores[:, column].astype(np.float64), 1e-12, 1 - 1e-7)
            place = np.clip(np.log10(chance / (1 - chance)), -_EDGE + 1e-6, _EDGE - 1e-6)
            shares = np.full(len(place), 1 / len(place))
            label = f"{name} ({len(place):,})"
            axis.hist(
                place, bins, weights=shares, histtype="step", color=colour, lw=1.6, label=label
            )
        threshold = np.log10(check.threshold / (1 - check.threshold))
        axis.axvline(threshold, color="black", lw=1, ls="--")
        axis.set_title(f"{check.name}: {_TITLES[check.name]}", fontsize=9, loc="left")
        axis.set_yscale("log")
        axis.set_ylim(2e-4, 1.3)
        axis.set_ylabel("share", fontsize=8)
    marks = (0.0001, 0.001, 0.01, 0.1, 0.5, 0.9, 0.99, 0.999, 0.9999)
    axes[-1].set_xticks([np.log10(m / (1 - m)) for m in marks], [f"{m:g}" for m in marks])
    axes[-1].set_xlabel(
        f"score; dashed: threshold, what is left of it is refused. {RESEARCH_USE_ONLY}", fontsize=9
    )
    handles, labels = axes[0].get_legend_handles_labels()
    title = f"Content gate of {classifier.contract.id}"
    figure.legend(handles, labels, loc="outside upper center", ncols=4, fontsize=9, title=title)
    figure.savefig(_PLACE, dpi=90, metadata={"Software": None})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=SHIPPED_DEFAULT)
    parser.add_argument("--keep", action="append", type=Path, required=True)
    parser.add_argument("--refuse", action="append", type=Path, required=True)
    given = parser.parse_args()
    main(given.model, given.keep, given.refuse)
