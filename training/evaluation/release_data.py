"""Data of the release gate: its criteria, its test images, and a model's answers to them.

The bounds of the criteria stand in `release_criteria.toml` beside this file and nowhere else. A
file of other bounds may be given to `lungwatch evaluate --gate`; the bound in force is written
beside every value.
"""

import difflib
import json
import math
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from lungwatch.errors import ConfigError, ModelError
from lungwatch.preprocess import PreprocessSpec, lung_mask, preprocess
from lungwatch.training.data.dataset import Sample, Split, dataset_name, manifest_rows
from lungwatch.training.data.pixels import FloatArray, decode_all, read_image
from lungwatch.training.data.scan import ScannedImage, require_readable, scan
from lungwatch.training.evaluation.calibration import apply_calibration
from lungwatch.training.evaluation.evaluation import choose_samples
from lungwatch.training.evaluation.gate_rates import Gate
from lungwatch.training.evaluation.scorers import Judgement, Scorer, embed

Verdict = Literal["pass", "fail", "not_measured"]
Judged = Literal["value", "low"]
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


@dataclass(frozen=True, kw_only=True)
class Criterion:
    """One requirement.

    Attributes
    ----------
    name
        Key, for files and for other bounds.
    title
        For people.
    bound
        What the value is held to.
    at_least
        Whether the value must reach the bound, or else must not exceed it.
    fewest
        Fewest cases, of each class where there are classes, for the value to be judged.
    judged
        What is held to the bound: the value, or the lower end of its 95 % interval.
    why
        Where the bound comes from.
    """

    name: str
    title: str
    bound: float
    at_least: bool = True
    fewest: int = 10
    judged: Judged = "value"
    why: str

    @classmethod
    def of(cls, name: str, values: Mapping[str, Any]) -> "Criterion":
        """Read a criterion's table of the TOML file."""
        given = dict(values)
        at_least = "at_least" in given
        bound = float(given.pop("at_least" if at_least else "at_most"))
        return cls(name=name, bound=bound, at_least=at_least, **given)


CRITERIA: tuple[Criterion, ...] = tuple(
    Criterion.of(name, values)
    for name, values in tomllib.loads(
        (resources.files(__package__) / "release_criteria.toml").read_text(encoding="utf-8")
    ).items()
)


@dataclass(frozen=True, kw_only=True)
class CriterionCheck:
    """One requirement, and what a model reaches.

    Attributes
    ----------
    criterion
        Name, title, bound, direction: see `Criterion`.
    on
        On what it was measured: a data set, a part of it, a change of the images.
    value, interval
        What was found, and its 95 % interval; None where it was not measured, or has none.
    verdict
        "pass", "fail" or "not_measured".
    reason
        Why it was not measured; empty otherwise.
    beside
        Figures to compare the value with, by name.
    """

    criterion: Criterion
    on: str
    value: float | None = None
    interval: tuple[float, float] | None = None
    verdict: Verdict
    reason: str = ""
    beside: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, with the criterion's own."""
        told = asdict(self.criterion)
        return {
            "name": told.pop("name"),
            "title": told.pop("title"),
            "on": self.on,
            "value": self.value,
            "interval": list(self.interval) if self.interval else None,
            "verdict": self.verdict,
            "reason": self.reason,
            "beside": self.beside,
            **told,
        }


class Criteria:
    """A set of criteria that values are held to; each name occurs once."""

    def __init__(self, criteria: Sequence[Criterion] = CRITERIA) -> None:
        self._by_name = {criterion.name: criterion for criterion in criteria}

    def __getitem__(self, name: str) -> Criterion:
        return self._by_name[name]

    @property
    def all(self) -> tuple[Criterion, ...]:
        """Every criterion, in order."""
        return tuple(self._by_name.values())

    def judge(
        self,
        name: str,
        on: str,
        value: float | None,
        interval: Sequence[float] | None = None,
        *,
        cases: int | None = None,
        beside: dict[str, float] | None = None,
    ) -> CriterionCheck:
        """Hold a value to its bound.

        Parameters
        ----------
        name
            Of the criterion.
        on
            On what it was measured.
        value, interval
            What was found; None, or NaN, where it cannot be computed.
        cases
            How many it rests on, the smaller class where there are two; None if unknown, which
            is not held against it.
        beside
            Figures to compare it with.
        """
        criterion, beside = self[name], beside or {}
        reason = ""
        if cases is not None and cases < criterion.fewest:
            reason = f"too few: {cases}, at least {criterion.fewest} are needed"
        elif value is None or not math.isfinite(value):
            reason = "cannot be computed"
        elif criterion.judged == "low" and interval is None:
            reason = "no interval: --bootstrap is 0"
        if reason or value is None:
            return self.skip(name, on, reason, beside)
        held = interval[0] if criterion.judged == "low" and interval else value
        reached = held >= criterion.bound if criterion.at_least else held <= criterion.bound
        return CriterionCheck(
            criterion=criterion,
            on=on,
            value=round(float(value), 6),
            interval=(round(float(interval[0]), 6), round(float(interval[1]), 6))
            if interval
            else None,
            verdict="pass" if reached else "fail",
            beside=beside,
        )

    def skip(
        self, name: str, on: str, reason: str, beside: dict[str, float] | None = None
    ) -> CriterionCheck:
        """Record that nothing was measured, and why."""
        return CriterionCheck(
            criterion=self[name],
            on=on,
            verdict="not_measured",
            reason=reason,
            beside=beside or {},
        )


def overall(checks: Sequence[CriterionCheck]) -> Verdict:
    """Sum up: "fail" if any check fails, "not_measured" if a criterion was measured nowhere."""
    if any(check.verdict == "fail" for check in checks):
        return "fail"
    measured = {check.criterion.name for check in checks if check.verdict == "pass"}
    if {check.criterion.name for check in checks} - measured:
        return "not_measured"
    return "pass" if checks else "not_measured"


def read_criteria(file: Path | None) -> Criteria:
    """Return the criteria, with other bounds from a JSON file {"name": bound}.

    Raises
    ------
    ConfigError
        If the file cannot be read, a name is unknown, or a bound is no number.
    """
    if file is None:
        return Criteria()
    values = read_json(file)
    if not isinstance(values, dict):
        raise ConfigError(f'{file} is not of the form {{"auc": 0.9}}')
    names = [criterion.name for criterion in CRITERIA]
    for name, bound in values.items():
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"; nearest is {near[0]!r}" if near else f"; there are: {', '.join(names)}"
            raise ConfigError(f"{file}: no criterion {name!r}{hint}")
        if isinstance(bound, bool) or not isinstance(bound, int | float):
            raise ConfigError(f"{file}: {name} is {bound!r}, not a number")
        if not math.isfinite(bound):
            raise ConfigError(f"{file}: {name} is {bound!r}, not a finite number")
    return Criteria(
        [replace(one, bound=float(values.get(one.name, one.bound))) for one in CRITERIA]
    )


def read_json(file: Path) -> Any:  # noqa: ANN401 - any JSON value
    """Read a file that the user names.

    Raises
    ------
    ConfigError
        If it cannot be read, or is not JSON.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{file} is not JSON in UTF-8") from error


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
    """Return how many images `collect_answers` will read."""
    return len(choose_samples(location, split))


def collect_answers(
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
