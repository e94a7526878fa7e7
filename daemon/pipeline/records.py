"""Records that pass between the stages of the pipeline, all frozen."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lungwatch.contract import COVID_FINDING, Label, Verdict
from lungwatch.daemon.intake.custody import OwnedFile
from lungwatch.daemon.pipeline.decode import Decoded
from lungwatch.daemon.stage import Lane


@dataclass(frozen=True, kw_only=True)
class Claimed:
    """A file that the daemon processes.

    Attributes
    ----------
    result_id, image_id
        Rows in the database.
    sha256
        Of the content, in hexadecimal.
    path
        The file, below `work/`: the daemon's own copy, to be moved to its last place.
    file
        The same file, open: what is read of it is read here. Closed at the file's end.
    attempt
        Counted from 1.
    received_at
        When its content was first seen; dates the folders it is filed in.
    started_s
        Monotonic time of the claim.
    lane
        Of the file, whose slot it holds.
    redraws
        Whether its result is done and stays as it is, and only its overlay is drawn again.
    """

    result_id: int
    image_id: int
    sha256: str
    path: Path
    file: OwnedFile
    attempt: int
    received_at: datetime
    started_s: float
    lane: Lane = Lane.ORDINARY
    redraws: bool = False


@dataclass(frozen=True, kw_only=True, eq=False)
class Prepared(Decoded):
    """A decoded file, and its claim."""

    claim: Claimed


@dataclass(frozen=True, kw_only=True, eq=False)
class Scores:
    """Output of the model for one image.

    Attributes
    ----------
    probability
        Calibrated, of COVID, 0..1.
    logit
        The binary logit before calibration.
    label
        By the contract's decision.
    cam
        float32, shape (2, side, side), 0..1: maps for NEGATIVE and COVID.
    embedding
        float32, shape (n,): pooled features.
    cam_peak
        float32, shape (2,): the largest value of each map before it was scaled to 0..1, in the
        units of the contract's `map_reference`; None for a graph without that output.
    further
        Calibrated probability, 0..1, of each of the contract's findings beside COVID, by name.
    further_cams
        float32, 0..1, shape (findings, side, side): their maps; None for a graph without them.
    further_peaks
        float32, shape (findings,): what each of those was divided by; None as before.
    """

    probability: float
    logit: float
    label: Label
    cam: NDArray[np.float32]
    embedding: NDArray[np.float32]
    cam_peak: NDArray[np.float32] | None = None
    further: Mapping[str, float] = field(default_factory=dict)
    further_cams: NDArray[np.float32] | None = None
    further_peaks: NDArray[np.float32] | None = None

    @property
    def findings(self) -> dict[str, float]:
        """Every finding's calibrated probability, 0..1, COVID's first."""
        return {COVID_FINDING: self.probability, **self.further}


@dataclass(frozen=True, kw_only=True, eq=False)
class GateAnswer:
    """Output of the content gate for one image.

    Attributes
    ----------
    verdict
        Whether it may be scored, and the score that decided.
    lungs
        float32, shape (side, side), 0..1: each cell's probability of being lung, over the gate's
        input (padding included).
    """

    verdict: Verdict
    lungs: NDArray[np.float32]


@dataclass(frozen=True, kw_only=True, eq=False)
class Classified:
    """A scored file.

    Attributes
    ----------
    gate
        None where the model has no content gate.
    """

    prepared: Prepared
    scores: Scores
    gate: GateAnswer | None = None
