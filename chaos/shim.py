"""The preloaded library (shim.c): compiled here, steered by a file that both sides map."""

import mmap
import shutil
import struct
import subprocess
from pathlib import Path

from chaos.place import ChaosError, Place

_SOURCE = Path(__file__).with_name("shim.c")
# struct control in shim.c
_CONTROL = struct.Struct("=qiiiiiIIIII")
DAY_NS = 86_400 * 10**9


def obstacle() -> str | None:
    """Why the library cannot be had; None if it can."""
    return None if shutil.which("cc") else "needs a C compiler (cc)"


class Shim:
    """The library for one home, and what it is to do.

    Attributes
    ----------
    log
        Where the calls are recorded, if they are.
    """

    def __init__(self, place: Place, *, is_recording: bool = False) -> None:
        folder = place.root.parent / f"{place.root.name}-shim"
        folder.mkdir(exist_ok=True)
        library = folder / "shim.so"
        built = subprocess.run(
            ["cc", "-O1", "-shared", "-fPIC", "-o", library, _SOURCE, "-ldl", "-lpthread"],
            capture_output=True,
            text=True,
            check=False,
        )
        if built.returncode:
            raise ChaosError(f"the library does not compile: {built.stderr[-300:]}")
        control = folder / "control"
        control.write_bytes(bytes(_CONTROL.size))
        with control.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), _CONTROL.size)
        self.log = folder / "calls"
        self.env = {
            "LD_PRELOAD": str(library),
            "CHAOS_CONTROL": str(control),
            "CHAOS_HOME": str(place.root.resolve()),
        }
        if is_recording:
            self.env["CHAOS_LOG"] = str(self.log)

    def set(
        self,
        *,
        clock_shift_ns: int = 0,
        error: int = 0,
        every: int = 0,
        no_inotify: int = 0,
        spare_sqlite: bool = False,
        starve: int = 0,
    ) -> None:
        """Say what goes wrong from now on; without arguments nothing does.

        Parameters
        ----------
        clock_shift_ns
            Added to the time of day.
        error, every
            The errno that every so many-th call on the home's files fails with.
        no_inotify
            The errno that inotify is refused with.
        spare_sqlite
            Leave the database's own files alone.
        starve
            Every so many-th allocation of 16 KiB or more is refused.
        """
        self._map[:] = _CONTROL.pack(
            *(clock_shift_ns, error, every, no_inotify, int(spare_sqlite), starve), *(0,) * 5
        )

    @property
    def failed(self) -> int:
        """How many calls have failed since the last `set`."""
        return int(_CONTROL.unpack(self._map[:])[-3])

    @property
    def shifted(self) -> int:
        """How often a moved clock has been read since the last `set`."""
        return int(_CONTROL.unpack(self._map[:])[-2])

    @property
    def no_memory(self) -> int:
        """How many allocations have been refused since the last `set`."""
        return int(_CONTROL.unpack(self._map[:])[-1])
