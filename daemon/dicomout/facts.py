"""Everything that the objects state of a result."""

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal

from lungwatch.contract import Label

Kind = Literal["sc", "sr"]
ReportClass = Literal["comprehensive-3d", "comprehensive"]


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
    flags
        Codes of what is remarkable about the case.
    model_name, model_version, model_sha256
        The model that answered.
    finished_at
        With a zone; dates the objects.
    overlay
        The PNG that becomes the Secondary Capture.
    """

    sha256: str
    label: Label
    probability: float
    threshold: float
    flags: tuple[str, ...]
    model_name: str
    model_version: str
    model_sha256: str
    finished_at: datetime
    overlay: Path
