"""The reader of the log stalls."""

import fcntl
import os
import signal
import subprocess
from typing import ClassVar

from chaos.fault import RepeatedFault, Trial
from chaos.place import ChaosError, Place
from tests.support.pictures import picture
from tests.support.processes import COMMAND
from tests.support.waits import PATIENCE_S

_FILES = 40
_PIPE_BYTES = 4096


class StalledLog(RepeatedFault):
    """Standard error is a pipe that is full, and nobody reads it."""

    name: ClassVar[str] = "stalled log"
    how: ClassVar[str] = "standard error is a pipe of 4 KiB that nobody reads, until the stop too"
    runs: ClassVar[tuple[int, int]] = (2, 6)

    def _trial(self, place: Place, run: int) -> Trial:
        """Drop some files, see them to their ends, and stop the daemon."""
        for number in range(run * 1000, run * 1000 + _FILES):
            place.drop(f"{number}.png", picture(number))
        reader, writer = os.pipe()
        fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        process = subprocess.Popen(
            [COMMAND, "run", "--home", str(place.root)],
            env=place.environment({}),
            cwd=place.root.parent,
            stdout=subprocess.DEVNULL,
            stderr=writer,
        )
        os.close(writer)
        try:
            place.wait_for(lambda: not place.waiting(), "the work stopped")
            process.send_signal(signal.SIGTERM)
            if status := process.wait(PATIENCE_S):
                raise ChaosError(f"status {status} after SIGTERM")
        finally:
            process.kill()
            process.wait()
            os.close(reader)
        return Trial(audit=place.audit(), injected=1)
