"""Data of the content gate: a data set's X-rays and lung masks."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from lungwatch.errors import DatasetError, FileRejected
from lungwatch.imaging import read_radiograph
from lungwatch.preprocess import PreprocessSpec, preprocess
from lungwatch.training.dataset import dataset_name, describe, licences, load_dataset, of_split
from lungwatch.training.gate_images import ByteArray, GateXray
from lungwatch.training.leaks import find_leaks
from lungwatch.training.lung_masks import read_pairs
from lungwatch.training.pixels import FloatArray
from lungwatch.training.samples import Sample

# Longest side of what is warped: a network of 160 px sees no more.
_LONGEST_PX = 256


@dataclass(frozen=True, kw_only=True, eq=False)
class GatePart:
    """X-rays twice: to draw from, and as the network sees them.

    Attributes
    ----------
    samples, xrays
        In the same order.
    pixels
        float32, shape (N, S, S, 1), 0..1, preprocessed.
    """

    samples: Sequence[Sample]
    xrays: Sequence[GateXray]
    pixels: FloatArray

    def take(self, indices: Sequence[int]) -> "GatePart":
        """Return the part with these only."""
        chosen = list(indices)
        return GatePart(
            samples=[self.samples[i] for i in chosen],
            xrays=[self.xrays[i] for i in chosen],
            pixels=self.pixels[chosen],
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class GateData:
    """What is learnt from and measured on.

    Attributes
    ----------
    train, val
        The splits, without what leaks and without the sources left out.
    left_out
        All images of the sources left out; empty without one.
    masks
        X-rays with drawn lungs that are learnt from.
    held_out
        X-rays with drawn lungs that measure.
    about
        What the run's configuration says about the data.
    """

    train: GatePart
    val: GatePart
    left_out: GatePart
    masks: Sequence[GateXray]
    held_out: GatePart
    about: dict[str, Any]


def read_gate_data(
    location: Path,
    masks: Path,
    spec: PreprocessSpec,
    *,
    leave_out: Sequence[str] = (),
    held_out: float,
    seed: int,
    progress: Callable[[int], None] | None = None,
) -> GateData:
    """Read a data set and lung masks.

    Training images, and X-rays of the masks, that show an X-ray or a patient of the other splits
    or of a source left out are dropped.

    Parameters
    ----------
    location
        The data set, with the splits train and val; see `load_dataset`. Every X-ray in it is
        taken for an upright frontal one of a chest; findings do not matter.
    masks
        See `lungwatch.training.lung_masks.read_lung_masks`.
    spec
        The network's preprocessing.
    leave_out
        Sources of which nothing is learnt.
    held_out
        Fraction of the masks that measures.
    seed
        Of the choice of those.
    progress
        Called with 1 after each image of the data set.

    Raises
    ------
    DatasetError
        If a split is empty, there is no such source, or a file is unreadable; it is named.
    """
    samples, name = load_dataset(location), dataset_name(location)
    known = {sample.source for sample in samples}
    if missing := sorted(set(leave_out) - known):
        there = ", ".join(sorted(known - {""})) or "none are stated"
        raise DatasetError(f"{name} has no source {missing[0]!r} to leave out (sources: {there})")
    kept = [sample for sample in samples if sample.source not in leave_out]
    train = _read(of_split(kept, "train", name), spec, progress)
    val = _read(of_split(kept, "val", name), spec, progress)
    test = _read([sample for sample in kept if sample.split == "test"], spec, progress)
    left_out = _read([s for s in samples if s.source in leave_out], spec, progress)
    pairs = _read_masks(masks, spec)

    unseen = [*val.samples, *test.samples, *left_out.samples]
    unseen_pixels = np.concatenate([val.pixels, test.pixels, left_out.pixels])
    clean = [_without_leaks(part, unseen, unseen_pixels) for part in (train, pairs)]
    order = np.random.default_rng(seed).permutation(len(clean[1].samples))
    count = max(1, round(held_out * len(order)))
    return GateData(
        train=clean[0],
        val=val,
        left_out=left_out,
        masks=clean[1].take(sorted(order[count:])).xrays,
        held_out=clean[1].take(sorted(order[:count])),
        about={
            "name": name,
            "train": describe(clean[0].samples),
            "val": describe(val.samples),
            "licences": licences(clean[0].samples),
            "left_out": sorted(leave_out),
            "dropped": len(train.samples) - len(clean[0].samples),
            "masks": {
                "name": masks.resolve().name,
                "train": len(order) - count,
                "held_out": count,
                "dropped": len(pairs.samples) - len(order),
            },
        },
    )


def _read(
    samples: Sequence[Sample], spec: PreprocessSpec, progress: Callable[[int], None] | None
) -> GatePart:
    pixels = np.empty((len(samples), spec.size_px, spec.size_px, 1), np.float32)

    def read(index: int) -> GateXray:
        path = samples[index].path
        try:
            whole = read_radiograph(path).pixels
        except (FileRejected, OSError) as error:
            raise DatasetError(f"{path}: {error}") from error
        pixels[index] = preprocess(whole, spec)
        return GateXray(pixels=_small(whole))

    xrays = []
    with ThreadPoolExecutor(2, thread_name_prefix="decode") as pool:
        for xray in pool.map(read, range(len(samples))):
            xrays.append(xray)
            if progress:
                progress(1)
    return GatePart(samples=samples, xrays=xrays, pixels=pixels)


def _read_masks(folder: Path, spec: PreprocessSpec) -> GatePart:
    samples, xrays, pixels = [], [], []
    for pair in read_pairs(folder):
        small = _small(pair.pixels)
        side = (small.shape[1], small.shape[0])
        drawn = cv2.resize(pair.drawn, side, interpolation=cv2.INTER_AREA)
        samples.append(Sample(path=folder / "images" / pair.name, finding="NORMAL"))
        xrays.append(GateXray(pixels=small, lungs=_bytes(drawn)))
        pixels.append(preprocess(pair.pixels, spec))
    return GatePart(samples=samples, xrays=xrays, pixels=np.stack(pixels))


def _without_leaks(part: GatePart, others: Sequence[Sample], other_pixels: FloatArray) -> GatePart:
    leaks = find_leaks(part.samples, part.pixels, others, other_pixels)
    leaking = {leak.train for leak in leaks}
    if len(leaking) == len(part.samples):
        raise DatasetError("every training image shows an X-ray or a patient of another split")
    return part.take([index for index in range(len(part.samples)) if index not in leaking])


def _small(pixels: FloatArray) -> ByteArray:
    height, width = pixels.shape
    scale = min(1.0, _LONGEST_PX / max(height, width))
    side = (max(1, round(width * scale)), max(1, round(height * scale)))
    return _bytes(cv2.resize(pixels, side, interpolation=cv2.INTER_AREA))


def _bytes(values: FloatArray | np.ndarray) -> ByteArray:
    return np.asarray(np.round(np.clip(values, 0.0, 1.0) * 255.0), np.uint8)
