"""Steps that fail or hang: retry, back-off, outages, time limits, shutdown; and the clock.

A full disk or a database out of reach would cost every file in turn if each gave up after its own
few tries. A step that meets such an outage is repeated until it is over; nothing new is claimed
meanwhile. A transient error of one file is retried a few times.
"""

import errno
import itertools
import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import Future
from datetime import UTC, datetime
from enum import StrEnum
from typing import Generic, Protocol, TypeVar

from lungwatch.daemon.logs import event
from lungwatch.db.engine import DatabaseBusyError, DatabaseFullError, DatabaseReplacedError
from lungwatch.errors import (
    LungwatchError,
    ProcessingFailed,
    Reason,
    TransientError,
    describe,
)

_FIRST_DELAY_S = 0.5
_MAX_OUTAGE_DELAY_S = 5.0
# 2**64 times any first delay is beyond every limit; the power itself must not grow for ever.
_MAX_DOUBLINGS = 64
# Errors of a busy or remote file system that pass by themselves.
_TRANSIENT = {
    errno.EAGAIN,
    errno.EBUSY,
    errno.EIO,
    errno.EINTR,
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOMEM,
    errno.ESTALE,
    errno.ETIMEDOUT,
}
K = TypeVar("K", bound=Hashable)
T = TypeVar("T")


class Clock(Protocol):
    """A clock, passed in so that tests need not wait."""

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


def delay_s(failures: int, *, first_s: float = _FIRST_DELAY_S, most_s: float) -> float:
    """Return the seconds to wait after so many failures in a row, at least 1.

    `first_s` after the first failure, twice as long after each further one, up to `most_s`.
    """
    if failures < 1:
        raise ValueError("no delay is defined before the first failure")
    return min(first_s * 2.0 ** min(failures - 1, _MAX_DOUBLINGS), most_s)


def retries_wait_s(retries: int) -> float:
    """Return an upper bound of the seconds that so many retries of a file wait between tries."""
    return _FIRST_DELAY_S * 2.0**retries


class Backoff(Generic[K]):
    """Keys that failed, each with its failures in a row and the time of its next try.

    Times are seconds of one clock, monotonic or since the epoch.
    """

    def __init__(self, *, first_s: float = _FIRST_DELAY_S, most_s: float) -> None:
        self._first_s = first_s
        self._most_s = most_s
        self._failures: dict[K, int] = {}
        self._due_s: dict[K, float] = {}

    def is_due(self, key: K, now_s: float) -> bool:
        """Tell whether a key may be tried."""
        due_s = self._due_s.get(key, now_s)
        # A wall clock that was set back must not delay a key until it has caught up.
        return now_s >= due_s or due_s - now_s > self._most_s

    def failed(self, key: K, now_s: float) -> float:
        """Note a failure; return the seconds until the next try."""
        self._failures[key] = self._failures.get(key, 0) + 1
        wait_s = self.delay_s(self._failures[key])
        self._due_s[key] = now_s + wait_s
        return wait_s

    def failures(self, key: K) -> int:
        """Return a key's failures in a row."""
        return self._failures.get(key, 0)

    def __iter__(self) -> Iterator[K]:
        """Iterate over the keys that failed, as they are now."""
        return iter(tuple(self._failures))

    def succeeded(self, key: K) -> None:
        """Forget a key's failures."""
        self._failures.pop(key, None)
        self._due_s.pop(key, None)

    def delay_s(self, failures: int) -> float:
        """Return the seconds to wait after so many failures in a row."""
        return delay_s(failures, first_s=self._first_s, most_s=self._most_s)


class OutageKind(StrEnum):
    """Kinds of outage."""

    SPACE = "space"
    READ_ONLY = "read_only"
    DATABASE = "database"
    DATABASE_REPLACED = "database_replaced"
    DROP_FOLDER = "drop_folder"


# The log's actions at the beginning and at the end.
ACTIONS = {
    OutageKind.SPACE: ("short_of_space", "space_back"),
    OutageKind.READ_ONLY: ("read_only", "writable_again"),
    OutageKind.DATABASE: ("database_away", "database_back"),
    OutageKind.DATABASE_REPLACED: ("database_replaced", "database_right_again"),
    OutageKind.DROP_FOLDER: ("drop_folder_lost", "drop_folder_back"),
}
_BY_ERRNO = {
    errno.ENOSPC: OutageKind.SPACE,
    errno.EDQUOT: OutageKind.SPACE,
    errno.EROFS: OutageKind.READ_ONLY,
}


class ShutdownRequested(LungwatchError):  # noqa: N818 - an order, which no thread answers for
    """The service stops while a step waits for its retry; its file stays claimed."""


def outage_of(error: Exception) -> OutageKind | None:
    """Return the outage that an error is a sign of; None if it is of none."""
    if isinstance(error, DatabaseFullError):
        return OutageKind.SPACE
    if isinstance(error, DatabaseReplacedError):
        return OutageKind.DATABASE_REPLACED
    if isinstance(error, DatabaseBusyError):
        return OutageKind.DATABASE
    if isinstance(error, OSError):
        return _BY_ERRNO.get(error.errno or 0)
    return None


class Outages:
    """The outages that last, the retry of steps that meet them, and shutdown. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: Counter[OutageKind] = Counter()
        self._shutdown = threading.Event()
        self._fails_fast = False

    @property
    def current(self) -> frozenset[OutageKind]:
        """The outages that last."""
        with self._lock:
            return frozenset(+self._waiting)

    @property
    def is_shut_down(self) -> bool:
        """True once the service stops, so that no step waits for a retry."""
        return self._shutdown.is_set()

    def shut_down(self) -> None:
        """End all waiting: each step is tried once more at most."""
        self._shutdown.set()

    def wait_out(self, step: Callable[[], T]) -> T:
        """Run a step, again and again while an outage stops it.

        Parameters
        ----------
        step
            Must be fit to be repeated after an error.

        Raises
        ------
        ShutdownRequested
            If the service stops first.
        Exception
            Whatever else the step raises.
        """
        met: set[OutageKind] = set()
        try:
            for failures in itertools.count(1):
                if self._fails_fast:
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
                    if self._shutdown.wait(delay_s(failures, most_s=_MAX_OUTAGE_DELAY_S)):
                        # The other threads need not meet the outage each for itself.
                        self._fails_fast = True
                        raise ShutdownRequested from error
            raise AssertionError("the loop returns or raises")
        finally:
            for kind in met:
                self.end(kind)

    def retry(
        self, step: Callable[[], T], *, retries: int, sha256: str, on_wait: Callable[[], None]
    ) -> T:
        """Run a step of a file's processing; transient errors are retried, outages waited out.

        Parameters
        ----------
        step
            Must be fit to be repeated after an error.
        retries
            How often a transient error is retried.
        sha256
            Of the file, for the log.
        on_wait
            Called before each wait.

        Raises
        ------
        ShutdownRequested
            If the service stops first.
        ProcessingFailed
            With `RETRIES_EXHAUSTED`, if the last retry fails too.
        Exception
            Whatever else the step raises.
        """
        for failures in itertools.count(1):
            try:
                return self.wait_out(step)
            except (OSError, TransientError) as error:
                if isinstance(error, OSError) and error.errno not in _TRANSIENT:
                    raise
                if failures > retries:
                    raise ProcessingFailed(
                        Reason.RETRIES_EXHAUSTED, f"retries exhausted: {describe(error)}"
                    ) from error
                wait_s = delay_s(failures, most_s=math.inf)
                event("retry", sha256, level=logging.WARNING, error=describe(error), wait_s=wait_s)
                on_wait()
                if self._shutdown.wait(wait_s):
                    raise ShutdownRequested from error
        raise AssertionError("the loop returns or raises")

    def begin(self, kind: OutageKind, why: str) -> None:
        """Note an outage; logged unless it is known."""
        with self._lock:
            self._waiting[kind] += 1
            is_first = self._waiting[kind] == 1
        if is_first:
            event(ACTIONS[kind][0], level=logging.WARNING, error=why)

    def end(self, kind: OutageKind) -> None:
        """Note that a step that met an outage continues; logged if it was the last one."""
        with self._lock:
            self._waiting[kind] -= 1
            is_last = self._waiting[kind] == 0
        if is_last and not self.is_shut_down:
            event(ACTIONS[kind][1], level=logging.WARNING)


class TimeLimited(Generic[T]):
    """A call that may hang, such as one to a locked database, made on a thread of its own.

    While one hangs no second is made: later callers wait for the same answer, so that hanging
    threads cannot accumulate. Thread-safe.

    Parameters
    ----------
    ask
        May hang and may raise.
    limit_s
        Seconds to wait.
    """

    def __init__(self, ask: Callable[[], T], *, limit_s: float) -> None:
        self._ask = ask
        self._limit_s = limit_s
        self._lock = threading.Lock()
        self._answer: Future[T] | None = None

    def __call__(self) -> T:
        """Return the answer.

        Raises
        ------
        TimeoutError
            If there is none in time.
        Exception
            Whatever the call raises.
        """
        with self._lock:
            answer = self._answer
            if answer is None or answer.done():
                answer = self._answer = Future()
                # A daemon thread: one that hangs must not keep the process.
                threading.Thread(
                    target=answer_future, args=(self._ask, answer), name="time-limited", daemon=True
                ).start()
        return answer.result(self._limit_s)


def answer_future(ask: Callable[[], T], future: "Future[T]") -> None:
    """Set a future to what a call returns or raises."""
    try:
        future.set_result(ask())
    # The caller decides what the error means; the thread continues.
    except Exception as error:
        future.set_exception(error)
