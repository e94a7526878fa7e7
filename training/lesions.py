"""Whether a model's map for COVID lies on the disease that somebody drew.

A number alone says little: opacities cover a third of the lungs, so a map that points anywhere
in the lungs hits one in a third of the images. Each figure therefore stands beside what a random
point of the lungs and the map of another patient would have.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lungwatch.lungfield import enlarged, share_inside
from lungwatch.preprocess import PreprocessSpec, content_of
from lungwatch.training.bootstrap import Bootstrap, interval
from lungwatch.training.lesion_masks import LesionImage, read_lesions
from lungwatch.training.map_likeness import correlations, mean_likeness
from lungwatch.training.pixels import FloatArray
from lungwatch.training.scorers import Scorer

_BATCH = 64
# Each image is compared with so many other patients' maps, for a mean that chance moves little.
_PARTNERS = 5
_Vector = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, eq=False)
class LesionShare:
    """Where each map lies; NaN where nothing speaks for COVID, or no lungs are drawn.

    Attributes
    ----------
    peak, share
        1 where the strongest point lies on an opacity, else 0; share of the map's sum that lies
        on opacities, 0..1; float64, shape (N,).
    other_peak, other_share
        The same for other patients' maps laid on this image, their mean.
    random_point
        Share of the lungs' area that is opacity: how often a random point of the lungs hits.
    random_pixel
        Share of the whole image that is opacity.
    likeness
        Correlation of every map with every other, float64, shape (M, M); of those that are not
        empty.
    """

    peak: _Vector
    share: _Vector
    other_peak: _Vector
    other_share: _Vector
    random_point: _Vector
    random_pixel: _Vector
    likeness: NDArray[np.float64]


def lesion_share(
    maps: FloatArray, images: Sequence[LesionImage], spec: PreprocessSpec, *, seed: int = 1
) -> LesionShare:
    """Measure maps against drawn opacities.

    Parameters
    ----------
    maps
        For COVID, float32, shape (N, h, w), at least 0, over the network's whole input. They are
        laid over the radiograph as the overlay does, without the padding.
    images
        The X-rays, in the same order.
    spec
        The network's preprocessing.
    seed
        Draws whose map is laid on whose image.

    Source: the pointing game of Zhang et al. 2018, doi:10.1007/s11263-017-1059-x, without its
    tolerance.
    """
    count = len(images)
    laid = [content_of(one, image.shape, spec) for one, image in zip(maps, images, strict=True)]
    peak, share, other_peak, other_share, point, pixel = np.full((6, count), np.nan)
    there = [index for index in range(count) if maps[index].any()]
    partners = _partners(there, seed)
    for index, image in enumerate(images):
        pixel[index] = image.opacity.mean()
        if image.lung is not None and image.lung.any():
            point[index] = (image.opacity & image.lung).sum() / image.lung.sum()
        if index in partners:
            peak[index], share[index] = _on(laid[index], image.opacity)
            others = [_on(laid[other], image.opacity) for other in partners[index]]
            if others:
                other_peak[index], other_share[index] = np.mean(others, axis=0)
    table = correlations(maps[there]) if there else np.zeros((0, 0))
    varied = ~np.isnan(np.diag(table))
    return LesionShare(
        peak=peak,
        share=share,
        other_peak=other_peak,
        other_share=other_share,
        random_point=point,
        random_pixel=pixel,
        likeness=table[np.ix_(varied, varied)],
    )


def measure_lesions(
    scorer: Scorer,
    folder: Path,
    bootstrap: Bootstrap,
    *,
    progress: Callable[[int], None] | None = None,
) -> tuple[dict[str, Any], FloatArray, list[LesionImage]]:
    """Explain all images that have drawn opacities, and sum up where the maps lie.

    Returns
    -------
    found
        See `summarise_lesions`, and `data`, the folder's name, and `without_opacity`, images that
        were left out.
    maps
        For COVID, float32, shape (N, h, w).
    images
        The X-rays, in the same order.

    Raises
    ------
    DatasetError
        If there are no such images, or one cannot be read.
    ModelError
        If the network has no feature map to explain.
    """
    spec = scorer.judgement.preprocess
    images, without = read_lesions(folder, spec, progress=progress)
    maps = covid_maps(scorer, images)
    found = summarise_lesions(lesion_share(maps, images, spec, seed=bootstrap.seed), bootstrap)
    return {"data": folder.resolve().name, "without_opacity": without, **found}, maps, images


def summarise_lesions(found: LesionShare, bootstrap: Bootstrap) -> dict[str, Any]:
    """Sum up where maps lie.

    Returns
    -------
    dict
        `images`, `without_map` (nothing speaks for COVID; left out), the means `peak_on_lesion`,
        `map_on_lesion`, `random_point_of_lungs`, `random_point_of_image`, `other_map_peak`,
        `other_map_share`, the differences `peak_above_random_point`, `peak_above_other_map` and
        `share_above_other_map`, `likeness_of_maps` (mean correlation of different patients'
        maps), each None where it cannot be computed, and their 95 % `intervals` over resampled
        images.
    """
    seen = ~np.isnan(found.peak)
    values = {
        "peak_on_lesion": found.peak,
        "map_on_lesion": found.share,
        "random_point_of_lungs": found.random_point,
        "random_point_of_image": found.random_pixel,
        "other_map_peak": found.other_peak,
        "other_map_share": found.other_share,
        "peak_above_random_point": found.peak - found.random_point,
        "peak_above_other_map": found.peak - found.other_peak,
        "share_above_other_map": found.share - found.other_share,
    }
    result: dict[str, Any] = {
        "images": len(seen),
        "without_map": int((~seen).sum()),
        "intervals": {},
    }
    rng = np.random.default_rng(bootstrap.seed)
    for name, every in values.items():
        known = every[seen & ~np.isnan(every)]
        result[name] = round(float(known.mean()), 6) if len(known) else None
        if len(known) and bootstrap.resamples:
            draws = rng.integers(0, len(known), (bootstrap.resamples, len(known)))
            result["intervals"][name] = interval(known[draws].mean(axis=1))
    maps = len(found.likeness)
    result["likeness_of_maps"] = None
    if maps > 1:
        result["likeness_of_maps"] = round(float(mean_likeness(found.likeness)[0]), 6)
        if bootstrap.resamples:
            weights = rng.multinomial(maps, np.full(maps, 1 / maps), bootstrap.resamples)
            likeness = mean_likeness(found.likeness, weights.astype(np.float64))
            result["intervals"]["likeness_of_maps"] = interval(likeness)
    return result


def covid_maps(scorer: Scorer, images: Sequence[LesionImage]) -> FloatArray:
    """Return the map for COVID of each image, float32 (N, h, w)."""
    pixels = np.stack([image.pixels for image in images])
    parts = [
        scorer.maps(pixels[start : start + _BATCH])[:, 1] for start in range(0, len(pixels), _BATCH)
    ]
    return np.concatenate(parts)


def _on(small: FloatArray, opacity: NDArray[np.bool_]) -> tuple[float, float]:
    share = share_inside(small, opacity.astype(np.float32))
    wide = enlarged(small, (opacity.shape[0], opacity.shape[1]))
    return float(opacity.flat[int(np.argmax(wide))]), float("nan") if share is None else share


def _partners(there: Sequence[int], seed: int) -> dict[int, list[int]]:
    """Draw for each image others, never itself: neighbours in one random circle."""
    circle = np.random.default_rng(seed).permutation(np.asarray(there, dtype=np.intp))
    rounds = range(1, min(_PARTNERS, len(circle) - 1) + 1)
    return {
        int(one): [int(circle[(place + step) % len(circle)]) for step in rounds]
        for place, one in enumerate(circle)
    }
