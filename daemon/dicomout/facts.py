"""Everything that the objects state of a result."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Literal

from lungwatch.contract import COVID_FINDING, OPACITY, Label, meaning
from lungwatch.daemon.scoretext import decimal_score
from lungwatch.flags import Flag

Kind = Literal["sc", "sr"]
ReportClass = Literal["comprehensive-3d", "comprehensive"]


@dataclass(frozen=True, kw_only=True)
class Predecessor:
    """An earlier report on the same image, by another model, that was sent.

    Attributes
    ----------
    sha256, model_sha256
        The file that it was made of, and the model that answered.
    sop_instance_uid
        The report's own.
    """

    sha256: str
    model_sha256: str
    sop_instance_uid: str


@dataclass(frozen=True, kw_only=True)
class ResultFacts:
    """One result, as the record has it.

    Attributes
    ----------
    sha256
        Of the source file, in hexadecimal.
    label
        The decision.
    probability, threshold
        Calibrated, of COVID, 0..1.
    uncertain_from, uncertain_to
        Probabilities within [from, to) are UNCERTAIN; equal where the model never abstains, None
        where the record is older than this is kept.
    flags
        Codes of what is remarkable about the case (`lungwatch.flags`).
    findings
        Calibrated probability, 0..1, of each finding by name, COVID's included.
    gate_score, lung_area, lung_share
        Of the content gate, 0..1 (`lungwatch.plausibility`); None where they are not known.
    model_name, model_version, model_sha256
        The model that answered.
    finished_at
        With a zone; dates the objects.
    overlay
        The PNG that becomes the Secondary Capture.
    calibration
        The site calibration that decided; None for the bundle's own.
    predecessor
        The report that this one revises, if there is one.
    """

    sha256: str
    label: Label
    probability: float
    threshold: float
    uncertain_from: float | None = None
    uncertain_to: float | None = None
    flags: tuple[str, ...]
    findings: Mapping[str, float] = field(default_factory=dict)
    gate_score: float | None = None
    lung_area: float | None = None
    lung_share: float | None = None
    model_name: str
    model_version: str
    model_sha256: str
    finished_at: datetime
    overlay: Path
    calibration: str | None = None
    predecessor: Predecessor | None = None

    @property
    def numbers(self) -> dict[str, str]:
        """The probability and what it is held against, as the report writes them, by field."""
        names = ["threshold"]
        if self.uncertain_from is not None and self.uncertain_from != self.uncertain_to:
            names += ["uncertain_from", "uncertain_to"]
        bounds = [float(getattr(self, name)) for name in names]
        probability, printed = decimal_score(self.probability, bounds)
        return {"probability": probability, **dict(zip(names, printed, strict=True))}

    @property
    def further(self) -> dict[str, str]:
        """Probability of each finding beside COVID, as the report writes it, by name."""
        return {
            name: decimal_score(probability, ())[0]
            for name, probability in self.findings.items()
            if name != COVID_FINDING
        }

    @property
    def other_opacity(self) -> str | None:
        """The probability, as written, of an opacity under a negative answer; None without."""
        return self.further.get(OPACITY) if Flag.OTHER_OPACITY in self.flags else None


def conclusion(label: Label, flags: Collection[str] = ()) -> str:
    """Return the sentence that the objects say for a label and what is remarkable about it."""
    return f"{label}: {meaning(label, flags)}."
