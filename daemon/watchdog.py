"""Tells the service manager that work goes on, and keeps silent when it does not."""

import logging
import os
from collections.abc import Callable, Mapping

from lungwatch.daemon.clock import Clock
from lungwatch.daemon.logs import event
from lungwatch.daemon.notify import notify
from lungwatch.daemon.vitals import Stuck, Vitals

_PER_PERIOD = 3
_STATUS_S = 5.0


class Watchdog:
    """Feeds the manager's watchdog from the main loop, for as long as nothing is stuck.

    Silence has the manager kill and restart the service. What was in hand is taken up by the
    next process, as after any crash.

    Parameters
    ----------
    vitals
        The record of progress.
    clock
        Only its monotonic time is used.
    is_excused
        Whether something known, such as a full disk, makes everybody wait: a restart would
        not help, and time spent so is nobody's fault.
    dead
        The threads that should live and do not, by name.
    status
        One line for `systemctl status`, without patients' data.
    environ
        For WATCHDOG_USEC and WATCHDOG_PID; the process's own if None.
    """

    def __init__(
        self,
        *,
        vitals: Vitals,
        clock: Clock,
        is_excused: Callable[[], bool],
        dead: Callable[[], list[str]],
        status: Callable[[], str],
        environ: Mapping[str, str] | None = None,
    ) -> None:
        self._vitals = vitals
        self._clock = clock
        self._is_excused = is_excused
        self._dead = dead
        self._status = status
        self._period_s = _period_s(os.environ if environ is None else environ)
        self._fed_s = self._said_s = float("-inf")
        self._last_status = ""
        self._stuck: set[str] = set()

    def wait_s(self, most_s: float) -> float:
        """Return how long the main loop may sleep between two ticks."""
        return most_s if self._period_s is None else min(most_s, self._period_s)

    def tick(self) -> None:
        """Look at every stage, then feed the watchdog or not."""
        now_s = self._clock.monotonic()
        if self._is_excused():
            self._vitals.excuse(now_s)
        stuck = self._vitals.stuck(now_s)
        self._report(stuck)
        dead = self._dead()
        if stuck or dead:
            names = ", ".join([one.stage for one in stuck] + dead)
            self._say(f"no progress: {names}", now_s)
            return
        self._say(self._status(), now_s)
        if self._period_s is not None and now_s - self._fed_s >= self._period_s:
            self._fed_s = now_s
            notify("WATCHDOG=1")

    def _report(self, stuck: list[Stuck]) -> None:
        """Log each stage once when it sticks, and once when it goes on."""
        for one in stuck:
            if one.stage not in self._stuck:
                event("stuck", level=logging.ERROR, stage=one.stage, seconds=round(one.seconds))
        names = {one.stage for one in stuck}
        for stage in sorted(self._stuck - names):
            event("unstuck", level=logging.WARNING, stage=stage)
        self._stuck = names

    def _say(self, status: str, now_s: float) -> None:
        if status != self._last_status and now_s - self._said_s >= _STATUS_S:
            self._last_status, self._said_s = status, now_s
            notify(f"STATUS={status}")


def _period_s(environ: Mapping[str, str]) -> float | None:
    """Return the seconds between two signs of life; None if nobody expects any."""
    try:
        timeout_s = int(environ.get("WATCHDOG_USEC", "")) / 1e6
    except ValueError:
        return None
    # Set for another process, whose environment this one has inherited.
    if environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    return timeout_s / _PER_PERIOD
