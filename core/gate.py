"""Content gate: what a bundle's own network says of whether a picture can be judged at all.

The gate is a second ONNX graph, `gate.onnx`, beside `model.onnx`. It takes `pixels`, float32
(N, side, side, 1), 0..1, and returns

- `scores`, float32 (N, checks), 0..1: one column a check, higher is better;
- `lungs`, float32 (N, lungs_side_px, lungs_side_px), 0..1: each cell's probability of being lung.

What the columns mean, and from which score on a picture passes, stands in the model's contract.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from lungwatch.errors import ModelError, Reason
from lungwatch.flags import Flag
from lungwatch.preprocess import PreprocessSpec

GATE_SCORES = "scores"
GATE_LUNGS = "lungs"
GATE_REASONS = (Reason.NOT_FRONTAL_CHEST, Reason.ROTATED, Reason.INVERTED, Reason.NO_LUNGS)


@dataclass(frozen=True, kw_only=True)
class GateCheck:
    """One question that the gate answers.

    Attributes
    ----------
    name
        For reports ("frontal", "upright", …).
    threshold
        Smallest score, 0..1, that passes; chosen on chest X-rays alone.
    reason
        Why a picture below it is refused: one of `GATE_REASONS`.
    """

    name: str
    threshold: float
    reason: Reason

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ModelError(f"gate check {self.name!r}: a name is a text")
        if not 0 < self.threshold < 1:
            raise ModelError(f"gate check {self.name!r}: threshold {self.threshold} not in 0..1")
        if self.reason not in GATE_REASONS:
            raise ModelError(f"gate check {self.name!r}: unknown reason {self.reason}")


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the gate says of one picture.

    Attributes
    ----------
    score
        0..1: that of the check which refused it, else the lowest of all.
    check
        Name of that check.
    reason
        Why it is refused; None if it passes.
    """

    score: float
    check: str
    reason: Reason | None

    @property
    def flag(self) -> Flag | None:
        """The flag that stands for the refusal where the gate flags instead of refusing."""
        return None if self.reason is None else Flag(self.reason.value)


@dataclass(frozen=True, kw_only=True)
class GateContract:
    """Everything a runtime must know of a bundle's gate.

    Attributes
    ----------
    preprocess
        How a radiograph becomes the gate's input.
    checks
        In the order of the graph's columns; the first that fails gives the reason.
    lungs_side_px
        Side of the lung field that the graph returns.
    lung_area
        (least, most) share of the picture that is lung in nearly all training images: outside of
        it the flag `partial_lungs` is set.
    golden_scores, golden_lung_area
        What the gate answers on `lungwatch.golden.golden_input`.
    tolerance
        Largest absolute difference from those that another processor's arithmetic may make.
    provenance, metrics
        Plain JSON values.
    """

    preprocess: PreprocessSpec
    checks: tuple[GateCheck, ...]
    lungs_side_px: int
    lung_area: tuple[float, float]
    golden_scores: tuple[float, ...]
    golden_lung_area: float
    tolerance: float = 0.02
    provenance: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.checks or len(self.golden_scores) != len(self.checks):
            raise ModelError("gate: as many golden scores as checks, and at least one")
        if len({check.name for check in self.checks}) != len(self.checks):
            raise ModelError("gate: two checks have one name")
        for value in (*self.golden_scores, self.golden_lung_area):
            if not 0 <= value <= 1:
                raise ModelError(f"gate: a golden answer is {value}, not within 0..1")
        if not 0 < self.tolerance < 0.5:
            raise ModelError(f"gate.tolerance is {self.tolerance}, not within 0..0.5")
        if not 4 <= self.lungs_side_px <= 1024:
            raise ModelError(f"gate.lungs_side_px is {self.lungs_side_px}, not within 4..1024")
        if len(self.lung_area) != 2 or not 0 <= self.lung_area[0] < self.lung_area[1] <= 1:
            raise ModelError("gate.lung_area must satisfy 0 <= least < most <= 1")

    def verdict(self, scores: Sequence[float]) -> Verdict:
        """Judge one picture by the graph's scores, one a check.

        Raises
        ------
        ModelError
            If there are not as many as checks, or one is no number.
        """
        if len(scores) != len(self.checks) or not all(math.isfinite(s) for s in scores):
            raise ModelError("the gate's scores are not what its contract says")
        pairs = list(zip(self.checks, scores, strict=True))
        for check, score in pairs:
            if score < check.threshold:
                return Verdict(score=score, check=check.name, reason=check.reason)
        check, score = min(pairs, key=lambda pair: pair[1])
        return Verdict(score=score, check=check.name, reason=None)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Read the section `gate` of a contract.

        Raises
        ------
        ModelError
            If it is incomplete, holds unknown keys or values that make no sense.
        """
        try:
            return cls(
                **{
                    **values,
                    "preprocess": PreprocessSpec.from_dict(values["preprocess"]),
                    "checks": tuple(
                        GateCheck(**{**one, "reason": Reason(one["reason"])})
                        for one in values["checks"]
                    ),
                    "lung_area": tuple(values["lung_area"]),
                    "golden_scores": tuple(values["golden_scores"]),
                }
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ModelError(f"the contract's gate is not understood: {error}") from error
