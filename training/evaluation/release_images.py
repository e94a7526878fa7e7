"""Test images of the release gate and a model's answers to them.

Radiographs as they are, without lungs, lungs alone, and altered.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from lungwatch.errors import ModelError
from lungwatch.preprocess import PreprocessSpec, lung_mask, preprocess
from lungwatch.training.data.dataset import Sample, Split, dataset_name, manifest_rows
from lungwatch.training.data.pixels import FloatArray, decode_all, read_image
from lungwatch.training.data.scan import ScannedImage, require_readable, scan
from lungwatch.training.evaluation.calibration import apply_calibration
from lungwatch.training.evaluation.evaluation import choose_samples
from lungwatch.training.evaluation.gate_rates import Gate
from lungwatch.training.evaluation.scorers import Judgement, Scorer, embed

FEWEST_LUNG = 0.08
"""Share of an image below which its lungs count as not found."""
_MARGIN = 0.02
_SPECK = 0.01
_JPEG_QUALITY = 50
_NOISE = 0.02
_SMALLER = 0.75
_TURN_DEG = 10.0
_AT_ONCE = 32
_MOST_CHANGED = 200
_VIEWS = ("AP", "PA")
_PLAIN, _BLACK, _ALONE = "as it is", "lungs black", "lungs alone"


def lung_hull(mask: NDArray[np.bool_], shape: tuple[int, int]) -> NDArray[np.bool_]:
    """Return the convex hull of each lung that was found, a little enlarged.

    A lung field that was found is ragged where the lung is opaque, so that its outline alone
    would tell the finding; its hull tells far less.

    Parameters
    ----------
    mask
        bool, shape (h, w), over the radiograph: lung.
    shape
        (rows, columns) of the result, in pixels.

    Returns
    -------
    numpy.ndarray
        bool, of that shape.
    """
    rows, columns = shape
    size = (columns, rows)
    whole = cv2.resize(mask.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST)
    outlines, _ = cv2.findContours(whole, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    hull = np.zeros((rows, columns), np.uint8)
    for outline in outlines:
        if cv2.contourArea(outline) >= _SPECK * rows * columns:
            cv2.fillConvexPoly(hull, cv2.convexHull(outline), 1)
    width = 2 * round(_MARGIN * max(rows, columns)) + 1
    return np.asarray(cv2.dilate(hull, np.ones((width, width), np.uint8)) > 0)


def without_lungs(pixels: FloatArray, lungs: NDArray[np.bool_]) -> FloatArray:
    """Return the radiograph, float32 (H, W), with its lungs black."""
    return np.asarray(pixels * ~lungs, np.float32)


def lungs_alone(pixels: FloatArray, lungs: NDArray[np.bool_]) -> FloatArray:
    """Return the radiograph, float32 (H, W), with everything but its lungs black."""
    return np.asarray(pixels * lungs, np.float32)


def _contrast(factor: float) -> Callable[[FloatArray], FloatArray]:
    def changed(pixels: FloatArray) -> FloatArray:
        middle = pixels.mean(dtype=np.float64)
        return np.asarray(np.clip((pixels - middle) * factor + middle, 0.0, 1.0), np.float32)

    return changed


def _gamma(exponent: float) -> Callable[[FloatArray], FloatArray]:
    return lambda pixels: np.asarray(np.clip(pixels, 0.0, 1.0) ** exponent, np.float32)


def _jpeg(pixels: FloatArray) -> FloatArray:
    grey = np.round(np.clip(pixels, 0.0, 1.0) * 255.0).astype(np.uint8)
    _, data = cv2.imencode(".jpg", grey, [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY])
    return np.asarray(cv2.imdecode(data, cv2.IMREAD_GRAYSCALE), np.float32) / np.float32(255.0)


def _noise(pixels: FloatArray) -> FloatArray:
    # The image seeds its own noise, so that the same file gives the same answer.
    rng = np.random.default_rng([round(float(pixels.mean(dtype=np.float64)) * 1e6), pixels.size])
    grain = rng.normal(0.0, _NOISE, pixels.shape).astype(np.float32)
    return np.asarray(np.clip(pixels + grain, 0.0, 1.0), np.float32)


def _smaller(pixels: FloatArray) -> FloatArray:
    rows, columns = (max(1, round(side * _SMALLER)) for side in pixels.shape)
    small = cv2.resize(pixels, (columns, rows), interpolation=cv2.INTER_AREA)
    return np.asarray(small, np.float32)


def _turned(degrees: float) -> Callable[[FloatArray], FloatArray]:
    def changed(pixels: FloatArray) -> FloatArray:
        rows, columns = pixels.shape
        matrix = cv2.getRotationMatrix2D(((columns - 1) / 2, (rows - 1) / 2), degrees, 1.0)
        turned = cv2.warpAffine(pixels, matrix, (columns, rows), flags=cv2.INTER_LINEAR)
        return np.asarray(turned, np.float32)

    return changed


CHANGES: dict[str, Callable[[FloatArray], FloatArray]] = {
    "contrast + 25 %": _contrast(1.25),
    "contrast - 25 %": _contrast(0.75),
    "gamma 0.8": _gamma(0.8),
    "gamma 1.25": _gamma(1.25),
    f"JPEG, quality {_JPEG_QUALITY}": _jpeg,
    f"noise, {_NOISE:.0%} of the range": _noise,
    f"resized to {_SMALLER:.0%}": _smaller,
    f"turned by + {_TURN_DEG:g}°": _turned(_TURN_DEG),
    f"turned by - {_TURN_DEG:g}°": _turned(-_TURN_DEG),
}

"""Name -> how a radiograph, float32 (H, W), 0..1, is changed."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Answers:
    """A model's answers for one data set and its altered copies.

    Attributes
    ----------
    name
        Of the data set.
    samples, scans
        The images.
    judgement
        How the logits are read.
    views
        "AP", "PA" or "" for each image.
    adults
        Whether each image is known to be of an adult; None where nothing is known of any.
    logits
        Binary, float32, shape (N,).
    embeddings
        float32, shape (N, E); None for a model that gives none.
    black, alone
        Logits with the lungs black and with all but the lungs black, float32, shape (N,); NaN
        where no lungs were found. None where nothing finds lungs.
    changed
        By change: the images it was made to, and their logits.
    """

    name: str
    samples: Sequence[Sample]
    scans: Sequence[ScannedImage]
    judgement: Judgement
    views: Sequence[str]
    adults: Sequence[bool] | None
    logits: FloatArray
    embeddings: FloatArray | None = None
    black: FloatArray | None = None
    alone: FloatArray | None = None
    changed: dict[str, tuple[NDArray[np.intp], FloatArray]] = field(default_factory=dict)

    @property
    def positive(self) -> NDArray[np.bool_]:
        """True for each image labelled COVID, bool (N,)."""
        return np.array([sample.positive for sample in self.samples], dtype=np.bool_)

    @property
    def findings(self) -> NDArray[np.str_]:
        """The finding of each image, (N,)."""
        return np.array([sample.finding for sample in self.samples], dtype=np.str_)

    @property
    def sources(self) -> NDArray[np.str_]:
        """The source of each image, (N,); "" if unknown."""
        return np.array([sample.source for sample in self.samples], dtype=np.str_)

    @property
    def groups(self) -> NDArray[np.int_]:
        """A number for each patient, or for each image whose patient is unknown, (N,)."""
        keys = [
            f"{sample.source}/{sample.patient}" if sample.patient else f"//{index}"
            for index, sample in enumerate(self.samples)
        ]
        return np.unique(keys, return_inverse=True)[1].astype(np.int_)

    def probabilities(self, logits: FloatArray) -> NDArray[np.float64]:
        """Return calibrated probabilities, 0..1, of binary logits."""
        return apply_calibration(self.judgement.calibration, logits)


def count_images(location: Path, split: Split | None) -> int:
    """Return how many images `ask` will read."""
    return len(choose_samples(location, split))


def ask(
    scorer: Scorer,
    location: Path,
    split: Split | None,
    *,
    gate: Gate | None = None,
    seed: int = 1,
    progress: Callable[[int], None] | None = None,
) -> Answers:
    """Run a model on every image of a data set, and on altered copies.

    Parameters
    ----------
    scorer
        The model.
    location, split
        The data set, and its part; None for all of it.
    gate
        Finds the lungs; None if nothing does.
    seed
        Draws the 200 images that are changed.
    progress
        Called with 1 after each image.

    Raises
    ------
    DatasetError
        If the data set cannot be used, or a file cannot be read.
    ModelError
        If the model answers with what is no number.
    """
    samples = choose_samples(location, split)
    scans, unreadable = scan(samples)
    require_readable(unreadable)
    rows = manifest_rows(location)
    told = [rows.get(sample.path, {}) for sample in samples]
    rng = np.random.default_rng(seed)
    changed = set(
        rng.choice(len(samples), min(_MOST_CHANGED, len(samples)), replace=False).tolist()
    )
    spec = scorer.judgement.preprocess

    def copies(index: int) -> dict[str, FloatArray]:
        return _copies(samples[index].path, spec, gate, change=index in changed)

    logits: dict[str, dict[int, float]] = {}
    embeddings: list[FloatArray] = []
    for start in range(0, len(samples), _AT_ONCE):
        indices = range(start, min(start + _AT_ONCE, len(samples)))
        made = list(decode_all(copies, indices, progress=progress))
        _answer(scorer, dict(zip(indices, made, strict=True)), logits)
        embeddings += _embeddings(scorer, np.stack([one[_PLAIN] for one in made]))
    found = {name: _filled(values, len(samples)) for name, values in logits.items()}
    return Answers(
        name=dataset_name(location),
        samples=samples,
        scans=scans,
        judgement=scorer.judgement,
        views=[_view(row.get("view")) for row in told],
        adults=_adults([row.get("pediatric") for row in told]),
        logits=found[_PLAIN],
        embeddings=np.concatenate(embeddings) if embeddings else None,
        black=found.get(_BLACK),
        alone=found.get(_ALONE),
        changed={
            name: (np.flatnonzero(~np.isnan(values)), values[~np.isnan(values)])
            for name, values in found.items()
            if name in CHANGES
        },
    )


def _copies(
    path: Path, spec: PreprocessSpec, gate: Gate | None, *, change: bool
) -> dict[str, FloatArray]:
    pixels = read_image(path).pixels
    made = {_PLAIN: preprocess(pixels, spec)}
    if gate is not None:
        shape = (pixels.shape[0], pixels.shape[1])
        looks_at = gate.contract.preprocess
        (answer,) = gate.run(preprocess(pixels, looks_at)[np.newaxis])
        found = lung_mask(answer.lungs, shape, looks_at)
        if found.mean() >= FEWEST_LUNG:
            lungs = lung_hull(found, shape)
            made[_BLACK] = preprocess(without_lungs(pixels, lungs), spec)
            made[_ALONE] = preprocess(lungs_alone(pixels, lungs), spec)
    if change:
        made |= {name: preprocess(altered(pixels), spec) for name, altered in CHANGES.items()}
    return made


def _answer(
    scorer: Scorer,
    made: dict[int, dict[str, FloatArray]],
    logits: dict[str, dict[int, float]],
) -> None:
    places = [(name, index) for index, copies in made.items() for name in copies]
    answers = scorer.logits(np.stack([made[index][name] for name, index in places]))
    if not np.isfinite(answers).all():
        raise ModelError(f"{scorer.judgement.name} answers with what is no finite number")
    for (name, index), answer in zip(places, answers, strict=True):
        logits.setdefault(name, {})[index] = float(answer)


def _embeddings(scorer: Scorer, pixels: FloatArray) -> list[FloatArray]:
    try:
        return [embed(scorer, pixels)]
    except ModelError:
        # The checks on the embedding say that there is none; the others stand without it.
        return []


def _filled(values: dict[int, float], count: int) -> FloatArray:
    found = np.full(count, np.nan, np.float32)
    found[list(values)] = list(values.values())
    return found


def _view(word: str | None) -> str:
    """Return "AP" or "PA" for a manifest's word, "AP Supine" among them; "" for another."""
    first = (word or "").upper().split()[:1]
    return first[0] if first and first[0] in _VIEWS else ""


def _adults(said: Sequence[str | None]) -> list[bool] | None:
    return [word == "0" for word in said] if any(said) else None
