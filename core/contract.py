"""Model contract: the metadata of an ONNX model that the daemon relies on.

The daemon runs nothing it does not understand: the contract names its version, how the
input is made, what the outputs mean, where the threshold lies and what the model answers on
a picture that everybody can generate. No TensorFlow and no `onnx` is needed to read it;
onnxruntime shows the metadata of a session.
"""

import json
import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Self

from lungwatch.errors import ModelError
from lungwatch.gate import GateContract
from lungwatch.preprocess import PreprocessSpec

CONTRACT_VERSION = 2
# Version 1 called the negative class NORMAL, and knew neither gate nor map_reference.
_READ_VERSIONS = (1, CONTRACT_VERSION)
METADATA_KEY = "lungwatch.contract"

INPUT = "pixels"
PROBABILITY = "probability"
LOGITS = "logits"
CAM = "cam"
EMBEDDING = "embedding"
OUTPUTS = (PROBABILITY, LOGITS, CAM, EMBEDDING)
# The largest value of each map before it was scaled to 0..1; a graph of contract 1 has none.
CAM_PEAK = "cam_peak"

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
"""What each label says to a reader, in one clause."""


@dataclass(frozen=True, kw_only=True)
class Decision:
    """How a probability becomes a label.

    Attributes
    ----------
    threshold
        Probability from which the label is COVID, fixed on validation data.
    uncertain_low, uncertain_high
        Probabilities within [low, high) are UNCERTAIN: the model abstains. Equal values
        switch abstention off.
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
        # A falling curve would turn the map for COVID into the one against it.
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
class Golden:
    """What the model answers on `lungwatch.golden.golden_input`: a self-test anyone can run.

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
    """

    input_sha256: str
    probability: float
    cam_mean: float
    tolerance: float = 1e-3


@dataclass(frozen=True, kw_only=True)
class ModelContract:
    """Everything a runtime must know of a model, and what an auditor wants to.

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
        Of the two classes: NEGATIVE (no COVID pattern; nothing is said of other disease), COVID.
    gate
        The content gate beside the model; None where nothing looks at what a picture shows.
    map_reference
        Evidence, in the units of the graph's `cam_peak`, that is drawn with the full colour, the
        same for all images of the model; None where the graph has no `cam_peak`.
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
    provenance: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)

    @property
    def id(self) -> str:
        """The model's identity, "name-version"."""
        return f"{self.name}-{self.version}"

    def to_json(self) -> str:
        """Return the contract as JSON with sorted keys, for the ONNX metadata."""
        return json.dumps({"contract": CONTRACT_VERSION, **asdict(self)}, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read a contract.

        Raises
        ------
        ModelError
            If it is of another version, incomplete, holds unknown keys or values that make
            no sense. There is no guessing here.
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
                f"the model speaks contract version {found}, this program {CONTRACT_VERSION}: "
                "install the lungwatch release that the model was made for"
            )
        try:
            values["preprocess"] = PreprocessSpec.from_dict(values["preprocess"])
            values["decision"] = Decision(**values["decision"])
            values["calibration"] = Calibration(**values["calibration"])
            values["golden"] = Golden(**values["golden"])
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
        return contract
