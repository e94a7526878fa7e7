"""Model contract: the metadata of an ONNX model and of its content gate.

It names its version, the preprocessing, the meaning of the outputs, the threshold, and the
answers on the golden picture. Reading it needs neither TensorFlow nor `onnx`.
"""

import json
import math
import re
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, Self

from lungwatch.errors import GATE_REASONS, Flag, ModelError, Reason
from lungwatch.preprocess import PreprocessSpec

GATE_SCORES = "scores"
GATE_LUNGS = "lungs"


@dataclass(frozen=True, kw_only=True)
class GateCheck:
    """One check of the gate, by its name for reports ("frontal", "upright", …).

    `threshold` is the smallest score, 0..1, that passes, chosen on chest X-rays alone; pictures
    below it are refused for `reason`, one of `GATE_REASONS`.
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
    """The gate's decision on one picture.

    `score`, 0..1, is that of the check which refused the picture, else the lowest of all; `check`
    is its name, `reason` that of the refusal, None if the picture passes.
    """

    score: float
    check: str
    reason: Reason | None

    @property
    def flag(self) -> Flag | None:
        """The flag of the refusal, where the gate flags instead of refusing."""
        return None if self.reason is None else Flag(self.reason.value)


@dataclass(frozen=True, kw_only=True)
class GateContract:
    """Section `gate` of a model's contract.

    The gate is a second ONNX graph, `gate.onnx`. It takes `pixels`, float32 (N, side, side, 1),
    0..1, and returns `scores`, float32 (N, checks), 0..1, higher is better, and `lungs`, float32
    (N, lungs_side_px, lungs_side_px), 0..1: each cell's probability of being lung.

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
        The gate's answers on `lungwatch.preprocess.golden_input`.
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
        """Decide on one picture by the graph's scores, one a check.

        Raises
        ------
        ModelError
            If there are not as many as checks, or one is not finite.
        """
        if len(scores) != len(self.checks) or not all(math.isfinite(s) for s in scores):
            raise ModelError("the gate's scores do not match its contract")
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


CONTRACT_VERSION = 3
# Version 1 called the negative class NORMAL, and knew neither gate nor map_reference; version 2
# had COVID as its only finding.
_READ_VERSIONS = (1, 2, CONTRACT_VERSION)
METADATA_KEY = "lungwatch.contract"
INPUT = "pixels"
PROBABILITY = "probability"
LOGITS = "logits"
CAM = "cam"
EMBEDDING = "embedding"
OUTPUTS = (PROBABILITY, LOGITS, CAM, EMBEDDING)
# Largest value of each map before it was scaled to 0..1; a graph of contract 1 has none.
CAM_PEAK = "cam_peak"
# Of the findings beside COVID, (N, F), in the contract's order; a graph without any has none.
FINDINGS = "findings"
# Their maps, (N, F, side, side), each 0..1, and what each was divided by, (N, F): optional.
FINDING_CAMS = "finding_cams"
FINDING_PEAKS = "finding_peaks"
NEGATIVE: Literal["NEGATIVE"] = "NEGATIVE"
COVID: Literal["COVID"] = "COVID"
UNCERTAIN: Literal["UNCERTAIN"] = "UNCERTAIN"
Label = Literal["NEGATIVE", "COVID", "UNCERTAIN"]
LABELS: tuple[Label, ...] = (COVID, NEGATIVE, UNCERTAIN)
MEANINGS: dict[Label, str] = {
    COVID: "COVID-19 pattern found",
    NEGATIVE: "no COVID-19 pattern found; other disease is not assessed",
    UNCERTAIN: "the model abstains; COVID-19 pattern indeterminate",
}
"""Meaning of each label for a reader, in one clause."""

_OTHER_OPACITY = (
    "no COVID-19 pattern found, but an opacity; this does not mean a normal chest X-ray"
)
COVID_FINDING = "covid"
OPACITY = "opacity"
_FINDING_NAME = re.compile(r"[a-z][a-z0-9_]{0,13}")


def meaning(label: Label, flags: Collection[str] = ()) -> str:
    """Return the meaning of an answer for a reader, in one clause."""
    return _OTHER_OPACITY if Flag.OTHER_OPACITY in flags else MEANINGS[label]


@dataclass(frozen=True, kw_only=True)
class Decision:
    """Threshold and uncertain band of calibrated probabilities.

    From `threshold`, fixed on validation data, the label is COVID. Within
    [`uncertain_low`, `uncertain_high`) the model abstains: UNCERTAIN; equal values switch that off.
    """

    threshold: float
    uncertain_low: float
    uncertain_high: float

    def __post_init__(self) -> None:
        if not 0 < self.threshold < 1:
            raise ModelError(f"decision.threshold is {self.threshold}, not within 0..1")
        if not 0 <= self.uncertain_low <= self.threshold <= self.uncertain_high <= 1:
            raise ModelError("decision: 0 <= uncertain_low <= threshold <= uncertain_high <= 1")

    def label(self, probability: float) -> Label:
        """Return the label of a calibrated probability in 0..1."""
        if self.uncertain_low <= probability < self.uncertain_high:
            return UNCERTAIN
        return COVID if probability >= self.threshold else NEGATIVE


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Platt scaling of the binary logit: p = sigmoid(slope * z + intercept).

    Source: Platt 1999; with intercept 0, the temperature scaling of Guo et al. 2017.
    """

    slope: float = 1.0
    intercept: float = 0.0

    def __post_init__(self) -> None:
        # A falling curve would invert the map for COVID.
        if not (math.isfinite(self.slope) and math.isfinite(self.intercept) and self.slope > 0):
            raise ModelError("calibration needs a finite intercept and a slope above 0")

    def probability(self, logit: float) -> float:
        """Return the calibrated probability, 0..1, of a binary logit z."""
        z = self.slope * logit + self.intercept
        # The branch keeps exp() from overflowing for confident negatives.
        if z >= 0:
            return 1.0 / (1.0 + math.exp(-z))
        return math.exp(z) / (1.0 + math.exp(z))


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A finding that the model scores beside COVID; no label comes of it.

    Attributes
    ----------
    name
        Lower case, digits and underscores, at most 14 characters (of a DICOM code there are 16);
        never "covid".
    calibration
        From the finding's logit to its probability.
    threshold
        Calibrated probability, 0..1, from which the finding is said to be present.
    map_reference
        As the contract's, in the units of the graph's `finding_peaks`; None where the graph has
        none.
    """

    name: str
    calibration: Calibration
    threshold: float
    map_reference: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not _FINDING_NAME.fullmatch(self.name):
            raise ModelError(f"finding {self.name!r}: a name is lower case, digits, underscores")
        if self.name == COVID_FINDING:
            raise ModelError("finding 'covid' is the model's main answer, and not listed again")
        if not 0 < self.threshold < 1:
            raise ModelError(f"finding {self.name!r}: threshold {self.threshold} not in 0..1")
        if self.map_reference is not None and not self.map_reference > 0:
            raise ModelError(f"finding {self.name!r}: map_reference is not above 0")

    def is_present(self, probability: float) -> bool:
        """Return whether the finding is present at a calibrated probability, 0..1."""
        return probability >= self.threshold

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Read one entry of the contract's `findings`; unknown keys are a TypeError."""
        return cls(**{**values, "calibration": Calibration(**values["calibration"])})


@dataclass(frozen=True, kw_only=True)
class Golden:
    """The model's answers on `lungwatch.preprocess.golden_input`, for a self-test.

    Attributes
    ----------
    input_sha256
        Digest of the golden picture's float32 pixels, before preprocessing.
    probability
        The graph's uncalibrated probability, 0..1.
    cam_mean
        Mean over the pixels of both maps, 0..1; one of them may be empty.
    tolerance
        Largest absolute difference that another processor's arithmetic may make.
    findings
        Uncalibrated probability, 0..1, of each of the contract's findings, in its order.
    """

    input_sha256: str
    probability: float
    cam_mean: float
    tolerance: float = 1e-3
    findings: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ModelContract:
    """Metadata of a model for those who run and audit it.

    Attributes
    ----------
    name, version
        Together the model's identity, "name-version" in folders and reports.
    family
        Architecture, for people.
    preprocess
        How a radiograph becomes the input `pixels`, float32 (N, size, size, 1), 0..1.
    cam_side_px
        Side of the map that the graph returns for each class, (N, 2, side, side).
    embedding_size
        Length of the pooled feature vector, (N, size).
    decision, calibration, golden
        See their classes.
    labels
        Of the two classes: NEGATIVE (no COVID pattern; other disease is not assessed), COVID.
    gate
        The content gate beside the model; None without one.
    map_reference
        Evidence, in the units of the graph's `cam_peak`, that is drawn with the full colour, the
        same for all images of the model; None where the graph has no `cam_peak`.
    findings
        Findings beside COVID, in the order of the graph's output `findings`.
    provenance
        Training data, seed, versions, git revision: plain JSON values.
    metrics
        Figures as measured, by data set: plain JSON values.
    """

    name: str
    version: str
    family: str
    preprocess: PreprocessSpec
    cam_side_px: int
    embedding_size: int
    decision: Decision
    calibration: Calibration
    golden: Golden
    labels: tuple[str, str] = (NEGATIVE, COVID)
    gate: GateContract | None = None
    map_reference: float | None = None
    findings: tuple[Finding, ...] = ()
    provenance: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)

    @property
    def id(self) -> str:
        """The model's identity, "name-version"."""
        return f"{self.name}-{self.version}"

    def finding(self, name: str) -> Finding | None:
        """Return a finding beside COVID by its name, None if there is none."""
        return next((one for one in self.findings if one.name == name), None)

    def probabilities(self, logits: Sequence[float]) -> dict[str, float]:
        """Return the calibrated probability, 0..1, of each finding beside COVID, by its name.

        Parameters
        ----------
        logits
            Of `findings`, in their order.

        Raises
        ------
        ModelError
            If there are not as many as findings, or one is not finite.
        """
        if len(logits) != len(self.findings) or not all(math.isfinite(z) for z in logits):
            raise ModelError("the model's findings do not match its contract")
        pairs = zip(self.findings, logits, strict=True)
        return {one.name: one.calibration.probability(z) for one, z in pairs}

    def to_json(self) -> str:
        """Return the contract as JSON with sorted keys, for the ONNX metadata."""
        return json.dumps({"contract": CONTRACT_VERSION, **asdict(self)}, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read a contract.

        Raises
        ------
        ModelError
            If it is of another version, incomplete, or holds unknown keys or invalid values.
        """
        try:
            values = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ModelError("the model's contract is not JSON") from error
        if not isinstance(values, dict):
            raise ModelError("the model's contract is not a JSON object")
        found = values.pop("contract", None)
        if found not in _READ_VERSIONS:
            raise ModelError(
                f"the model has contract version {found}, this program reads {CONTRACT_VERSION}: "
                "install the lungwatch release that the model was made for"
            )
        try:
            values["preprocess"] = PreprocessSpec.from_dict(values["preprocess"])
            values["decision"] = Decision(**values["decision"])
            values["calibration"] = Calibration(**values["calibration"])
            golden = Golden(**values["golden"])
            values["golden"] = replace(golden, findings=tuple(golden.findings))
            values["findings"] = tuple(map(Finding.from_dict, values.get("findings", ())))
            values["labels"] = tuple(values["labels"])
            if found == 1 and values["labels"] == ("NORMAL", COVID):
                values["labels"] = (NEGATIVE, COVID)
            if values.get("gate") is not None:
                values["gate"] = GateContract.from_dict(values["gate"])
            contract = cls(**values)
        except (KeyError, TypeError) as error:
            raise ModelError(f"the model's contract is not understood: {error}") from error
        if contract.labels != (NEGATIVE, COVID):
            raise ModelError(f"the model's labels are {contract.labels}, not NEGATIVE and COVID")
        if contract.map_reference is not None and not contract.map_reference > 0:
            raise ModelError(f"map_reference is {contract.map_reference}, not above 0")
        if len({one.name for one in contract.findings}) != len(contract.findings):
            raise ModelError("two of the model's findings have one name")
        if len(contract.golden.findings) != len(contract.findings):
            raise ModelError("as many golden findings as findings are needed")
        return contract
