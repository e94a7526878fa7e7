"""Trust in the system clock: comparison of its time with what cannot jump and what was recorded.

Removal by age is as right as the clock. A reading of it is kept in the database beside the
kernel's time since boot, which nobody sets. Within one boot, both must have advanced alike since
then; across boots the clock may have advanced by no more than a stated pause. Without a reading,
the newest recorded time, or that of the newest filed file, takes its place. The daemon renews the
reading every few minutes, and each run of retention does, while nothing contradicts it.
"""

import logging
import os
import threading
import time
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from pathlib import Path

from sqlalchemy import Engine

from lungwatch.daemon.home import Home
from lungwatch.daemon.logs import event
from lungwatch.daemon.retry import Clock
from lungwatch.daemon.stage import OnCrash, Worker
from lungwatch.db.removals import Reading, last_reading, newest_time, save_reading
from lungwatch.errors import DatabaseError

TOLERANCE = timedelta(hours=1)
"""Difference that the clock is allowed: what setting it right takes in ordinary operation."""

_LOOK_S = 300.0
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


def check_clock(
    engine: Engine, home: Home, present: Reading, max_pause: timedelta
) -> ClockDoubt | None:
    """Compare a reading of the clock with what the database holds; nothing is written.

    Raises
    ------
    DatabaseError
        If the database cannot be read.
    """
    last = last_reading(engine)
    newest = None
    if last is None:
        times = (newest_time(engine), _newest_file_time(home))
        newest = max((at for at in times if at is not None), default=None)
    return doubt_of(present, last, newest, max_pause=max_pause)


def _newest_file_time(home: Home) -> datetime | None:
    """Return the newest time of a file in the newest folder of `done/`; None without one."""
    folders = [folder for folder in home.done.glob("*/*/*") if folder.is_dir()]
    times = []
    for path in max(folders).iterdir() if folders else ():
        try:
            status = path.stat()
        except FileNotFoundError:  # moved meanwhile
            continue
        # A copy may keep an old mtime, and a change of mode renews ctime.
        times.append(min(status.st_mtime, status.st_ctime))
    return datetime.fromtimestamp(max(times), UTC) if times else None


class ClockWatch:
    """Thread of the daemon that compares the system clock with its last reading, and renews that.

    A clock that contradicts it is logged once and shown by `/health`; the reading stays as it is,
    so that retention stops. The work goes on.
    """

    def __init__(
        self, engine: Engine, home: Home, *, max_pause: timedelta, clock: Clock, on_crash: OnCrash
    ) -> None:
        self._engine = engine
        self._home = home
        self._max_pause = max_pause
        self._clock = clock
        self._doubt: ClockDoubt | None = None
        self._stopped = threading.Event()
        self._thread = Worker("clock", self._run, on_crash)

    @property
    def doubts(self) -> dict[str, str]:
        """Why the clock is not trusted, by reason code; empty if it is."""
        doubt = self._doubt
        return {} if doubt is None else {doubt.problem.value: doubt.detail}

    def start(self) -> None:
        """Look once, then every few minutes on a thread of its own."""
        self.look()
        self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while not self._stopped.wait(_LOOK_S):
            self.look()

    def look(self) -> None:
        """Compare the clock with its last reading; renew the reading if they agree."""
        present = read_clock(self._clock.now())
        try:
            doubt = check_clock(self._engine, self._home, present, self._max_pause)
            if doubt is None:
                save_reading(self._engine, present)
        except DatabaseError:
            return  # the next look comes
        before, self._doubt = self._doubt, doubt
        if doubt is not None and before is None:
            event("clock_doubted", level=logging.ERROR, reason=doubt.problem, detail=doubt.detail)
        elif doubt is None and before is not None:
            event("clock_trusted", level=logging.WARNING)


def _text(at: datetime) -> str:
    return at.strftime("%Y-%m-%d %H:%M UTC")


def _span(span: timedelta) -> str:
    hours = span.total_seconds() / 3600
    return f"{hours / 24:.1f} days" if hours >= 48 else f"{hours:.1f} h"
