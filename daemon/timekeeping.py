"""Trust in the system clock: comparison of its time with what cannot jump and what was recorded.

Removal by age is as right as the clock. A reading of it is kept in the database beside the
kernel's time since boot, which nobody sets. Within one boot, both must have advanced alike since
then; across boots the clock may have advanced by no more than a stated pause. Without a reading,
the newest recorded time takes its place. Each run of retention renews the reading.
"""

import os
import time
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from pathlib import Path

from sqlalchemy import Engine

from lungwatch.db.removals import Reading, last_reading, newest_time

TOLERANCE = timedelta(hours=1)
"""Difference that the clock is allowed: what setting it right takes in ordinary operation."""

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class ClockProblem(StrEnum):
    """Reason code of a clock that removals cannot rely on."""

    AHEAD = "clock_ahead"
    BEHIND = "clock_behind"


@dataclass(frozen=True, kw_only=True)
class ClockDoubt:
    """Why the clock is not trusted.

    Attributes
    ----------
    detail
        One line: what was compared with what.
    """

    problem: ClockProblem
    detail: str


def read_clock(now: datetime) -> Reading:
    """Return the system clock's time beside the kernel's own.

    The boot's ID comes from the environment (``BOOT_ID``, which the units set) where a sandbox
    hides it; empty where neither tells.
    """
    try:
        boot_id = _BOOT_ID.read_text(encoding="ascii").strip()
    except OSError:
        boot_id = os.environ.get("BOOT_ID", "")
    return Reading(
        at=now,
        boot_id=boot_id.replace("-", "")[:32],
        boottime_s=time.clock_gettime(time.CLOCK_BOOTTIME),
    )


def doubt_of(
    present: Reading, last: Reading | None, newest: datetime | None, *, max_pause: timedelta
) -> ClockDoubt | None:
    """Compare a reading of the clock with the last one.

    Parameters
    ----------
    present, last
        The reading now, and the one that was kept; None if there is none.
    newest
        The newest time that the database holds; asked only where there is no last reading.
    max_pause
        How far the clock may have advanced while the machine was off, or nothing was recorded.

    Returns
    -------
    ClockDoubt or None
        None if the clock may be relied on.
    """
    if last is None and newest is None:
        return None
    since = last.at if last is not None else newest
    assert since is not None
    passed = present.at - since
    name = "the last reading of the clock" if last is not None else "the newest record"
    said = f"the system clock says {_text(present.at)}, {name} is of {_text(since)}"
    if last is not None and _is_same_boot(present, last):
        expected = timedelta(seconds=present.boottime_s - last.boottime_s)
        said += f", and {_span(expected)} have passed since"
        least, most = expected - TOLERANCE, expected + TOLERANCE
    else:
        said += f"; up to {_span(max_pause)} may pass unrecorded"
        least, most = -TOLERANCE, max(max_pause, TOLERANCE)
    if passed > most:
        return ClockDoubt(problem=ClockProblem.AHEAD, detail=said)
    if passed < least:
        return ClockDoubt(problem=ClockProblem.BEHIND, detail=said)
    return None


def _is_same_boot(present: Reading, last: Reading) -> bool:
    # Without an ID it is not known, and the rule for another boot holds.
    same = bool(present.boot_id) and present.boot_id == last.boot_id
    return same and present.boottime_s >= last.boottime_s


def check_clock(engine: Engine, present: Reading, max_pause: timedelta) -> ClockDoubt | None:
    """Compare a reading of the clock with what the database holds; nothing is written.

    Raises
    ------
    DatabaseError
        If the database cannot be read.
    """
    last = last_reading(engine)
    newest = newest_time(engine) if last is None else None
    return doubt_of(present, last, newest, max_pause=max_pause)


def _text(at: datetime) -> str:
    return at.strftime("%Y-%m-%d %H:%M UTC")


def _span(span: timedelta) -> str:
    hours = span.total_seconds() / 3600
    return f"{hours / 24:.1f} days" if hours >= 48 else f"{hours:.1f} h"
