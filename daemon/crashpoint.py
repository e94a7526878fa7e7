"""Named places at which a test can have the process killed, as by power loss.

Recovery is only proved by crashing: `LUNGWATCH_CRASH_AT=recorded` ends the process, with no
clean-up whatever, the first time that it gets there. Without the variable it costs a
dictionary look-up.
"""

import os
import signal
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
]
CRASH_POINTS: tuple[CrashPoint, ...] = get_args(CrashPoint)


def crashpoint(name: CrashPoint) -> None:
    """Kill this process if the environment asks for it at this point."""
    if os.environ.get("LUNGWATCH_CRASH_AT") == name:
        os.kill(os.getpid(), signal.SIGKILL)
