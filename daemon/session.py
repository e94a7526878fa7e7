"""The one way in which an ONNX graph of a bundle is opened."""

import os
from collections.abc import Sequence
from pathlib import Path

import onnxruntime

from lungwatch.contract import INPUT
from lungwatch.errors import ModelError


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
