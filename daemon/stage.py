"""Worker threads, their progress and time limits, the limit of files in flight.

The database writer thread, and crash points for tests.
"""

import contextlib
import itertools
import os
import queue
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar, get_args

from lungwatch.daemon.config import Config
from lungwatch.daemon.retry import Clock, Outages, ShutdownRequested, SystemClock

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


T = TypeVar("T")


class TimeLimited(Generic[T]):
    """Asks on a thread of its own, and waits for the answer no longer than it may.

    One that hangs is not asked a second time: whoever comes meanwhile waits for the same
    answer, so that hanging threads cannot pile up. For all threads.

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
            Whatever asking raises.
        """
        with self._lock:
            answer = self._answer
            if answer is None or answer.done():
                answer = self._answer = Future()
                # A daemon thread: one that hangs must not keep the process.
                threading.Thread(target=self._run, args=(answer,), name="look", daemon=True).start()
        return answer.result(self._limit_s)

    def _run(self, answer: Future[T]) -> None:
        try:
            answer.set_result(self._ask())
        # Whoever waits decides what the error means.
        except Exception as error:
            answer.set_exception(error)


class Worker(threading.Thread):
    """Runs a function; an exception that escapes it is reported, not printed and forgotten.

    Parameters
    ----------
    name
        For the log.
    work
        Runs until it returns.
    on_crash
        Called with the thread's name and the exception. The service stops then: a daemon
        that has lost a stage must not go on taking files.
    """

    def __init__(
        self,
        name: str,
        work: Callable[[], None],
        on_crash: Callable[[str, BaseException], None],
    ) -> None:
        super().__init__(name=name, daemon=True)
        self._work = work
        self._on_crash = on_crash

    def run(self) -> None:
        """Run the work and report how it failed, if it did."""
        try:
            self._work()
        except ShutdownRequested:
            return  # the service ends; what is in hand stays claimed
        except BaseException as error:  # nothing may die unseen
            self._on_crash(self.name, error)


class InFlight:
    """A counted limit that can be waited on from both sides."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._count = 0
        self._ended = 0
        self._changed = threading.Condition()

    @property
    def count(self) -> int:
        """Files that hold a slot now."""
        with self._changed:
            return self._count

    @property
    def ended(self) -> int:
        """Files that have met their end so far."""
        with self._changed:
            return self._ended

    def acquire(self, timeout_s: float) -> bool:
        """Take a slot; False if none came free in time."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._count < self._limit, timeout_s):
                return False
            self._count += 1
            return True

    def release(self, *, ended: bool = True) -> None:
        """Give a slot back; its file has met its end, or is still where it was."""
        with self._changed:
            self._count -= 1
            self._ended += ended
            self._changed.notify_all()

    def wait_empty(self, timeout_s: float) -> bool:
        """Wait until no slot is held; False if that took too long."""
        with self._changed:
            return self._changed.wait_for(lambda: self._count == 0, timeout_s)


# A decoder is started and asked twice at most, and each time killed (see decoder.process).
_DECODER_S = 65.0

_OUTBOX_S = 900.0  # one association of many objects, each with the network's timeouts

DEFAULT_LIMIT_S = 300.0


@dataclass(frozen=True, kw_only=True)
class StuckStage:
    """A stage that makes no progress.

    Attributes
    ----------
    stage
        Its name, as given to `Vitals.busy`.
    seconds
        For how long.
    """

    stage: str
    seconds: float


@dataclass(frozen=True, kw_only=True)
class StageProgress:
    """One stage, for metrics and health.

    Attributes
    ----------
    busy
        Units of work that are being done.
    finished
        Units that were ended since the start, well or badly.
    waiting
        What stands in the stage's queue; 0 for a stage without one.
    oldest_s
        Seconds since the oldest unit of work last showed progress; 0 if nothing is being done.
    """

    busy: int
    finished: int
    waiting: int
    oldest_s: float


@dataclass(kw_only=True)
class _Unit:
    thread: int
    since_s: float


@dataclass(kw_only=True)
class _StageUnits:
    units: dict[int, _Unit] = field(default_factory=dict)
    finished: int = 0
    progress_s: float
    waiting: Callable[[], int] | None = None
    waiting_since_s: float | None = None


class Progress:
    """The record of progress. For all threads.

    Parameters
    ----------
    clock
        Only its monotonic time is used.
    limits
        Seconds that a stage may go without progress, by stage (see `limits_of`);
        `DEFAULT_LIMIT_S` for any other.

    Attributes
    ----------
    on_finished
        Called with the stage and the seconds of each unit of work that ends, on its thread.
    """

    def __init__(
        self,
        clock: Clock,
        limits: Mapping[str, float] | None = None,
    ) -> None:
        self._clock = clock
        self.on_finished: Callable[[str, float], None] | None = None
        self._limits = dict(limits or {})
        self._lock = threading.Lock()
        self._stages: dict[str, _StageUnits] = {}
        self._numbers = itertools.count()
        self._excused_s = clock.monotonic()

    @contextlib.contextmanager
    def busy(self, stage: str) -> Iterator[None]:
        """Do one unit of a stage's work inside; units of several threads may overlap."""
        number = next(self._numbers)
        with self._lock:
            now_s = self._clock.monotonic()
            unit = _Unit(thread=threading.get_ident(), since_s=now_s)
            self._stage(stage).units[number] = unit
        try:
            yield
        finally:
            with self._lock:
                kept = self._stage(stage)
                del kept.units[number]
                kept.finished += 1
                kept.progress_s = self._clock.monotonic()
            if self.on_finished is not None:
                self.on_finished(stage, self._clock.monotonic() - now_s)

    def beat(self, stage: str) -> None:
        """Say that this thread's unit of work goes on: its time begins anew.

        For a unit that is long by its nature, or that waits for others who are watched.
        """
        with self._lock:
            kept = self._stage(stage)
            kept.progress_s = self._clock.monotonic()
            for unit in kept.units.values():
                if unit.thread == threading.get_ident():
                    unit.since_s = kept.progress_s

    def watch_queue(self, stage: str, waiting: Callable[[], int]) -> None:
        """Have a stage's queue watched: what waits there must see something finished."""
        with self._lock:
            self._stage(stage).waiting = waiting

    def excuse(self, now_s: float) -> None:
        """Count no time before this one: something known kept everybody waiting."""
        with self._lock:
            self._excused_s = max(self._excused_s, now_s)

    def stuck(self, now_s: float) -> list[StuckStage]:
        """Return the stages that are over their limit at a monotonic time, by name."""
        with self._lock:
            found = []
            for name, stage in sorted(self._stages.items()):
                starts = [unit.since_s for unit in stage.units.values()]
                if stage.waiting is not None and stage.waiting() > 0:
                    if stage.waiting_since_s is None:
                        stage.waiting_since_s = now_s
                    starts.append(max(stage.waiting_since_s, stage.progress_s))
                else:
                    stage.waiting_since_s = None
                seconds = max((now_s - max(s, self._excused_s) for s in starts), default=0.0)
                if seconds > self._limits.get(name, DEFAULT_LIMIT_S):
                    found.append(StuckStage(stage=name, seconds=seconds))
            return found

    def snapshot(self) -> dict[str, StageProgress]:
        """Return every stage that has been heard of, by name."""
        with self._lock:
            now_s = self._clock.monotonic()
            return {
                name: StageProgress(
                    busy=len(stage.units),
                    finished=stage.finished,
                    waiting=stage.waiting() if stage.waiting is not None else 0,
                    oldest_s=max((now_s - u.since_s for u in stage.units.values()), default=0.0),
                )
                for name, stage in sorted(self._stages.items())
            }

    def _stage(self, name: str) -> _StageUnits:
        if name not in self._stages:
            self._stages[name] = _StageUnits(progress_s=self._clock.monotonic())
        return self._stages[name]


def progress_limits(config: Config) -> dict[str, float]:
    """Return how long each stage may go without progress, in seconds.

    `stuck_s`, and on top of it what the stage's own timeouts and retries may rightly take.
    """
    # The waits between the tries, which double (see Pipeline).
    retries_s = 0.5 * 2.0**config.retries
    return {
        "intake": config.stuck_s,
        "decode": config.stuck_s + retries_s + 2 * (config.decode_timeout_s + _DECODER_S),
        "inference": config.stuck_s + retries_s,
        "overlay": config.stuck_s + retries_s,
        "database": config.stuck_s,
        "reception": config.stuck_s,
        "listener": config.stuck_s,
        "status": config.stuck_s,
        "outbox": config.stuck_s + _OUTBOX_S,
    }


class DatabaseWriter:
    """Runs the store's transactions one after the other, for whichever thread asks.

    SQLite takes one writer at a time; a queue in front of it is fair where its lock is not.
    """

    def __init__(
        self,
        outages: Outages,
        on_crash: Callable[[str, BaseException], None],
        vitals: Progress | None = None,
    ) -> None:
        self._outages = outages
        self._vitals = vitals or Progress(SystemClock())
        self._jobs: queue.Queue[tuple[Callable[[], Any], Future[Any]] | None] = queue.Queue()
        self._vitals.watch_queue("database", self._jobs.qsize)
        self._thread = Worker("writer", self._run, on_crash)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Finish what is queued and end the thread."""
        self._jobs.put(None)
        self._thread.join()

    def call(self, transaction: Callable[[], T]) -> T:
        """Run a transaction on the writer's thread and return, or raise, what it does.

        It is repeated for as long as the database is out of reach or the disk is full.
        """
        future: Future[T] = Future()
        self._jobs.put((transaction, future))
        return future.result()

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            transaction, future = job
            try:
                with self._vitals.busy("database"):
                    result = self._outages.ride_out(transaction)
                future.set_result(result)
            # Whoever asked decides what the error means; this thread goes on serving.
            except Exception as error:
                future.set_exception(error)
