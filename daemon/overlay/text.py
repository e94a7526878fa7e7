"""Overlay texts: label, score, remarks, caption; nothing about the patient."""

from dataclasses import dataclass
from typing import Literal

from lungwatch import RESEARCH_USE_ONLY
from lungwatch.contract import COVID, MEANINGS, NEGATIVE, UNCERTAIN, Decision, Label
from lungwatch.daemon.scoretext import format_score
from lungwatch.flags import FLAGS, Flag

MapState = Literal["drawn", "empty", "none"]
_SHORT_HASH = 12


@dataclass(frozen=True, kw_only=True)
class OverlayText:
    """What stands in an overlay's margins.

    Attributes
    ----------
    label
        What the model's decision made of the probability.
    probability
        Of COVID, 0..1, as the model said.
    decision
        Threshold and uncertain band: what the probability is held against.
    model
        The model's identity, "name-version".
    sha256
        Digest of the file's content in hexadecimal; twelve digits of it are shown.
    flags
        What is remarkable about the case.
    gate_score
        Of the content gate, 0..1; None without one.
    lung_share
        Share of the map that lies inside the lungs, 0..1; None where that is not known.
    common_scale
        Whether the map is on the scale that is the same for all images of the model.
    sides_known
        Whether the patient's right is known to lie at the picture's left.
    note
        What the picture must not be taken for.
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
    note: str = RESEARCH_USE_ONLY

    def __post_init__(self) -> None:
        for name in ("probability", "gate_score", "lung_share"):
            value = getattr(self, name)
            if value is not None and not 0.0 <= value <= 1.0:
                raise ValueError(f"{name} is {value}, not within 0..1")

    @property
    def meaning(self) -> str:
        """What the label says, as a sentence."""
        text = MEANINGS[self.label]
        return f"{text[0].upper()}{text[1:]}."

    @property
    def score(self) -> str:
        """The probability."""
        probability, _ = self._printed()
        return f"P(COVID) {probability if probability[0] in '<>' else f'= {probability}'}"

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
        """The model, its gate's score and the picture, as short as they can be told apart."""
        gate = "" if self.gate_score is None else f", content gate {self.gate_score:.3f}"
        return f"Model {self.model}{gate}, image {self.sha256[:_SHORT_HASH]}"

    def caption(self, state: MapState) -> str:
        """What the map shows, or why there is none."""
        if state == "none":
            return "No map is drawn for a negative answer."
        if state == "empty":
            return "Grad-CAM for COVID: no positive evidence in this image"
        if self.common_scale:
            return "Grad-CAM for COVID, same scale for all images of this model"
        return "Grad-CAM for COVID, relative to the strongest evidence in this image"

    def lungs(self, state: MapState) -> str:
        """Which share of the map lies in the lungs; empty where nobody knows."""
        if state != "drawn" or self.lung_share is None:
            return ""
        return f"{100 * self.lung_share:.0f} % of the map lies in the lungs"

    def _printed(self) -> tuple[str, tuple[str, ...]]:
        decision = self.decision
        return format_score(
            self.probability,
            (decision.threshold, decision.uncertain_low, decision.uncertain_high),
        )
