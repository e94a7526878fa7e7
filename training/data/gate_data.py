"""Data of the content gate, and the rates of a trained gate on it before export."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from lungwatch.errors import DatasetError
from lungwatch.preprocess import PreprocessSpec, preprocess
from lungwatch.training.data.dataset import (
    LabelMap,
    Sample,
    dataset_name,
    describe,
    licences,
    load_dataset,
    of_split,
)
from lungwatch.training.data.duplicates import find_leaks
from lungwatch.training.data.gate_images import ByteArray, GateXray, exposed, no_chest
from lungwatch.training.data.pixels import (
    FloatArray,
    KerasModel,
    decode_all,
    read_image,
    read_pairs,
)
from lungwatch.training.data.splits import DataRecord
from lungwatch.training.evaluation.gate_rates import (
    Familiarity,
    GateOutput,
    choose_thresholds,
    exposures,
    first_failures,
    turned_copies,
)
from lungwatch.training.networks.lungs import gate_output_network, gate_outputs

# Longest side of what is warped: a network of 160 px sees no more.
_LONGEST_PX = 256
_NO_CHESTS = 400


@dataclass(frozen=True, kw_only=True, eq=False)
class GatePart:
    """X-rays in two forms: small copies to draw from, and preprocessed for the network.

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
        """Return the part with the images at these positions."""
        chosen = list(indices)
        return GatePart(
            samples=[self.samples[i] for i in chosen],
            xrays=[self.xrays[i] for i in chosen],
            pixels=self.pixels[chosen],
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class GateData:
    """X-rays that train and measure a content gate.

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
    files
        All files of the data set and the masks.
    """

    train: GatePart
    val: GatePart
    left_out: GatePart
    masks: Sequence[GateXray]
    held_out: GatePart
    about: dict[str, Any]
    files: DataRecord


def read_gate_data(
    location: Path,
    masks: Path,
    spec: PreprocessSpec,
    *,
    leave_out: Sequence[str] = (),
    labels: LabelMap | None = None,
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
        See `pixels.read_lung_masks`.
    spec
        The network's preprocessing.
    leave_out
        Sources of which nothing is learnt.
    labels
        What labels mean that are no finding; see `load_dataset`.
    held_out
        Fraction of the masks that measures.
    seed
        Of the choice of those.

    Raises
    ------
    DatasetError
        If a split is empty, there is no such source, or a file is unreadable; it is named.
    """
    samples, name = load_dataset(location, labels), dataset_name(location)
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
    folder = location if location.is_dir() else location.parent
    files = DataRecord.of(samples, [sample.finding for sample in samples], folder)
    clean = [_without_leaks(part, unseen, unseen_pixels) for part in (train, pairs)]
    order = np.random.default_rng(seed).permutation(len(clean[1].samples))
    count = max(1, round(held_out * len(order)))
    return GateData(
        files=files.by_split().under("data") | DataRecord.of_files(masks).under("masks"),
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
        whole = read_image(samples[index].path).pixels
        pixels[index] = preprocess(whole, spec)
        return GateXray(pixels=_small(whole))

    xrays = list(decode_all(read, range(len(samples)), progress=progress))
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


def measure_gate(
    model: KerasModel, data: GateData, spec: PreprocessSpec, *, seed: int
) -> dict[str, Any]:
    """Measure a network as a gate, with thresholds of its own.

    Parameters
    ----------
    model
        Of `lungs.build_gate_network`.
    data
        What it was trained on, and what measures it.
    spec
        Its preprocessing.

    Returns
    -------
    dict
        `parameters`; `thresholds`, chosen on the validation split; `rates`, for each set of
        pictures their number, how many are kept, and how many each check refuses first; `dice`
        of the lungs on the masks held out.
    """
    answering = gate_output_network(model)

    def outputs_of(pixels: FloatArray) -> GateOutput:
        return gate_outputs(answering, pixels)

    train, val = outputs_of(data.train.pixels), outputs_of(data.val.pixels)
    familiarity = Familiarity.of(train.embedding)
    exposed_val = [outputs_of(pixels) for pixels in exposures(data.val.pixels)]
    thresholds = choose_thresholds(train, val, exposed_val, familiarity)
    checks = thresholds.checks()

    def rate(found: GateOutput) -> dict[str, Any]:
        refused = first_failures(thresholds.scores(found, familiarity), checks)
        pictures = len(found.chances)
        return {
            "pictures": pictures,
            "kept": pictures - refused.total(),
            "refused": dict(refused.most_common()),
        }

    rates = {"validation": rate(val)}
    for name, pixels in turned_copies(data.val.pixels).items():
        rates[f"validation, {name}"] = rate(outputs_of(pixels))
    rates["drawn and cut"] = rate(outputs_of(_no_chests(data.val.xrays, spec, seed)))
    if len(data.left_out.samples):
        rates["left out"] = rate(outputs_of(data.left_out.pixels))
        for name, pixels in turned_copies(data.left_out.pixels).items():
            rates[f"left out, {name}"] = rate(outputs_of(pixels))
    return {
        "parameters": int(model.count_params()),
        "thresholds": thresholds.to_dict(),
        "rates": rates,
        "dice": round(lung_dice(outputs_of, data.held_out.pixels, data.held_out.xrays), 4),
    }


def lung_dice(
    outputs_of: Callable[[FloatArray], GateOutput], pixels: FloatArray, xrays: Sequence[GateXray]
) -> float:
    """Return the mean Dice coefficient of the lungs found and the lungs drawn, 0..1.

    Parameters
    ----------
    outputs_of
        Runs a gate on preprocessed pictures.
    pixels, xrays
        The X-rays, preprocessed, and with their drawings.
    """
    found = outputs_of(pixels).lungs
    scores = []
    for field, xray in zip(found, xrays, strict=True):
        assert xray.lungs is not None
        side = (xray.lungs.shape[1], xray.lungs.shape[0])
        mask = cv2.resize(field, side, interpolation=cv2.INTER_LINEAR) >= 0.5
        drawn = xray.lungs >= 128
        both = int(mask.sum()) + int(drawn.sum())
        scores.append(2.0 * int((mask & drawn).sum()) / max(both, 1))
    return float(np.mean(scores))


def _no_chests(xrays: Sequence[GateXray], spec: PreprocessSpec, seed: int) -> FloatArray:
    rng = np.random.default_rng([seed, 0])
    return np.stack(
        [preprocess(exposed(no_chest(xrays, rng), rng), spec) for _ in range(_NO_CHESTS)]
    )
