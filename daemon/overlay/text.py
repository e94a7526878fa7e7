"""Overlay texts: label, score, remarks and caption; nothing about the patient."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lungwatch import RESEARCH_USE_ONLY
from lungwatch.contract import COVID, NEGATIVE, OPACITY, UNCERTAIN, Decision, Label, meaning
from lungwatch.errors import FLAGS, Flag

_DECIMALS = range(3, 9)


def format_score(probability: float, bounds: Sequence[float]) -> tuple[str, tuple[str, ...]]:
    """Write a probability and its bounds so that neither rounding nor brevity misleads.

    A probability is never rounded to 0 or 1 ("< 0.001", "> 0.999"). From three decimals on, there
    are as many as it takes for the printed values to be ordered as the real ones: 0.4998 against
    0.5 is not printed as 0.500. Probability and bounds, 0..1, get equally many.
    """
    shown, printed = "", tuple[str, ...]()
    for decimals in _DECIMALS:
        shown, low, high = _shown(probability, decimals)
        printed = tuple(f"{bound:.{decimals}f}" for bound in bounds)
        if all(
            _is_distinct(probability, bound, low, high, float(text))
            for bound, text in zip(bounds, printed, strict=True)
        ):
            break
    return shown, printed


def _is_distinct(probability: float, bound: float, low: float, high: float, printed: float) -> bool:
    """Return whether the printed text shows on which side of a bound a probability lies.

    `low` and `high` are the bounds of the values that the printed probability can stand for.
    """
    if bound in (0.0, 1.0):
        return True  # nothing lies beyond
    if printed in (0.0, 1.0):
        return False
    return low >= printed if probability >= bound else high < printed


def _shown(probability: float, decimals: int) -> tuple[str, float, float]:
    step = 10.0**-decimals
    text = f"{probability:.{decimals}f}"
    if float(text) == 0.0:
        return f"< {step:.{decimals}f}", 0.0, math.nextafter(step, 0.0)
    if float(text) == 1.0:
        bound = f"{1.0 - step:.{decimals}f}"
        return f"> {bound}", float(bound), 1.0
    return text, float(text), float(text)


def decimal_score(probability: float, bounds: Sequence[float]) -> tuple[str, tuple[str, ...]]:
    """Write a probability and its bounds as plain numbers, without "<" or ">".

    Three decimals, and more only where three would put the probability on another side of a
    bound, or would round it to 0 or 1. Probability and bounds, 0..1, get equally many.
    """
    shown, printed = "", tuple[str, ...]()
    for decimals in _DECIMALS:
        shown = f"{probability:.{decimals}f}"
        printed = tuple(f"{bound:.{decimals}f}" for bound in bounds)
        is_end = float(shown) in (0.0, 1.0) and float(shown) != probability
        if not is_end and all(
            (probability >= bound) == (float(shown) >= float(text))
            for bound, text in zip(bounds, printed, strict=True)
        ):
            break
    return shown, printed


MapState = Literal["drawn", "empty", "none"]
_SHORT_HASH = 12


@dataclass(frozen=True, kw_only=True)
class FindingText:
    """A finding beside COVID.

    Attributes
    ----------
    name
        As the model's contract has it.
    probability, threshold
        Calibrated, 0..1.
    """

    name: str
    probability: float
    threshold: float

    @property
    def line(self) -> str:
        """The probability and its threshold."""
        probability, (threshold,) = format_score(self.probability, (self.threshold,))
        return f"{_scored(self.name, probability)}, threshold {threshold}"


@dataclass(frozen=True, kw_only=True)
class OverlayText:
    """Contents of an overlay's margins.

    Attributes
    ----------
    label
        The decision.
    probability
        Of COVID, 0..1, as the model said.
    decision
        Threshold and uncertain band.
    model
        The model's identity, "name-version".
    sha256
        Digest of the file's content in hexadecimal; twelve digits of it are shown.
    flags
        Flags of the result.
    gate_score
        Of the content gate, 0..1; None without one.
    lung_share
        Share of the map that lies inside the lungs, 0..1; None where that is not known.
    common_scale
        Whether the map is on the common scale of all images of the model.
    sides_known
        Whether the patient's right is known to lie at the picture's left.
    findings
        What the model scores beside COVID.
    opacity_map
        Whether a negative answer has the map for its opacity; other answers have COVID's.
    note
        Disclaimer.
    """

    label: Label
    probability: float
    decision: Decision
    model: str
    sha256: str
    flags: tuple[Flag, ...] = ()
    gate_score: float | None = None
    lung_share: float | None = None
    common_scale: bool = False
    sides_known: bool = False
    findings: tuple[FindingText, ...] = ()
    opacity_map: bool = False
    note: str = RESEARCH_USE_ONLY

    def __post_init__(self) -> None:
        for name in ("probability", "gate_score", "lung_share"):
            value = getattr(self, name)
            if value is not None and not 0.0 <= value <= 1.0:
                raise ValueError(f"{name} is {value}, not within 0..1")

    @property
    def title(self) -> str:
        """The label, with the opacity that keeps a negative one from meaning a normal chest."""
        return f"{self.label}, OTHER OPACITY" if Flag.OTHER_OPACITY in self.flags else self.label

    @property
    def mapped(self) -> str | None:
        """The finding whose map is drawn; None for a negative answer without any."""
        if self.label == NEGATIVE:
            return OPACITY if self.opacity_map else None
        return COVID

    @property
    def meaning(self) -> str:
        """Meaning of the label and the flags, as a sentence."""
        text = meaning(self.label, self.flags)
        return f"{text[0].upper()}{text[1:]}."

    @property
    def score(self) -> str:
        """The probability."""
        probability, _ = self._printed()
        return _scored(COVID, probability)

    @property
    def threshold(self) -> str:
        """The threshold, for its tick on the gauge."""
        return f"threshold {self._printed()[1][0]}"

    @property
    def zones(self) -> tuple[tuple[Label, str, float, float], ...]:
        """The gauge's zones in order: label, what a key says of it, and its ends, 0..1."""
        low, high = self.decision.uncertain_low, self.decision.uncertain_high
        _, (threshold, *band) = self._printed()
        if low == high:
            cut = self.decision.threshold
            return (
                (NEGATIVE, f"negative below {threshold}", 0.0, cut),
                (COVID, f"COVID from {threshold}", cut, 1.0),
            )
        return (
            (NEGATIVE, f"negative below {band[0]}", 0.0, low),
            (UNCERTAIN, f"uncertain {band[0]} to {band[1]}", low, high),
            (COVID, f"COVID from {band[1]}", high, 1.0),
        )

    @property
    def remarks(self) -> tuple[str, ...]:
        """The flags in words."""
        return tuple(FLAGS[flag] for flag in self.flags)

    @property
    def origin(self) -> str:
        """Model, gate score and image, abbreviated."""
        gate = "" if self.gate_score is None else f", content gate {self.gate_score:.3f}"
        return f"Model {self.model}{gate}, image {self.sha256[:_SHORT_HASH]}"

    def caption(self, state: MapState) -> str:
        """Return the caption of the map, or why there is none."""
        if state == "none":
            return "No map is drawn for a negative answer."
        if state == "empty":
            return f"Grad-CAM for {self.mapped}: no positive evidence in this image"
        if self.common_scale:
            return f"Grad-CAM for {self.mapped}, same scale for all images of this model"
        return f"Grad-CAM for {self.mapped}, relative to the strongest evidence in this image"

    def lungs(self, state: MapState) -> str:
        """Return the share of the COVID map that lies in the lungs; empty where unknown."""
        if state != "drawn" or self.lung_share is None or self.mapped != COVID:
            return ""
        return f"{100 * self.lung_share:.0f} % of the map lies in the lungs"

    def _printed(self) -> tuple[str, tuple[str, ...]]:
        decision = self.decision
        return format_score(
            self.probability,
            (decision.threshold, decision.uncertain_low, decision.uncertain_high),
        )


def _scored(name: str, probability: str) -> str:
    return f"P({name}) {probability if probability[0] in '<>' else f'= {probability}'}"
