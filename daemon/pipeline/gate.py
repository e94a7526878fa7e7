"""The content gate of a model, and the onnxruntime session that it and the model run in."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from lungwatch.bundle import GATE_FILE
from lungwatch.contract import GATE_LUNGS, GATE_SCORES, INPUT, GateContract, Verdict
from lungwatch.daemon.pipeline.records import GateAnswer, Prepared
from lungwatch.db.models import Plausibility
from lungwatch.errors import FileRejected, ModelError
from lungwatch.preprocess import golden_input, lung_area_of, lung_mask


def open_session(data: bytes, path: Path, threads: int = 0) -> onnxruntime.InferenceSession:
    """Open a graph.

    Parameters
    ----------
    data
        The ONNX file's bytes: those that were checked, not the path, behind which others may lie
        by now.
    path
        Where they were read, for messages.
    threads
        Of one call; 0 for one per processor.

    Raises
    ------
    ModelError
        If it cannot be run.
    """
    options = onnxruntime.SessionOptions()
    # Explicit: left to itself onnxruntime counts the host's processors, not the
    # container's, and pins threads that it may not pin (onnxruntime #8313).
    options.intra_op_num_threads = threads or len(os.sched_getaffinity(0))
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Spinning threads would burn a processor that the decoders could use.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        return onnxruntime.InferenceSession(
            data, sess_options=options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # onnxruntime's own errors share no base class
        raise ModelError(f"{path} is not a model that can be run") from error


def check_signature(
    session: onnxruntime.InferenceSession, path: Path, outputs: Sequence[str]
) -> None:
    """Refuse a graph that does not take `pixels`, or lacks an output.

    Raises
    ------
    ModelError
        If so.
    """
    inputs = {item.name for item in session.get_inputs()}
    found = {item.name for item in session.get_outputs()}
    if inputs != {INPUT} or not set(outputs) <= found:
        raise ModelError(
            f"{path}: the inputs are {sorted(inputs)} and the outputs {sorted(found)}, not "
            f"{INPUT} and {', '.join(outputs)}"
        )


def require_golden_answers(
    who: str, answers: Sequence[tuple[str, float, float]], tolerance: float
) -> None:
    """Compare this machine's answers on the golden picture with the recorded ones.

    Parameters
    ----------
    who
        For the message.
    answers
        (name, answer, recorded answer) each.

    Raises
    ------
    ModelError
        If they differ by more than the tolerance.
    """
    for name, found, expected in answers:
        if not abs(found - expected) <= tolerance:  # a NaN must not pass
            raise ModelError(
                f"{who} answers its golden picture with a {name} of {found:.6f} instead of "
                f"{expected:.6f}: the file, the runtime or the processor is at fault"
            )


class GateRefused(FileRejected):
    """The content gate refuses an image.

    Attributes
    ----------
    plausibility
        The gate's figures, for the database.
    """

    def __init__(self, verdict: Verdict, threshold: float, plausibility: Plausibility) -> None:
        assert verdict.reason is not None
        super().__init__(
            verdict.reason,
            f"content gate: {verdict.check!r} scores {verdict.score:.3f}, at least "
            f"{threshold:.3f} is needed; if this is an upright frontal chest X-ray, set "
            'gate = "flag" and `lungwatch retry` it',
        )
        self.plausibility = plausibility


class ContentGate:
    """An onnxruntime session of a bundle's `gate.onnx`, and the contract's section on it.

    Safe to call from several threads.
    """

    def __init__(self, session: onnxruntime.InferenceSession, contract: GateContract) -> None:
        self._session = session
        self.contract = contract

    @classmethod
    def of(cls, data: bytes, contract: GateContract, folder: Path, threads: int = 0) -> Self:
        """Load a gate and replay its golden picture.

        Parameters
        ----------
        data
            The ONNX file's bytes.
        contract
            The section `gate` of the model's contract.
        folder
            The bundle's, for messages.
        threads
            Of one call; 0 for one per processor.

        Raises
        ------
        ModelError
            If the graph cannot be run or is not what the contract says, or this machine's answer
            on the golden picture is not the recorded one.
        """
        session = open_session(data, folder / GATE_FILE, threads)
        check_signature(session, folder / GATE_FILE, (GATE_SCORES, GATE_LUNGS))
        gate = cls(session, contract)
        gate.check_golden()
        return gate

    def run(self, batch: NDArray[np.float32]) -> list[GateAnswer]:
        """Run the gate on images.

        Parameters
        ----------
        batch
            float32, shape (n, side, side, 1), 0..1: stacked results of `preprocess` with the
            gate's specification.

        Returns
        -------
        list of GateAnswer
            One an image, in order.

        Raises
        ------
        ModelError
            If the graph's answer is not what the contract says.
        """
        scores, lungs = self._run(batch)
        return [
            GateAnswer(verdict=self.contract.verdict([float(one) for one in row]), lungs=field)
            for row, field in zip(scores, lungs, strict=True)
        ]

    def refusal(self, prepared: Prepared, answer: GateAnswer) -> GateRefused | None:
        """Return why an image is refused; None if it passes."""
        verdict = answer.verdict
        if verdict.reason is None:
            return None
        (threshold,) = [one.threshold for one in self.contract.checks if one.name == verdict.check]
        mask = lung_mask(answer.lungs, prepared.shape, self.contract.preprocess)
        found = Plausibility(gate_score=verdict.score, lung_area=lung_area_of(mask))
        refused = GateRefused(verdict, threshold, found)
        refused.meta = prepared.meta
        return refused

    def check_golden(self) -> None:
        """Compare this machine's answer on the golden picture with the contract's.

        Raises
        ------
        ModelError
            If they differ by more than the contract's tolerance.
        """
        contract = self.contract
        scores, lungs = self._run(golden_input(contract.preprocess)[np.newaxis])
        answers = [
            (f"score for {check.name!r}", float(found), expected)
            for check, found, expected in zip(
                contract.checks, scores[0], contract.golden_scores, strict=True
            )
        ]
        answers.append(("lung area", lung_area_of(lungs[0] >= 0.5), contract.golden_lung_area))
        require_golden_answers("the content gate", answers, contract.tolerance)

    def _run(self, batch: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return scores, (n, checks), and lungs, (n, side, side)."""
        scores, lungs = self._session.run([GATE_SCORES, GATE_LUNGS], {INPUT: batch})
        side, shapes = self.contract.lungs_side_px, (scores.shape, lungs.shape)
        expected = ((len(batch), len(self.contract.checks)), (len(batch), side, side))
        if shapes != expected:
            raise ModelError(
                f"the gate's outputs have the shapes {shapes[0]} and {shapes[1]}, not those of its "
                f"contract, {expected[0]} and {expected[1]}"
            )
        return scores, lungs
