"""Whether a model's map for COVID lies on the lungs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lungwatch.errors import ConfigError
from lungwatch.lungfield import enlarged, share_inside
from lungwatch.training.bootstrap import Bootstrap, interval
from lungwatch.training.lung_masks import LungMasks, read_lung_masks
from lungwatch.training.pixels import FloatArray
from lungwatch.training.scorers import Scorer

_BATCH = 64


@dataclass(frozen=True, kw_only=True, eq=False)
class LungShare:
    """How much of each map lies inside the lungs.

    Attributes
    ----------
    share
        Of the map's sum, 0..1, float64, shape (N,); NaN where nothing speaks for COVID.
    hit
        1 where the map's strongest point lies inside, 0 where not, NaN as above.
    area
        Share of the image that is lung, 0..1: what a map without any aim would reach.
    """

    share: NDArray[np.float64]
    hit: NDArray[np.float64]
    area: NDArray[np.float64]


def lung_share(maps: FloatArray, masks: FloatArray) -> LungShare:
    """Measure maps against drawn lungs.

    Parameters
    ----------
    maps
        For COVID, float32, shape (N, h, w), at least 0, over the network's whole input.
    masks
        float32, shape (N, S, S), 0..1: the share of each pixel that is lung.

    Source: the pointing game of Zhang et al. 2018, doi:10.1007/s11263-017-1059-x, without its
    tolerance of 15 pixels.
    """
    share, hit = np.full((2, len(maps)), np.nan)
    for index, (small, mask) in enumerate(zip(maps, masks, strict=True)):
        inside = share_inside(small, mask)
        if inside is not None:
            share[index] = inside
            strongest = int(np.argmax(enlarged(small, (mask.shape[0], mask.shape[1]))))
            hit[index] = float(mask.flat[strongest] >= 0.5)
    return LungShare(share=share, hit=hit, area=masks.mean(axis=(1, 2), dtype=np.float64))


def measure_lungs(scorer: Scorer, folder: Path, bootstrap: Bootstrap) -> dict[str, Any]:
    """Explain all images that have drawn lungs, and sum up where the maps lie.

    Returns
    -------
    dict
        `images`, `without_map` (nothing speaks for COVID; left out), the means `map_in_lungs`,
        `strongest_point_in_lungs` and `lung_area` (None without any map), and their 95 %
        `intervals` over resampled images.

    Raises
    ------
    ConfigError
        If the model keeps the aspect ratio: masks are stretched.
    DatasetError
        If there are no pairs, or one cannot be read.
    ModelError
        If the network has no feature map to explain.
    """
    spec = scorer.judgement.preprocess
    if spec.fit != "stretch":
        raise ConfigError(
            f"{scorer.judgement.name} pads its input; lung masks are for models that stretch it"
        )
    pairs = read_lung_masks(folder, spec)
    found = lung_share(_covid_maps(scorer, pairs), pairs.masks)
    seen = ~np.isnan(found.share)
    values = {
        "map_in_lungs": found.share[seen],
        "strongest_point_in_lungs": found.hit[seen],
        "lung_area": found.area[seen],
    }
    draws = np.random.default_rng(bootstrap.seed).integers(
        0, max(1, int(seen.sum())), (bootstrap.resamples, int(seen.sum()))
    )
    intervals = bootstrap.resamples > 0 and bool(seen.any())
    return {
        "data": folder.resolve().name,
        "images": len(seen),
        "without_map": int((~seen).sum()),
        **{name: round(float(v.mean()), 6) if len(v) else None for name, v in values.items()},
        "intervals": (
            {name: interval(v[draws].mean(axis=1)) for name, v in values.items()}
            if intervals
            else {}
        ),
    }


def _covid_maps(scorer: Scorer, pairs: LungMasks) -> FloatArray:
    parts = [
        scorer.maps(pairs.pixels[start : start + _BATCH])[:, 1]
        for start in range(0, len(pairs.pixels), _BATCH)
    ]
    return np.concatenate(parts)
