"""Messages between the daemon and a decoding process.

What comes back is JSON and plain arrays, checked: it is made from hostile files by a process
that one of them may have taken over. Pickle would hand on the daemon as well.
"""

import json
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from lungwatch.daemon.decoding import Decoded
from lungwatch.errors import FileRejected, ProcessingFailed, Reason
from lungwatch.flags import Flag
from lungwatch.imaging import RadiographMeta, ReadPolicy
from lungwatch.preprocess import PreprocessSpec

READY = b"ready"
_MAX_HEADER_BYTES = 1024 * 1024

_T = TypeVar("_T", np.float32, np.uint8)


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What a decoding process is told once.

    Attributes
    ----------
    memory_mb
        Bound on its address space, in MiB.
    gate_spec
        How the content gate wants its input; None without a gate.
    """

    policy: ReadPolicy
    spec: PreprocessSpec
    overlay_side_px: int
    memory_mb: int
    gate_spec: PreprocessSpec | None = None


class OutOfMemory(ProcessingFailed):
    """Decoding takes more memory than it may have."""

    def __init__(self) -> None:
        super().__init__(
            Reason.DECODER_OUT_OF_MEMORY, "decoding takes more memory than decode_memory_mb allows"
        )


def send_decoded(connection: Connection, decoded: Decoded) -> None:
    """Answer with a decoded file."""
    header = {
        "meta": asdict(decoded.meta),
        "shape": decoded.shape,
        "preview_shape": decoded.preview.shape,
        "flags": decoded.flags,
        "orientation_known": decoded.orientation_known,
        "gate_side": None if decoded.gate_tensor is None else decoded.gate_tensor.shape[0],
    }
    connection.send_bytes(json.dumps(header).encode())
    connection.send_bytes(decoded.tensor.tobytes())
    connection.send_bytes(decoded.preview.tobytes())
    if decoded.gate_tensor is not None:
        connection.send_bytes(decoded.gate_tensor.tobytes())


def send_error(connection: Connection, error: Exception) -> None:
    """Answer with what went wrong."""
    header: dict[str, Any]
    if _is_memory(error):
        header = {"out_of_memory": True}
    elif isinstance(error, FileRejected):
        meta = asdict(error.meta) if error.meta is not None else None
        header = {"rejected": error.reason.value, "message": str(error), "rejected_meta": meta}
    elif isinstance(error, OSError) and error.errno is not None:
        header = {"errno": error.errno, "message": error.strerror or type(error).__name__}
    else:
        # The text of an unknown error may quote the file.
        header = {"failed": type(error).__name__}
    connection.send_bytes(json.dumps(header).encode())


def receive(connection: Connection, setup: Setup) -> Decoded | Exception:
    """Take an answer: a decoded file, or what decoding it raised.

    The latter is `FileRejected` or `OSError` as it was, `OutOfMemory`, or `ProcessingFailed`
    for what nobody expects.

    Raises
    ------
    EOFError
        If the process is gone.
    OSError
        If the channel breaks, or nothing comes in time (`BlockingIOError`).
    ValueError, TypeError, KeyError
        If the answer is none.
    """
    header = json.loads(connection.recv_bytes(_MAX_HEADER_BYTES))
    if "meta" not in header:
        return _error(header)
    size = setup.spec.size_px
    tensor = _array(connection, (size, size, 1), np.float32)
    height, width = (int(side) for side in header["preview_shape"])
    if not 0 < min(height, width) <= max(height, width) <= setup.overlay_side_px:
        raise ValueError("the preview has an impossible size")
    preview = _array(connection, (height, width), np.uint8)
    gate_tensor = None
    if header["gate_side"] is not None:
        if setup.gate_spec is None:
            raise ValueError("an input for a gate that there is not")
        side = setup.gate_spec.size_px
        gate_tensor = _array(connection, (side, side, 1), np.float32)
    rows, columns = (int(side) for side in header["shape"])
    return Decoded(
        meta=RadiographMeta(**header["meta"]),
        tensor=tensor,
        preview=preview,
        shape=(rows, columns),
        gate_tensor=gate_tensor,
        flags=tuple(Flag(code) for code in header["flags"]),
        orientation_known=header["orientation_known"] is True,
    )


def _array(connection: Connection, shape: tuple[int, ...], dtype: type[_T]) -> NDArray[_T]:
    size_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    data = connection.recv_bytes(size_bytes)
    # A copy, since an array over bytes cannot be written to.
    return np.frombuffer(data, dtype).reshape(shape).copy()


def _error(header: dict[str, Any]) -> Exception:
    if "out_of_memory" in header:
        return OutOfMemory()
    if "rejected" in header:
        rejected = FileRejected(Reason(header["rejected"]), str(header["message"]))
        meta = header["rejected_meta"]
        rejected.meta = RadiographMeta(**meta) if meta is not None else None
        return rejected
    if "errno" in header:
        return OSError(int(header["errno"]), str(header["message"]))
    return ProcessingFailed(
        Reason.INTERNAL_ERROR, f"decoding failed unexpectedly ({str(header['failed'])[:64]})"
    )


def _is_memory(error: BaseException | None) -> bool:
    """Whether a lack of memory is at the bottom of it, whatever a decoder made of that."""
    while error is not None:
        # OpenCV's own class has the code as an attribute: Error::StsNoMem.
        if isinstance(error, MemoryError) or getattr(error, "code", None) == -4:
            return True
        error = error.__cause__ or error.__context__
    return False
