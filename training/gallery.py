"""Cases to look at: true and false positives and negatives, with maps for both classes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from lungwatch.imaging import read_radiograph
from lungwatch.imaging.radiograph import FloatImage
from lungwatch.preprocess import PreprocessSpec, content_box
from lungwatch.training.assess import Scored
from lungwatch.training.pixels import FloatArray, read_pixels
from lungwatch.training.samples import Sample
from lungwatch.training.scorers import Scorer

# From the radiograph, float32 (H, W), and the maps of NEGATIVE and COVID over it, float32
# (2, h, w), to the X-ray, the X-ray under COVID's map and under NEGATIVE's, uint8.
Renderer = Callable[[FloatImage, FloatArray], Sequence[NDArray[np.uint8]]]

GROUPS = {
    "tp": "True positives",
    "fn": "False negatives",
    "fp": "False positives",
    "tn": "True negatives",
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Exhibit:
    """One case of the gallery.

    Attributes
    ----------
    group
        A key of `GROUPS`.
    sample
        The case.
    probability
        Calibrated, 0..1.
    pictures
        As the renderer made them.
    """

    group: str
    sample: Sample
    probability: float
    pictures: Sequence[NDArray[np.uint8]]


def choose_cases(scored: Scored, per_group: int, seed: int) -> list[tuple[str, int]]:
    """Choose cases of each group: the surest errors, and a random draw of what was right.

    Returns
    -------
    list of tuple
        A key of `GROUPS` and the index of the case.
    """
    rng = np.random.default_rng(seed)
    said, true, p = scored.called, scored.targets > 0.5, scored.probabilities
    members = {
        "tp": said & true,
        "fn": ~said & true,
        "fp": said & ~true,
        "tn": ~said & ~true,
    }
    chosen = []
    for group in GROUPS:
        indices = np.flatnonzero(members[group])
        if group in ("tp", "tn"):
            picked = np.sort(rng.permutation(indices)[:per_group])
        else:
            surest = -p[indices] if group == "fp" else p[indices]
            picked = indices[np.argsort(surest, kind="stable")][:per_group]
        chosen += [(group, int(index)) for index in picked]
    return chosen


def make_gallery(
    scorer: Scorer, scored: Scored, render: Renderer, *, per_group: int = 4, seed: int = 1
) -> list[Exhibit]:
    """Read the chosen cases again, explain them and draw them.

    Raises
    ------
    DatasetError
        If a file is unreadable.
    ModelError
        If the network has no feature map to explain.
    """
    cases = choose_cases(scored, per_group, seed)
    if not cases:
        return []
    samples = [scored.samples[index] for _, index in cases]
    spec = scored.judgement.preprocess
    maps = scorer.maps(read_pixels(samples, spec))
    exhibits = []
    for (group, index), sample, pair in zip(cases, samples, maps, strict=True):
        pixels = read_radiograph(sample.path).pixels
        rows, columns = pixels.shape
        exhibits.append(
            Exhibit(
                group=group,
                sample=sample,
                probability=float(scored.probabilities[index]),
                pictures=render(pixels, over_image(pair, (rows, columns), spec)),
            )
        )
    return exhibits


def over_image(maps: FloatArray, shape: tuple[int, int], spec: PreprocessSpec) -> FloatArray:
    """Cut out of maps, (2, h, w), what lies over the image and not over padding.

    Parameters
    ----------
    maps
        float32, over the network's whole square input.
    shape
        (rows, columns) of the radiograph.
    spec
        How it became the input.
    """
    if spec.fit == "stretch":
        return maps
    top, left, height, width = content_box(shape, spec)
    side = (spec.size_px, spec.size_px)
    wide = [cv2.resize(one, side, interpolation=cv2.INTER_LINEAR) for one in maps]
    return np.stack(wide)[:, top : top + height, left : left + width].astype(np.float32)
