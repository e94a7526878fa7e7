"""Content gate: scores, thresholds, and its rates over folders of pictures.

A threshold is chosen on upright frontal chest X-rays of the validation split alone, each at three
exposures; no picture that has to be refused takes part. For `frontal`, `upright` and `polarity` it
is the 0.2 % quantile of the scores, but not below 0.5 and not above 0.8. The largest distance
from the training images is 1.25 times the 99.5 % quantile of the validation images' distances,
and at least 5: a hospital that no image came from lies further away than the validation images,
which came from the same places as the training images.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from lungwatch.contract import GateCheck, GateContract, Verdict
from lungwatch.errors import DatasetError, FileRejected, ModelError, Reason
from lungwatch.files import file_kind
from lungwatch.imaging.radiograph import FloatImage
from lungwatch.imaging.reader import read_radiograph
from lungwatch.preprocess import lung_area_of, lung_mask, preprocess
from lungwatch.training.data.pixels import FloatArray, decode_all

FRONTAL, UPRIGHT, POLARITY, LUNGS, FAMILIAR = "frontal", "upright", "polarity", "lungs", "familiar"
REASONS: dict[str, Reason] = {
    FRONTAL: Reason.NOT_FRONTAL_CHEST,
    UPRIGHT: Reason.ROTATED,
    POLARITY: Reason.INVERTED,
    LUNGS: Reason.NO_LUNGS,
    FAMILIAR: Reason.NOT_FRONTAL_CHEST,
}
"""The checks in their order. A turned chest is far from the training images too, so the distance,
which cannot say what is wrong, comes last."""
LEAST_LUNGS = 0.05
"""Share of the picture that has to be lung."""
EVEN = 0.5
"""Threshold of the two scores that are made of a limit: `lungs` and `familiar`."""
QUANTILE = 0.002
CHANCE_BOUNDS = (0.5, 0.8)
DISTANCE_QUANTILE, DISTANCE_FACTOR, LEAST_DISTANCE = 0.995, 1.25, 5.0
EXPOSURES = (1.0, 0.8, 1.25)
"""Exponents of the grey values under which validation images are looked at."""
MOST_LOST = 0.02
"""Share of the validation images, as they are, that a gate may refuse before it is no use."""
_COMPONENTS = 64
AS_IS = "as it is"
VARIANTS: dict[str, Callable[[FloatImage], FloatImage]] = {
    AS_IS: lambda pixels: pixels,
    "turned by 90°": lambda pixels: np.rot90(pixels, 1).copy(),
    "turned by 180°": lambda pixels: np.rot90(pixels, 2).copy(),
    "turned by 270°": lambda pixels: np.rot90(pixels, 3).copy(),
    "inverted": lambda pixels: 1.0 - pixels,
}
"""The copies that are looked at; turned counter-clockwise."""
_AT_ONCE = 32


@dataclass(frozen=True, kw_only=True, eq=False)
class GateOutput:
    """Outputs of the gate's network for some pictures.

    Attributes
    ----------
    chances
        float32, shape (N, 3), 0..1: of being frontal, upright, and not inverted.
    embedding
        float32, shape (N, C): pooled features of the trunk.
    lungs
        float32, shape (N, M, M), 0..1: each cell's probability of being lung.
    """

    chances: FloatArray
    embedding: FloatArray
    lungs: FloatArray

    @property
    def lung_areas(self) -> NDArray[np.float64]:
        """Share of each picture that is lung, 0..1, (N,)."""
        return np.asarray((self.lungs >= 0.5).mean(axis=(1, 2)), dtype=np.float64)


@dataclass(frozen=True, kw_only=True, eq=False)
class Familiarity:
    """A normal distribution of the training images' embeddings, in their principal components.

    Attributes
    ----------
    mean
        float32, shape (C,).
    axes
        float32, shape (C, K): principal components, each divided by its standard deviation and
        by the root of K.

    Source: Lee et al. 2018, arXiv:1807.03888 (Mahalanobis distance as a measure of the unknown).
    """

    mean: FloatArray
    axes: FloatArray

    @classmethod
    def of(cls, embedding: FloatArray) -> "Familiarity":
        """Fit it to the embeddings, (N, C), of the training images."""
        mean = embedding.mean(axis=0, dtype=np.float64)
        _, spread, rows = np.linalg.svd(embedding - mean, full_matrices=False)
        # Of N images no more than N - 1 components vary.
        count = max(1, min(_COMPONENTS, len(embedding) - 1, int((spread > 1e-6).sum())))
        deviation = spread[:count] / np.sqrt(len(embedding))
        axes = rows[:count].T / (np.maximum(deviation, 1e-9) * np.sqrt(count))
        return cls(mean=mean.astype(np.float32), axes=axes.astype(np.float32))

    def distances(self, embedding: FloatArray) -> FloatArray:
        """Return the mean squared deviation over the components, (N,): 1 for a typical image."""
        return np.asarray((((embedding - self.mean) @ self.axes) ** 2).sum(axis=1), np.float32)


@dataclass(frozen=True, kw_only=True)
class GateThresholds:
    """Limits of the checks.

    Attributes
    ----------
    frontal, upright, polarity
        Smallest chance that passes, 0..1.
    distance
        Largest distance from the training images that passes; see `Familiarity.distances`.
    lung_area
        (least, most) share of the picture that is lung in 99 % of the training images.
    """

    frontal: float
    upright: float
    polarity: float
    distance: float
    lung_area: tuple[float, float]

    def checks(self) -> tuple[GateCheck, ...]:
        """Return the checks in the order of the graph's columns."""
        chances = {FRONTAL: self.frontal, UPRIGHT: self.upright, POLARITY: self.polarity}
        return tuple(
            GateCheck(name=name, threshold=chances.get(name, EVEN), reason=reason)
            for name, reason in REASONS.items()
        )

    def scores(self, output: GateOutput, familiarity: Familiarity) -> FloatArray:
        """Return the scores, float32 (N, checks), 0..1, as the exported graph gives them."""
        ratio = familiarity.distances(output.embedding) / np.float32(self.distance)
        with np.errstate(over="ignore"):
            familiar = 1.0 / (1.0 + ratio**4)
        lungs = np.clip(output.lung_areas / (2 * LEAST_LUNGS), 0.0, 1.0)
        return np.column_stack([output.chances, lungs, familiar]).astype(np.float32)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


def choose_thresholds(
    train: GateOutput, val: GateOutput, exposed: Sequence[GateOutput], familiarity: Familiarity
) -> GateThresholds:
    """Choose the thresholds by the rule that the module states.

    Parameters
    ----------
    train, val
        Looks at the X-rays of both splits, as they are.
    exposed
        Looks at the validation images at the other `EXPOSURES`.
    familiarity
        Fitted to the training images.
    """
    outputs = [val, *exposed]
    chances = np.concatenate([output.chances for output in outputs])
    lowest = np.clip(np.quantile(chances, QUANTILE, axis=0), *CHANCE_BOUNDS)
    distances = np.concatenate([familiarity.distances(output.embedding) for output in outputs])
    furthest = DISTANCE_FACTOR * float(np.quantile(distances, DISTANCE_QUANTILE))
    least, most = (float(np.quantile(train.lung_areas, q)) for q in (0.005, 0.995))
    return GateThresholds(
        frontal=round(float(lowest[0]), 3),
        upright=round(float(lowest[1]), 3),
        polarity=round(float(lowest[2]), 3),
        distance=round(max(LEAST_DISTANCE, furthest), 2),
        lung_area=(round(least, 3), round(max(most, least + 0.01), 3)),
    )


def check_losses(scores: FloatArray, checks: Sequence[GateCheck]) -> None:
    """Refuse a gate that refuses chest X-rays.

    Parameters
    ----------
    scores
        Of the validation images, as they are, (N, checks).
    checks
        The checks.

    Raises
    ------
    ModelError
        If it refuses more than 2 % of them.
    """
    refused = first_failures(scores, checks)
    if refused.total() > MOST_LOST * len(scores):
        by_check = ", ".join(f"{name} {count}" for name, count in refused.most_common())
        raise ModelError(
            f"the gate refuses {refused.total()} of {len(scores)} validation images "
            f"({by_check}), more than {MOST_LOST:.0%}: train it longer"
        )


def first_failures(scores: FloatArray, checks: Sequence[GateCheck]) -> Counter[str]:
    """Count pictures by the first check that each fails; those that pass are not counted."""
    failed = scores < np.array([check.threshold for check in checks], np.float32)
    first = failed.argmax(axis=1)[failed.any(axis=1)]
    return Counter(checks[index].name for index in first)


def turned_copies(pixels: FloatArray) -> dict[str, FloatArray]:
    """Return copies of preprocessed images, (N, S, S, 1), that have to be refused.

    The same as preprocessing turned and inverted X-rays: stretching to a square and percentiles
    commute with both.
    """
    turns = {f"turned by {90 * k}°": np.rot90(pixels, k, axes=(1, 2)) for k in (1, 2, 3)}
    return {**turns, "inverted": np.float32(1.0) - pixels}


def exposures(pixels: FloatArray) -> list[FloatArray]:
    """Return preprocessed images at the other `EXPOSURES`."""
    return [pixels ** np.float32(power) for power in EXPOSURES if power != 1.0]


class PictureAnswer(Protocol):
    """Answer of a gate for one picture."""

    @property
    def verdict(self) -> Verdict:
        """Verdict: pass, or the reason of the refusal."""

    @property
    def lungs(self) -> NDArray[np.float32]:
        """float32, shape (side, side), 0..1: each cell's probability of being lung."""


class Gate(Protocol):
    """A content gate that can be asked."""

    @property
    def contract(self) -> GateContract:
        """Contract of its input and answer."""

    def run(self, batch: NDArray[np.float32]) -> Sequence[PictureAnswer]:
        """Look at pictures, float32 (n, side, side, 1), 0..1."""


@dataclass(frozen=True, kw_only=True)
class GateOutcome:
    """Outcome of one picture: kept or refused.

    Attributes
    ----------
    folder
        That of its file, from the folder that was named on.
    file
        Path below that folder.
    variant
        One of `VARIANTS`.
    reason
        Why it was refused, by the reader or by the gate; None if it was kept.
    check, score
        The check that decided, and its score, 0..1; None where the reader refused.
    lung_area
        Share of the picture that is lung, 0..1; None likewise.
    """

    folder: str
    file: str
    variant: str
    reason: str | None
    check: str | None = None
    score: float | None = None
    lung_area: float | None = None


@dataclass(frozen=True, kw_only=True)
class Rate:
    """Kept and refused pictures of one folder, or of all.

    Attributes
    ----------
    folder, variant
        See `GateOutcome`.
    pictures, kept
        Numbers of pictures.
    refused_by_reader, refused_by_gate
        Reason -> number of pictures, the most frequent first.
    """

    folder: str
    variant: str
    pictures: int
    kept: int
    refused_by_reader: dict[str, int] = field(default_factory=dict)
    refused_by_gate: dict[str, int] = field(default_factory=dict)

    @property
    def kept_share(self) -> float:
        """Share of the pictures that were kept, 0..1."""
        return self.kept / self.pictures

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON, with both shares."""
        shares = {
            "kept_share": round(self.kept_share, 6),
            "refused_share": round(1.0 - self.kept_share, 6),
        }
        return {**asdict(self), **shares}


def image_files(folder: Path) -> list[Path]:
    """Return the DICOM, PNG and JPEG files below a folder, by their content, in order.

    Raises
    ------
    DatasetError
        If there are none, or a file cannot be read.
    """
    try:
        found = [
            path
            for path in sorted(folder.rglob("*"))
            if path.is_file() and file_kind(path).is_image
        ]
    except OSError as error:
        raise DatasetError(f"{error.filename or folder}: {error.strerror}") from error
    if not found:
        raise DatasetError(f"{folder}: no DICOM, PNG or JPEG file in it")
    return found


def gate_outcomes(
    gate: Gate,
    folder: Path,
    files: Sequence[Path],
    *,
    variants: Sequence[str] = (AS_IS,),
    workers: int = 2,
    progress: Callable[[int], None] | None = None,
) -> list[GateOutcome]:
    """Read pictures as the daemon does and run the gate.

    Parameters
    ----------
    gate
        The gate.
    folder, files
        A folder and the files below it, as `image_files` returns them.
    variants
        Keys of `VARIANTS`, first `AS_IS`. What the reader refuses has no other copies.
    workers
        Decoding threads.
    """
    outcomes: list[GateOutcome] = []
    decoded = decode_all(_read, files, workers=workers, progress=progress)
    for path, pixels in zip(files, decoded, strict=True):
        outcomes.extend(_asked(gate, folder, path, pixels, variants))
    return outcomes


def rates(outcomes: Sequence[GateOutcome]) -> list[Rate]:
    """Count by folder and variant, in order, and for more than one folder of all together."""
    by_place: dict[tuple[str, str], list[GateOutcome]] = defaultdict(list)
    for one in outcomes:
        by_place[one.folder, one.variant].append(one)
    found = [_rate(*place, ones) for place, ones in by_place.items()]
    if len({one.folder for one in outcomes}) > 1:
        found.extend(
            _rate("all", variant, [one for one in outcomes if one.variant == variant])
            for variant in dict.fromkeys(one.variant for one in outcomes)
        )
    return found


def _rate(folder: str, variant: str, outcomes: Sequence[GateOutcome]) -> Rate:
    reasons: dict[bool, Counter[str]] = {True: Counter(), False: Counter()}
    for one in outcomes:
        if one.reason is not None:
            reasons[one.check is not None][one.reason] += 1
    return Rate(
        folder=folder,
        variant=variant,
        pictures=len(outcomes),
        kept=sum(one.reason is None for one in outcomes),
        refused_by_reader=dict(reasons[False].most_common()),
        refused_by_gate=dict(reasons[True].most_common()),
    )


def _read(path: Path) -> FloatImage | str:
    """Return a picture's pixels, or the reason for which the reader refuses it."""
    try:
        return read_radiograph(path).pixels
    except FileRejected as error:
        return error.reason.value
    except OSError as error:
        raise DatasetError(f"{path}: {error.strerror}") from error


def _asked(
    gate: Gate, folder: Path, path: Path, pixels: FloatImage | str, variants: Sequence[str]
) -> Iterator[GateOutcome]:
    place = Path(folder.resolve().name) / path.parent.relative_to(folder)
    name = str(path.relative_to(folder))
    if isinstance(pixels, str):
        yield GateOutcome(folder=str(place), file=name, variant=AS_IS, reason=pixels)
        return
    spec = gate.contract.preprocess
    copies = {variant: VARIANTS[variant](pixels) for variant in variants}
    answers = gate.run(np.stack([preprocess(copy, spec) for copy in copies.values()]))
    for (variant, copy), answer in zip(copies.items(), answers, strict=True):
        verdict = answer.verdict
        mask = lung_mask(answer.lungs, (copy.shape[0], copy.shape[1]), spec)
        yield GateOutcome(
            folder=str(place),
            file=name,
            variant=variant,
            reason=None if verdict.reason is None else verdict.reason.value,
            check=verdict.check,
            score=verdict.score,
            lung_area=lung_area_of(mask),
        )
