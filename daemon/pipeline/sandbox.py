"""The sandboxed decoding process: its confinement, its main loop, and faults for tests.

Started by `lungwatch.daemon.pipeline.decode` as ``python -m``, with the channel as its standard
input.
"""

import contextlib
import ctypes
import errno
import os
import resource
import signal
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path

_MIB = 1024 * 1024
# The numbers are Linux's own, for prctl.
_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS = 1, 38
# When memory runs out, the kernel kills a decoder rather than the daemon.
_OOM_SCORE_ADJ = 500


def detach() -> None:
    """Ignore signals that ask to stop, and die with the parent.

    A terminal's Ctrl-C and systemd's SIGTERM reach the whole group; the parent drains then,
    and needs its decoders meanwhile.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
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


def trigger_fault(path: Path) -> None:
    """Do what the file's mark says, if marks are asked for and it has one."""
    if "LUNGWATCH_TEST_DECODER" not in os.environ:
        return
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
        _, mark, fault = file.read().rpartition(_MARK)
    if not mark:
        return
    if fault == b"segfault":
        ctypes.string_at(0)
    elif fault == b"hang":
        while True:
            time.sleep(3600)
    elif fault == b"memory":
        hoard = []
        while True:
            hoard.append(bytearray(64 * 1024 * 1024))


def main() -> None:
    """Serve until the channel is closed."""
    detach()
    connection = Connection(replace_stdin())
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
    connection.send_bytes(READY)
    while True:
        path = Path(os.fsdecode(connection.recv_bytes()))
        try:
            trigger_fault(path)
            decoded = decode_file(
                path,
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


if __name__ == "__main__":
    try:
        main()
    except (EOFError, BrokenPipeError, ConnectionResetError):
        os._exit(0)  # the parent hung up
    except MemoryError:
        os._exit(errno.ENOMEM)
