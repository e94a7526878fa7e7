"""Named places at which a test can have the process killed, as by power loss.

Recovery is only proved by crashing: `LUNGWATCH_CRASH_AT=recorded` ends the process, with no
clean-up whatever, the first time that it gets there. Without the variable it costs a
dictionary look-up. `LUNGWATCH_HANG_AT` has the thread that gets there wait for ever.
"""

import os
import signal
import threading
from typing import Literal, get_args

CrashPoint = Literal[
    "renamed",
    "claimed",
    "unpacked",
    "decoded",
    "classified",
    "overlaid",
    "recorded",
    "filed",
    "rejected",
    "quarantined",
    "own_object",
    "packed",
    "stored",
]
RestorePoint = Literal[
    "restore_marked",
    "restore_copied",
    "restore_kept",
    "restore_parted",
    "restore_replaced",
]
CRASH_POINTS: tuple[CrashPoint, ...] = get_args(CrashPoint)


def crashpoint(name: CrashPoint | RestorePoint) -> None:
    """Kill this process, or hang this thread, if the environment asks for it at this point."""
    if os.environ.get("LUNGWATCH_CRASH_AT") == name:
        os.kill(os.getpid(), signal.SIGKILL)
    if os.environ.get("LUNGWATCH_HANG_AT") == name:
        threading.Event().wait()
