"""Decoders that fail in earnest, for tests.

With `LUNGWATCH_TEST_DECODER` in the environment, a file that ends in one of the marks has its
decoder do what a broken codec does. Read in the decoding process alone.
"""

import ctypes
import os
import time
from pathlib import Path

_MARK = b"lungwatch-test-decoder:"
_TAIL_BYTES = 64


def poison(fault: str) -> bytes:
    """Return what to append to a file: for "segfault", "hang" or "memory"."""
    return _MARK + fault.encode()


def strike(path: Path) -> None:
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
