"""One labelled X-ray of a data set, before its pixels are read."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

Finding = Literal["COVID", "NORMAL", "OTHER_PNEUMONIA"]
Split = Literal["train", "val", "test"]

FINDINGS: tuple[Finding, ...] = get_args(Finding)
SPLITS: tuple[Split, ...] = get_args(Split)
_OPAQUE = frozenset({"COVID", "OTHER_PNEUMONIA", "OPACITY"})


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A file and what is known about it.

    Attributes
    ----------
    path
        The image file: DICOM, PNG or JPEG.
    finding
        What the X-ray shows. The network learns COVID against all the rest.
    split
        The part of the data set it belongs to; None where the data set is not split.
    source
        The collection it comes from; "" if unknown. A network that can tell sources apart
        needs no lungs, so figures are given within sources too.
    patient
        The patient's pseudonym within the source; "" if unknown.
    licence
        The terms it was published under; "" if unknown.
    """

    path: Path
    finding: Finding
    split: Split | None = None
    source: str = ""
    patient: str = ""
    licence: str = ""

    @property
    def positive(self) -> bool:
        """Whether the X-ray is labelled COVID."""
        return self.finding == "COVID"

    @property
    def opaque(self) -> bool:
        """Whether the label says that the lungs show an opacity, of COVID or another."""
        return self.finding in _OPAQUE
