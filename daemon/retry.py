"""Clock, retry of steps that a lasting fault stops, and shutdown."""

import errno
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from enum import StrEnum
from typing import Protocol, TypeVar

from lungwatch.daemon.logs import event
from lungwatch.db.engine import DatabaseBusyError, DatabaseFullError
from lungwatch.errors import LungwatchError, describe


class Clock(Protocol):
    """What the daemon asks of a clock."""

    def now(self) -> datetime:
        """Return the wall-clock time, aware, in UTC. It may jump."""

    def monotonic(self) -> float:
        """Return seconds that never jump, from an arbitrary start."""


class SystemClock:
    """The machine's own clock."""

    def now(self) -> datetime:
        """Return the wall-clock time, aware, in UTC."""
        return datetime.now(UTC)

    def monotonic(self) -> float:
        """Return `time.monotonic()`."""
        return time.monotonic()


_FIRST_DELAY_S = 0.5

_MAX_DELAY_S = 5.0


T = TypeVar("T")


class OutageKind(StrEnum):
    """What lasts."""

    SPACE = "space"
    READ_ONLY = "read_only"
    DATABASE = "database"
    DROP_FOLDER = "drop_folder"


# The log's actions at the beginning and at the end.
ACTIONS = {
    OutageKind.SPACE: ("short_of_space", "space_back"),
    OutageKind.READ_ONLY: ("read_only", "writable_again"),
    OutageKind.DATABASE: ("database_away", "database_back"),
    OutageKind.DROP_FOLDER: ("drop_folder_lost", "drop_folder_back"),
}

_BY_ERRNO = {
    errno.ENOSPC: OutageKind.SPACE,
    errno.EDQUOT: OutageKind.SPACE,
    errno.EROFS: OutageKind.READ_ONLY,
}


class ShutdownRequested(LungwatchError):  # noqa: N818 - an order, which no thread answers for
    """The service ends while a trouble lasts; the next start goes on with the file."""


def outage_of(error: Exception) -> OutageKind | None:
    """Return the lasting trouble that an error is a sign of, None if it is of none."""
    if isinstance(error, DatabaseFullError):
        return OutageKind.SPACE
    if isinstance(error, DatabaseBusyError):
        return OutageKind.DATABASE
    if isinstance(error, OSError):
        return _BY_ERRNO.get(error.errno or 0)
    return None


class Outages:
    """Which troubles last just now, and the waiting for their end. For all threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: Counter[OutageKind] = Counter()
        self._abandoned = threading.Event()
        self._cut_short = False

    @property
    def current(self) -> frozenset[OutageKind]:
        """The troubles that somebody is waiting for the end of."""
        with self._lock:
            return frozenset(+self._waiting)

    @property
    def is_abandoned(self) -> bool:
        """Whether waiting has been given up, since the service ends."""
        return self._abandoned.is_set()

    def abandon(self) -> None:
        """Give up all waiting: each step is tried once more at most."""
        self._abandoned.set()

    def ride_out(self, step: Callable[[], T]) -> T:
        """Run a step, again and again for as long as a lasting trouble stops it.

        Parameters
        ----------
        step
            Must be fit to be repeated after an error.

        Raises
        ------
        Abandoned
            If the service ends first.
        Exception
            Whatever else the step raises.
        """
        met: set[OutageKind] = set()
        delay_s = _FIRST_DELAY_S
        try:
            while True:
                if self._cut_short:
                    raise ShutdownRequested
                try:
                    return step()
                except Exception as error:
                    kind = outage_of(error)
                    if kind is None:
                        raise
                    if kind not in met:
                        met.add(kind)
                        self.begin(kind, describe(error))
                    if self._abandoned.wait(delay_s):
                        # The others need not find out each for themselves.
                        self._cut_short = True
                        raise ShutdownRequested from error
                delay_s = min(2 * delay_s, _MAX_DELAY_S)
        finally:
            for kind in met:
                self.end(kind)

    def begin(self, kind: OutageKind, why: str) -> None:
        """Note a trouble; says so unless it is known."""
        with self._lock:
            self._waiting[kind] += 1
            is_first = self._waiting[kind] == 1
        if is_first:
            event(ACTIONS[kind][0], level=logging.WARNING, error=why)

    def end(self, kind: OutageKind) -> None:
        """Note that one who met a trouble goes on; says so if it was the last."""
        with self._lock:
            self._waiting[kind] -= 1
            is_last = self._waiting[kind] == 0
        if is_last and not self.is_abandoned:
            event(ACTIONS[kind][1], level=logging.WARNING)
