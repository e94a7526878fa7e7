"""Decoding of a file in a sandboxed process: the work, the messages, and the parent's side.

Answers are JSON and plain arrays, checked: the process that sends them reads hostile files and
may have been taken over. Pickle would hand on the daemon as well.
"""

import contextlib
import errno
import json
import logging
import os
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.reduction import send_handle
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
from numpy.typing import NDArray

from lungwatch.attributes import RadiographMeta, meta_from_json, meta_to_json
from lungwatch.daemon.logs import event
from lungwatch.daemon.overlay.render import make_preview
from lungwatch.errors import (
    FileRejected,
    Flag,
    ProcessingFailed,
    Reason,
    TransientError,
    flags_in_order,
)
from lungwatch.imaging.radiograph import ReadPolicy
from lungwatch.imaging.reader import read_radiograph
from lungwatch.preprocess import (
    BURNT_IN_LETTERS,
    PreprocessSpec,
    content_of,
    lacks_detail,
    letters_in_line,
    preprocess,
)

READY = b"ready"
# What a codec leaks ends with its process.
FILES_PER_PROCESS = 1000
_MAX_HEADER_BYTES = 1024 * 1024
# Importing takes a third of a second on an idle machine.
_START_TIMEOUT_S = 60.0
_KILL_TIMEOUT_S = 5.0
_KEPT = {"LANG", "LD_LIBRARY_PATH", "TZ", "LUNGWATCH_TEST_DECODER"}
# The last four choose the processor's instructions that libraries use. Without them a decoder may
# add up colours in another order than the daemon's user asked for, and differ in the last digits.
_KEPT_PREFIXES = ("LC_", "PYTHON", "OPENBLAS_", "NPY_", "OPENCV_CPU_", "JSIMD_")
_ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")
_T = TypeVar("_T", np.float32, np.uint8)


@dataclass(frozen=True, kw_only=True, eq=False)
class Decoded:
    """A decoded file, reduced to what the later stages need.

    Attributes
    ----------
    tensor
        float32, shape (size, size, 1), 0..1: the network's input.
    preview
        uint8, shape (h, w): the X-ray at the overlay's size, air dark.
    shape
        (rows, columns) of the radiograph.
    gate_tensor
        float32, shape (side, side, 1), 0..1: the content gate's input; None where that is the
        same as `tensor`, or where there is no gate.
    flags
        Remarks of the reader, and on the pixels.
    orientation_known
        As in `Radiograph`: whether side marks may be drawn.
    """

    meta: RadiographMeta
    tensor: NDArray[np.float32]
    preview: NDArray[np.uint8]
    shape: tuple[int, int]
    gate_tensor: NDArray[np.float32] | None = None
    flags: tuple[Flag, ...] = ()
    orientation_known: bool = False


def decode_file(
    source: Path | BinaryIO,
    *,
    policy: ReadPolicy,
    spec: PreprocessSpec,
    overlay_side_px: int,
    gate_spec: PreprocessSpec | None = None,
) -> Decoded:
    """Decode a file and reduce it to what the later stages need.

    The full-size pixels, by far the largest data, do not leave this function.

    Parameters
    ----------
    source
        The file's path, or the file itself, open for reading.
    spec, gate_spec
        Preprocessing for the model and for its content gate; None without a gate.

    Raises
    ------
    FileRejected
        If the file is no usable chest X-ray.
    OSError
        If it cannot be read.
    """
    radiograph = read_radiograph(source, policy)
    shape = radiograph.pixels.shape[0], radiograph.pixels.shape[1]
    tensor = preprocess(radiograph.pixels, spec)
    preview = make_preview(radiograph.pixels, overlay_side_px)
    flags = [*radiograph.flags]
    if lacks_detail(content_of(tensor[:, :, 0], shape, spec), shape):
        flags.append(Flag.LOW_DETAIL)
    if letters_in_line(preview) >= BURNT_IN_LETTERS:
        flags.append(Flag.TEXT_BURNT_IN)
    return Decoded(
        meta=radiograph.meta,
        tensor=tensor,
        preview=preview,
        shape=shape,
        gate_tensor=(
            preprocess(radiograph.pixels, gate_spec)
            if gate_spec is not None and gate_spec != spec
            else None
        ),
        flags=flags_in_order(flags),
        orientation_known=radiograph.orientation_known,
    )


@dataclass(frozen=True, kw_only=True)
class DecoderSetup:
    """Settings of a decoding process, sent once.

    Attributes
    ----------
    memory_mb
        Bound on its address space, in MiB.
    gate_spec
        Preprocessing for the content gate; None without one.
    require_sandbox
        Whether it ends itself where the kernel does not confine it in full.
    """

    policy: ReadPolicy
    spec: PreprocessSpec
    overlay_side_px: int
    memory_mb: int
    gate_spec: PreprocessSpec | None = None
    require_sandbox: bool = False


class OutOfMemory(ProcessingFailed):
    """Decoding takes more memory than it may have."""

    def __init__(self) -> None:
        super().__init__(
            Reason.DECODER_OUT_OF_MEMORY, "decoding takes more memory than decode_memory_mb allows"
        )


def send_decoded(connection: Connection, decoded: Decoded) -> None:
    """Answer with a decoded file."""
    header = {
        "meta": meta_to_json(decoded.meta),
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
    """Answer with an error."""
    header: dict[str, Any]
    if _is_memory(error):
        header = {"out_of_memory": True}
    elif isinstance(error, FileRejected):
        meta = meta_to_json(error.meta) if error.meta is not None else None
        header = {"rejected": error.reason.value, "message": str(error), "rejected_meta": meta}
    elif isinstance(error, OSError) and error.errno is not None:
        header = {"errno": error.errno, "message": error.strerror or type(error).__name__}
    else:
        # The text of an unknown error may quote the file.
        header = {"failed": type(error).__name__}
    connection.send_bytes(json.dumps(header).encode())


def receive(connection: Connection, setup: DecoderSetup) -> Decoded | Exception:
    """Receive an answer: a decoded file, or the error that decoding it raised.

    The latter is `FileRejected` or `OSError` as it was, `OutOfMemory`, or `ProcessingFailed`
    for an unexpected error.

    Raises
    ------
    EOFError
        If the process has ended.
    OSError
        If the channel breaks, or nothing comes in time (`BlockingIOError`).
    ValueError, TypeError, KeyError
        If the answer is invalid.
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
            raise ValueError("a gate input without a gate")
        side = setup.gate_spec.size_px
        gate_tensor = _array(connection, (side, side, 1), np.float32)
    rows, columns = (int(side) for side in header["shape"])
    return Decoded(
        meta=meta_from_json(header["meta"]),
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
        rejected.meta = meta_from_json(meta) if meta is not None else None
        return rejected
    if "errno" in header:
        return OSError(int(header["errno"]), str(header["message"]))
    return ProcessingFailed(
        Reason.INTERNAL_ERROR, f"decoding failed unexpectedly ({str(header['failed'])[:64]})"
    )


def _is_memory(error: BaseException | None) -> bool:
    """Tell whether a lack of memory is among an error's causes."""
    while error is not None:
        # OpenCV's own class has the code as an attribute: Error::StsNoMem.
        if isinstance(error, MemoryError) or getattr(error, "code", None) == -4:
            return True
        error = error.__cause__ or error.__context__
    return False


class _DecoderDied(Exception):  # noqa: N818 - an event, which the caller interprets
    """The process has ended; `status` as `subprocess` gives it."""

    def __init__(self, status: int | None) -> None:
        super().__init__(status)
        self.status = status


class Decoder:
    """One decoding process, replaced when it dies, hangs or has decoded many files.

    For one thread: the process dies with the thread that started it. To be closed.

    Parameters
    ----------
    setup
        For the process.
    timeout_s
        Seconds that one file may take.
    niceness
        Of the process, 0 to 19 (setpriority(2)); 0 leaves the daemon's.
    """

    def __init__(self, setup: DecoderSetup, *, timeout_s: float, niceness: int = 0) -> None:
        self._setup = setup
        self._timeout_s = timeout_s
        self._niceness = niceness
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._decoded = 0
        self._is_ready = False

    def start(self) -> None:
        """Start the process, if there is none, without waiting for it.

        Raises
        ------
        OSError
            If the system has no process or descriptor left.
        """
        if self._process is not None:
            return
        ours, theirs = socket.socketpair()
        with theirs:
            # Also for a process that hangs in the middle of an answer.
            seconds, fraction = divmod(self._timeout_s, 1)
            timeval = struct.pack("ll", int(seconds), int(fraction * 1e6))
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeval)
            connection = Connection(ours.detach())
            try:
                self._process = subprocess.Popen(
                    # -P: modules in the working directory are not imported.
                    [sys.executable, "-P", "-m", "lungwatch.daemon.pipeline.sandbox"],
                    stdin=theirs.fileno(),
                    stdout=subprocess.DEVNULL,
                    # A codec's complaints, and a traceback, may quote the file.
                    stderr=subprocess.DEVNULL,
                    env=_environment(),
                )
            except OSError:
                connection.close()
                raise
        if self._niceness:
            with contextlib.suppress(OSError):  # it has ended already
                os.setpriority(os.PRIO_PROCESS, self._process.pid, self._niceness)
        # On receipt the process begins to import its libraries.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.send(self._setup)
        self._connection = connection
        self._decoded, self._is_ready = 0, False

    def decode(self, descriptor: int) -> Decoded:
        """Decode an open file.

        Parameters
        ----------
        descriptor
            Open for reading. The process gets an opening of its own of the same file, for reading
            alone, with an offset of its own: it can neither write to the file nor move the
            daemon's offset.

        Raises
        ------
        FileRejected
            If it is no usable chest X-ray.
        ProcessingFailed
            If decoding crashed, hung or took too much memory, in a fresh process too.
        OSError
            If the file cannot be read or no process started.
        TransientError
            If the process does not start, or another program killed it.
        """
        if self._decoded >= FILES_PER_PROCESS:
            self._replace("worn_out")
        for is_fresh in (self._decoded == 0, True):
            try:
                return self._ask(descriptor)
            except (_DecoderDied, OutOfMemory) as error:
                self._replace(_cause(error))
                # A file before this one may have broken a used process; a fresh one is tried.
                if is_fresh:
                    raise _explained(error) from None
        raise AssertionError("the loop returns or raises")

    def close(self) -> None:
        """End the process, whatever it is doing."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        if self._process is not None:
            self._process.kill()
            # One that waits for a dead server's disk cannot be killed.
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_KILL_TIMEOUT_S)
            self._process = None

    def _ask(self, descriptor: int) -> Decoded:
        connection = self._ready()
        with _opened_again(descriptor) as passed:
            try:
                return self._answer(connection, passed)
            finally:
                self._decoded += 1

    def _answer(self, connection: Connection, descriptor: int) -> Decoded:
        try:
            assert self._process is not None
            send_handle(connection, descriptor, self._process.pid)
            _await(connection, self._timeout_s)
            answer = receive(connection, self._setup)
        except BlockingIOError:
            self._replace("timed_out")
            raise ProcessingFailed(
                Reason.DECODER_TIMED_OUT, f"decoding took longer than {self._timeout_s:g} s"
            ) from None
        except (EOFError, BrokenPipeError, ConnectionResetError):
            raise _DecoderDied(self._status()) from None
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise _DecoderDied(None) from error
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _ready(self) -> Connection:
        """Return the channel to a process that is waiting for a file."""
        self.start()
        assert self._connection is not None
        if self._is_ready:
            return self._connection
        try:
            _await(self._connection, _START_TIMEOUT_S)
            self._connection.recv_bytes(len(READY))
        except (EOFError, OSError):
            status = self._status()
            self._replace("not_started")
            raise TransientError(f"the decoder's process did not start (status {status})") from None
        self._is_ready = True
        return self._connection

    def _replace(self, reason: str) -> None:
        """End the process; the next file gets another one."""
        self.close()
        level = logging.INFO if reason == "worn_out" else logging.WARNING
        event("decoder_replaced", level=level, reason=reason)

    def _status(self) -> int | None:
        assert self._process is not None
        try:
            return self._process.wait(_KILL_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            return None


@contextlib.contextmanager
def _opened_again(descriptor: int) -> Iterator[int]:
    """Give another opening of an open file, for reading alone, as long as the context lasts."""
    if sys.platform == "linux":
        # Not a duplicate, which shares the offset, the flags and the right to write.
        again = os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY | os.O_CLOEXEC)
    else:
        again = os.dup(descriptor)
    try:
        yield again
    finally:
        os.close(again)


def _environment() -> dict[str, str]:
    """Return the environment of a decoding process: no passwords, no names of sockets."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name in _KEPT or name.startswith(_KEPT_PREFIXES)
    }
    # The processes run in parallel; threads of libraries only cost address space.
    return kept | dict.fromkeys(_ONE_THREAD, "1")


def _await(connection: Connection, timeout_s: float) -> None:
    """Wait until there is something to receive."""
    if not connection.poll(timeout_s):
        raise BlockingIOError


def _cause(error: _DecoderDied | OutOfMemory) -> str:
    """Return the short name of what ended a process, for log and metrics."""
    if isinstance(error, OutOfMemory) or error.status == errno.ENOMEM:
        return "out_of_memory"
    if error.status == -signal.SIGSYS:
        return "forbidden_call"
    return "killed" if error.status == -signal.SIGKILL else "crashed"


def _explained(error: _DecoderDied | OutOfMemory) -> ProcessingFailed | TransientError:
    if isinstance(error, OutOfMemory):
        return error
    status = error.status
    if status == errno.ENOMEM:
        return OutOfMemory()
    if status == -signal.SIGKILL:
        # No codec does that: the kernel, out of memory, or an administrator.
        return TransientError("another program killed the decoder; is memory running out?")
    if status is None:
        what = "gave an invalid answer"
    elif status < 0:
        what = f"died of {signal.Signals(-status).name}"
    else:
        what = f"ended with status {status}"
    return ProcessingFailed(Reason.DECODER_CRASHED, f"the decoder {what}")
