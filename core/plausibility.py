"""Plausibility figures of a result: gate score, lung area and lung share."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Plausibility:
    """How far the gate's figures support an answer; None where there is no gate.

    Attributes
    ----------
    gate_score
        0..1: that of the check which refused the picture, else the lowest of all.
    lung_area
        Share of the picture that is lung, 0..1.
    lung_share
        Share of the map for COVID that lies inside the lungs, 0..1; None too where that map is
        empty or the picture was not scored.
    """

    gate_score: float | None = None
    lung_area: float | None = None
    lung_share: float | None = None
