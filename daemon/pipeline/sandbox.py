"""The sandboxed decoding process: its confinement, its main loop, and faults for tests.

Started by `lungwatch.daemon.pipeline.decode` as ``python -m``, with the channel as its standard
input.
"""

import codecs
import contextlib
import ctypes
import errno
import importlib
import io
import os
import resource
import runpy
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from lungwatch.daemon.pipeline.confinement import confine

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

Attacks = Mapping[bytes, Callable[[BinaryIO], None]]
# What character sets of DICOM are decoded with beside pydicom's table, and Python's own defaults.
_ENCODINGS = ("ascii", "latin-1", "utf-8", "utf-16", "cp1252", "idna", "unicode_escape")
_MIB = 1024 * 1024
# The numbers are Linux's own, for prctl.
_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS = 1, 38
# When memory runs out, the kernel kills a decoder rather than the daemon.
_OOM_SCORE_ADJ = 500


_NOT_CONFINED_STATUS = 77


def detach() -> None:
    """Ignore signals that are meant for the parent, and die with it.

    A terminal's Ctrl-C and systemd's SIGTERM reach the whole group; the parent drains then,
    and needs its decoders meanwhile.
    """
    for number in (
        signal.SIGINT,
        signal.SIGTERM,
        signal.SIGHUP,
        signal.SIGUSR1,
        signal.SIGUSR2,
    ):
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        prctl = ctypes.CDLL(None).prctl
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(str(_OOM_SCORE_ADJ))


def limit(memory_mb: int) -> None:
    """Bound the address space to `memory_mb` MiB; no core dumps, no writing to files."""
    _lower(resource.RLIMIT_CORE, 0)
    _lower(resource.RLIMIT_FSIZE, 0)
    _lower(resource.RLIMIT_AS, memory_mb * _MIB)


class _Received(io.RawIOBase):
    """A file by its descriptor alone: read with an offset of its own, and closed with it."""

    name = ""  # pydicom asks for it

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self._descriptor = descriptor
        self._size_bytes = os.lseek(descriptor, 0, os.SEEK_END)
        self._offset = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._offset, os.SEEK_END: self._size_bytes}[whence]
        if start + offset < 0:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        self._offset = start + offset
        return self._offset

    def readinto(self, buffer: "WriteableBuffer", /) -> int:
        count = os.preadv(self._descriptor, [buffer], self._offset)
        self._offset += count
        return count

    def readall(self) -> bytes:
        parts = []
        while part := os.pread(
            self._descriptor, max(self._size_bytes - self._offset, 1), self._offset
        ):
            self._offset += len(part)
            parts.append(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def close(self) -> None:
        if not self.closed:
            os.close(self._descriptor)
        super().close()


def _received(channel: socket.socket) -> int:
    """Wait for the descriptor of the next file."""
    _, descriptors, _, _ = socket.recv_fds(channel, 1, 1)
    if not descriptors:
        raise EOFError
    return descriptors[0]


def opened(descriptor: int) -> BinaryIO:
    """Return the file of a descriptor, which is closed with it."""
    return io.BufferedReader(_Received(descriptor))


def replace_stdin() -> int:
    """Return a new descriptor of what standard input is, and leave nothing to read there."""
    channel = os.dup(0)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    return channel


def _lower(kind: int, value: int) -> None:
    _, hard = resource.getrlimit(kind)
    if hard != resource.RLIM_INFINITY:
        value = min(value, hard)
    resource.setrlimit(kind, (value, value))


_MARK = b"lungwatch-test-decoder:"
_TAIL_BYTES = 64


def fault_mark(fault: str) -> bytes:
    """Return what to append to a file: for "segfault", "hang" or "memory"."""
    return _MARK + fault.encode()


def trigger_fault(file: BinaryIO, attacks: Attacks) -> None:
    """Do what the file's mark says, if it has one."""
    file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
    _, mark, fault = file.read().rpartition(_MARK)
    if not mark:
        return
    if fault == b"segfault":
        ctypes.string_at(0)
    elif fault in attacks:
        attacks[fault](file)
    elif fault == b"hang":
        while True:
            time.sleep(3600)
    elif fault == b"memory":
        hoard = []
        while True:
            hoard.append(bytearray(64 * 1024 * 1024))


def _test_attacks() -> Attacks | None:
    """Return what tests let a marked file do; None outside of tests.

    The variable names a Python file with `ATTACKS`; any other value asks for the faults alone.
    """
    value = os.environ.get("LUNGWATCH_TEST_DECODER")
    if value is None:
        return None
    attacks: Attacks = runpy.run_path(value)["ATTACKS"] if value.endswith(".py") else {}
    return attacks


def preload() -> None:
    """Import what decoding would import later, when no file can be opened any more."""
    import imagecodecs  # noqa: PLC0415
    import numpy.ma  # noqa: F401, PLC0415
    from PIL import Image  # noqa: PLC0415
    from pydicom import charset  # noqa: PLC0415

    from lungwatch.imaging.vocabulary import vocabulary  # noqa: PLC0415

    for module in ("_strptime", "numpy.ma"):
        importlib.import_module(module)
    vocabulary()
    Image.init()
    for name in ("jpeg8_decode", "jpeg2k_decode"):
        getattr(imagecodecs, name)
    for encoding in {*charset.python_encoding.values(), *_ENCODINGS}:
        with contextlib.suppress(LookupError):
            codecs.lookup(encoding)
    time.localtime()


def main() -> None:
    """Serve until the channel is closed."""
    detach()
    channel = socket.socket(fileno=replace_stdin())
    connection = Connection(channel.fileno())
    setup = connection.recv()
    limit(setup.memory_mb)

    # After limits and signals are set, since imports take time.
    import cv2  # noqa: PLC0415

    from lungwatch.daemon.pipeline.decode import (  # noqa: PLC0415
        READY,
        decode_file,
        send_decoded,
        send_error,
    )

    cv2.setNumThreads(1)
    attacks = _test_attacks()
    preload()
    if confine(channel.fileno()).missing and setup.require_sandbox:
        os._exit(_NOT_CONFINED_STATUS)
    connection.send_bytes(READY)
    while True:
        file = opened(_received(channel))
        try:
            if attacks is not None:
                trigger_fault(file, attacks)
            decoded = decode_file(
                file,
                policy=setup.policy,
                spec=setup.spec,
                overlay_side_px=setup.overlay_side_px,
                gate_spec=setup.gate_spec,
            )
        except Exception as error:  # every error is sent to the parent
            error.__traceback__ = None  # frees what its frames hold
            send_error(connection, error)
        else:
            send_decoded(connection, decoded)
        finally:
            file.close()


if __name__ == "__main__":
    try:
        main()
    except (EOFError, BrokenPipeError, ConnectionResetError):
        os._exit(0)  # the parent hung up
    except MemoryError:
        os._exit(errno.ENOMEM)
