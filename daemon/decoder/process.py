"""A decoder that may crash, hang or eat memory, and costs no more than the file."""

import contextlib
import logging
import os
import signal
import socket
import struct
import subprocess
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Self

from lungwatch.daemon.decoder import confinement
from lungwatch.daemon.decoder.wire import READY, OutOfMemory, Setup, receive
from lungwatch.daemon.decoding import Decoded
from lungwatch.daemon.logs import event
from lungwatch.errors import ProcessingFailed, Reason, TransientError

# What a codec leaks ends with its process.
FILES_PER_PROCESS = 1000
# Importing takes a third of a second on an idle machine.
_START_TIMEOUT_S = 60.0
_KILL_TIMEOUT_S = 5.0


class _Died(Exception):  # noqa: N818 - an event, which the caller interprets
    """The process is gone; `status` as `subprocess` gives it."""

    def __init__(self, status: int | None) -> None:
        super().__init__(status)
        self.status = status


class Decoder:
    """Owns one decoding process and replaces it when it dies, hangs or is worn out.

    For one thread: the process dies with the thread that started it.

    Parameters
    ----------
    setup
        For the process.
    timeout_s
        Seconds that one file may take.
    """

    def __init__(self, setup: Setup, *, timeout_s: float) -> None:
        self._setup = setup
        self._timeout_s = timeout_s
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._decoded = 0
        self._is_ready = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

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
            # A process that stops in the middle of an answer hangs, too.
            seconds, fraction = divmod(self._timeout_s, 1)
            timeval = struct.pack("ll", int(seconds), int(fraction * 1e6))
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeval)
            connection = Connection(ours.detach())
            try:
                self._process = subprocess.Popen(
                    # -P: whatever lies in the working directory is nobody's module.
                    [sys.executable, "-P", "-m", "lungwatch.daemon.decoder.child"],
                    stdin=theirs.fileno(),
                    stdout=subprocess.DEVNULL,
                    # A codec's complaints, and a traceback, may quote the file.
                    stderr=subprocess.DEVNULL,
                    env=confinement.environment(os.environ),
                )
            except OSError:
                connection.close()
                raise
        # With it the process begins to import, before there is a file for it.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.send(self._setup)
        self._connection = connection
        self._decoded, self._is_ready = 0, False

    def decode(self, path: Path) -> Decoded:
        """Decode a file.

        Raises
        ------
        FileRejected
            If it is no usable chest X-ray.
        ProcessingFailed
            If decoding crashed, hung or took too much memory, in a fresh process too.
        OSError
            If the file cannot be read, or no process be started.
        TransientError
            If the process does not start, or somebody else killed it.
        """
        if self._decoded >= FILES_PER_PROCESS:
            self._replace("worn_out")
        is_fresh = self._decoded == 0
        try:
            return self._ask(path)
        except (_Died, OutOfMemory) as error:
            self._replace(_cause(error))
            if is_fresh:
                raise _explained(error) from None
        # A file before this one may have been what broke the process.
        try:
            return self._ask(path)
        except (_Died, OutOfMemory) as error:
            self._replace(_cause(error))
            raise _explained(error) from None

    def close(self) -> None:
        """End the process, whatever it is doing."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        if self._process is not None:
            self._process.kill()
            # One that waits for a dead server's disk cannot be killed; it is left behind.
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_KILL_TIMEOUT_S)
            self._process = None

    def _ask(self, path: Path) -> Decoded:
        connection = self._ready()
        try:
            connection.send_bytes(os.fsencode(path))
            _await(connection, self._timeout_s)
            answer = receive(connection, self._setup)
        except BlockingIOError:
            self._replace("timed_out")
            raise ProcessingFailed(
                Reason.DECODER_TIMED_OUT, f"decoding took longer than {self._timeout_s:g} s"
            ) from None
        except (EOFError, BrokenPipeError, ConnectionResetError):
            raise _Died(self._status()) from None
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise _Died(None) from error
        finally:
            self._decoded += 1
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


def _await(connection: Connection, timeout_s: float) -> None:
    """Wait until there is something to receive."""
    if not connection.poll(timeout_s):
        raise BlockingIOError


def _cause(error: _Died | OutOfMemory) -> str:
    """Return the short name of what ended a process, for log and metrics."""
    if isinstance(error, OutOfMemory) or error.status == confinement.OUT_OF_MEMORY:
        return "out_of_memory"
    return "killed" if error.status == -signal.SIGKILL else "crashed"


def _explained(error: _Died | OutOfMemory) -> ProcessingFailed | TransientError:
    if isinstance(error, OutOfMemory):
        return error
    status = error.status
    if status == confinement.OUT_OF_MEMORY:
        return OutOfMemory()
    if status == -signal.SIGKILL:
        # No codec does that: the kernel, out of memory, or an administrator.
        return TransientError("the decoder was killed from outside; is memory running out?")
    if status is None:
        what = "answered nonsense"
    elif status < 0:
        what = f"died of {signal.Signals(-status).name}"
    else:
        what = f"ended with status {status}"
    return ProcessingFailed(Reason.DECODER_CRASHED, f"the decoder {what}")
