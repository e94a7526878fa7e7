"""A group of processes with little memory: what passes the limit is killed by the kernel.

Control groups of both versions are known: v1 as a `memory` hierarchy, v2 as the unified one.
"""

import contextlib
import os
from pathlib import Path
from typing import Self

_V1 = Path("/sys/fs/cgroup/memory")
_V2 = Path("/sys/fs/cgroup")


def obstacle() -> str | None:
    """Why no such group can be made; None if one can."""
    if os.geteuid() != 0:
        return "needs root, to make a control group"
    try:
        with MemoryGroup("obstacle"):
            return None
    except OSError as error:
        return f"no control group with a memory limit can be made here: {error.strerror}"


class MemoryGroup:
    """A control group; inside the ``with`` it is there."""

    def __init__(self, name: str) -> None:
        self._is_v1 = (_V1 / "memory.limit_in_bytes").exists()
        base = _V1 if self._is_v1 else _V2
        self._folder = base / f"lungwatch-chaos-{os.getpid()}-{name}"

    def __enter__(self) -> Self:
        self._folder.mkdir()
        if not self._limit_file.exists():
            self._folder.rmdir()
            raise OSError(0, "the memory controller is not given to it")
        return self

    def __exit__(self, *_: object) -> None:
        self.limit(None)
        with contextlib.suppress(OSError):  # somebody lives in it still
            self._folder.rmdir()

    def add(self, pid: int) -> None:
        """Take in a process, and with it what it will start."""
        (self._folder / "cgroup.procs").write_text(str(pid))

    def limit(self, size: int | None) -> None:
        """Allow so many bytes; None for as many as there are."""
        unlimited = "-1" if self._is_v1 else "max"
        self._limit_file.write_text(unlimited if size is None else str(size))

    @property
    def anonymous(self) -> int:
        """Bytes that cannot be dropped, caches not counted."""
        key = "total_rss" if self._is_v1 else "anon"
        return self._number("memory.stat", key)

    @property
    def kills(self) -> int:
        """How many of its processes the kernel has killed for want of memory."""
        return self._number("memory.oom_control" if self._is_v1 else "memory.events", "oom_kill")

    @property
    def _limit_file(self) -> Path:
        return self._folder / ("memory.limit_in_bytes" if self._is_v1 else "memory.max")

    def _number(self, file: str, key: str) -> int:
        lines = (line.split() for line in (self._folder / file).read_text().splitlines())
        return next(int(value) for name, value in lines if name == key)
