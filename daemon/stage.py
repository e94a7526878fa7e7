"""Stages: threads, their queue, progress and crash report; and what all parts of a daemon share.

Also the crash points at which tests kill the process.
"""

import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar, get_args

from lungwatch.daemon.config import Config
from lungwatch.daemon.home import Home
from lungwatch.daemon.retry import Clock, Outages, ShutdownRequested, answer_future
from lungwatch.db.results import Store

CrashPoint = Literal[
    "renamed",
    "copied",
    "claimed",
    "replaced",
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
CommitmentPoint = Literal["commitment_noted", "commitment_asked", "commitment_accepted"]
CRASH_POINTS: tuple[CrashPoint, ...] = get_args(CrashPoint)
DEFAULT_LIMIT_S = 300.0
_PAUSE_POLL_S = 0.02
T = TypeVar("T")
OnCrash = Callable[[str, BaseException], None]


def crashpoint(name: CrashPoint | RestorePoint | CommitmentPoint) -> None:
    """Kill this process, or hang this thread, if a test asks for it at this point.

    Recovery is proved by crashing: `LUNGWATCH_CRASH_AT=recorded` kills the process, without any
    clean-up, the first time that it gets there. `LUNGWATCH_HANG_AT` has the thread wait for ever,
    `LUNGWATCH_PAUSE_AT` until the folder `LUNGWATCH_PAUSE_DIR` has a file `go`; it makes `reached`
    there.
    """
    if os.environ.get("LUNGWATCH_CRASH_AT") == name:
        os.kill(os.getpid(), signal.SIGKILL)
    if os.environ.get("LUNGWATCH_HANG_AT") == name:
        threading.Event().wait()
    if os.environ.get("LUNGWATCH_PAUSE_AT") == name:
        folder = Path(os.environ["LUNGWATCH_PAUSE_DIR"])
        (folder / "reached").touch()
        while not (folder / "go").exists():
            time.sleep(_PAUSE_POLL_S)


class Worker(threading.Thread):
    """A thread that reports the exception that ends it.

    Parameters
    ----------
    name
        For the log.
    work
        Runs until it returns.
    on_crash
        Called with the thread's name and the exception. The service stops then: a daemon
        that lost a stage must not take files.
    """

    def __init__(self, name: str, work: Callable[[], None], on_crash: OnCrash) -> None:
        super().__init__(name=name, daemon=True)
        self._work = work
        self._on_crash = on_crash

    def run(self) -> None:
        """Run the work and report how it failed, if it did."""
        try:
            self._work()
        except ShutdownRequested:
            return  # the service stops; files in progress stay claimed
        except BaseException as error:  # no thread may die unnoticed
            self._on_crash(self.name, error)


class Lane(StrEnum):
    """Lane of a file between drop and end; each has slots and decoding workers of its own.

    ``ordinary``: an image of a usual size. ``slow``: a large or odd file, such as an archive, a
    picture of many pixels, or what is no image.
    """

    ORDINARY = "ordinary"
    SLOW = "slow"


class InFlight:
    """The number of files between claim and end: limits that bound memory. Thread-safe.

    Parameters
    ----------
    limit, slow_limit
        Slots of the ordinary and of the slow lane; neither takes the other's.
    """

    def __init__(self, limit: int, slow_limit: int = 1) -> None:
        self._limits = {Lane.ORDINARY: limit, Lane.SLOW: slow_limit}
        self._counts = dict.fromkeys(Lane, 0)
        self._ended = 0
        self._changed = threading.Condition()

    @property
    def count(self) -> int:
        """Files that hold a slot now."""
        return sum(self.by_lane.values())

    @property
    def by_lane(self) -> dict[Lane, int]:
        """Files that hold a slot now, of each lane."""
        with self._changed:
            return dict(self._counts)

    @property
    def ended(self) -> int:
        """Files that have met their end so far."""
        with self._changed:
            return self._ended

    def acquire(self, timeout_s: float, lane: Lane = Lane.ORDINARY) -> bool:
        """Take a slot of a lane; False if none came free in time."""
        with self._changed:
            if not self._changed.wait_for(
                lambda: self._counts[lane] < self._limits[lane], timeout_s
            ):
                return False
            self._counts[lane] += 1
            return True

    def release(self, lane: Lane = Lane.ORDINARY, *, ended: bool = True) -> None:
        """Give a slot back; its file has met its end, or is still where it was."""
        with self._changed:
            self._counts[lane] -= 1
            self._ended += ended
            self._changed.notify_all()

    def wait_empty(self, timeout_s: float) -> bool:
        """Wait until no slot is held; False if that took too long."""
        with self._changed:
            return self._changed.wait_for(lambda: not any(self._counts.values()), timeout_s)


@dataclass(frozen=True, kw_only=True)
class StageProgress:
    """One stage, for metrics and health.

    Attributes
    ----------
    busy
        Units of work in progress.
    finished
        Units that ended since the start, well or badly.
    waiting
        Items in the stage's queue; 0 for a stage without one.
    oldest_s
        Seconds since the oldest unit of work last showed progress; 0 without one.
    """

    busy: int
    finished: int
    waiting: int
    oldest_s: float


@dataclass(kw_only=True, eq=False)
class _Unit:
    thread: int
    since_s: float


@dataclass(kw_only=True)
class _StageRecord:
    progress_s: float
    limit_s: float
    units: list[_Unit] = field(default_factory=list)
    finished: int = 0
    waiting: Callable[[], int] | None = None
    waiting_since_s: float | None = None


class Progress:
    """Progress of each stage, for the watchdog. Thread-safe.

    Parameters
    ----------
    clock
        Only its monotonic time is used.
    limit_s
        Seconds that a stage may go without progress (see `watch`).

    Attributes
    ----------
    on_finished
        Called with the stage and the seconds of each unit of work that ends, on its thread.
    """

    def __init__(self, clock: Clock, limit_s: float = DEFAULT_LIMIT_S) -> None:
        self._clock = clock
        self._limit_s = limit_s
        self.on_finished: Callable[[str, float], None] | None = None
        self._lock = threading.Lock()
        self._stages: dict[str, _StageRecord] = {}
        self._excused_s = clock.monotonic()

    def watch(
        self, stage: str, *, extra_s: float = 0.0, waiting: Callable[[], int] | None = None
    ) -> None:
        """Describe a stage.

        Parameters
        ----------
        extra_s
            What the stage's own timeouts and retries may take on top of the limit, in seconds.
        waiting
            Returns the length of its queue: while one waits, something must finish in time.
        """
        with self._lock:
            record = self._stage(stage)
            record.limit_s = self._limit_s + extra_s
            record.waiting = waiting

    @contextmanager
    def busy(self, stage: str) -> Iterator[None]:
        """Do one unit of a stage's work inside; units of several threads may overlap."""
        started_s = self._clock.monotonic()
        unit = _Unit(thread=threading.get_ident(), since_s=started_s)
        with self._lock:
            self._stage(stage).units.append(unit)
        try:
            yield
        finally:
            with self._lock:
                record = self._stage(stage)
                record.units.remove(unit)
                record.finished += 1
                record.progress_s = self._clock.monotonic()
            if self.on_finished is not None:
                self.on_finished(stage, self._clock.monotonic() - started_s)

    def beat(self, stage: str) -> None:
        """Restart the time of this thread's unit of work.

        For a unit that is long by its nature, or that waits for others who are watched.
        """
        with self._lock:
            record = self._stage(stage)
            record.progress_s = self._clock.monotonic()
            for unit in record.units:
                if unit.thread == threading.get_ident():
                    unit.since_s = record.progress_s

    def excuse(self, now_s: float) -> None:
        """Count no time before this one: a known outage kept every stage waiting."""
        with self._lock:
            self._excused_s = max(self._excused_s, now_s)

    def stuck(self, now_s: float) -> dict[str, float]:
        """Return the stages over their limit at a monotonic time, with seconds, by name."""
        found = {}
        with self._lock:
            for name, record in sorted(self._stages.items()):
                starts = [unit.since_s for unit in record.units]
                if record.waiting is not None and record.waiting() > 0:
                    if record.waiting_since_s is None:
                        record.waiting_since_s = now_s
                    starts.append(max(record.waiting_since_s, record.progress_s))
                else:
                    record.waiting_since_s = None
                seconds = max((now_s - max(s, self._excused_s) for s in starts), default=0.0)
                if seconds > record.limit_s:
                    found[name] = seconds
        return found

    def snapshot(self) -> dict[str, StageProgress]:
        """Return every stage that has been heard of, by name."""
        with self._lock:
            now_s = self._clock.monotonic()
            return {
                name: StageProgress(
                    busy=len(record.units),
                    finished=record.finished,
                    waiting=record.waiting() if record.waiting is not None else 0,
                    oldest_s=max((now_s - unit.since_s for unit in record.units), default=0.0),
                )
                for name, record in sorted(self._stages.items())
            }

    def _stage(self, name: str) -> _StageRecord:
        if name not in self._stages:
            self._stages[name] = _StageRecord(
                progress_s=self._clock.monotonic(), limit_s=self._limit_s
            )
        return self._stages[name]


class Stage(Generic[T]):
    """One step of the pipeline: threads that take items from a queue and handle them.

    Parameters
    ----------
    name
        Of the stage, and of its threads with a number.
    open_handler
        Entered on each thread; gives the handler, which is called with the items that wait, at
        least one and at most `batch_size`. A batch is never waited for.
    progress, on_crash
        Where progress and the end of a thread are reported.
    extra_s
        See `Progress.watch`.

    Attributes
    ----------
    put
        Queues an item.
    """

    def __init__(
        self,
        name: str,
        open_handler: Callable[[], AbstractContextManager[Callable[[list[T]], None]]],
        progress: Progress,
        on_crash: OnCrash,
        *,
        workers: int = 1,
        batch_size: int = 1,
        extra_s: float = 0.0,
    ) -> None:
        self.name = name
        self._open_handler = open_handler
        self._progress = progress
        self._batch_size = batch_size
        # Unbounded: the slots of `InFlight` bound it.
        self._queue: queue.Queue[T | None] = queue.Queue()
        self.put: Callable[[T], None] = self._queue.put
        progress.watch(name, extra_s=extra_s, waiting=self._queue.qsize)
        self._threads = [Worker(f"{name}-{n}", self._run, on_crash) for n in range(workers)]

    @property
    def dead(self) -> list[str]:
        """The threads that have ended, by name; before `start`, all of them."""
        return [thread.name for thread in self._threads if not thread.is_alive()]

    def start(self) -> None:
        """Start the threads."""
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Have the threads end once they have handled what is queued."""
        for _ in self._threads:
            self._queue.put(None)

    def join(self, timeout_s: float | None = None) -> None:
        """Wait until the threads have ended, of each at most so many seconds."""
        for thread in self._threads:
            thread.join(timeout_s)

    def _run(self) -> None:
        with self._open_handler() as handle:
            while items := self._take():
                with self._progress.busy(self.name):
                    handle(items)

    def _take(self) -> list[T]:
        """Return what waits, up to the batch size; nothing at the end."""
        items: list[T] = []
        item = self._queue.get()
        while item is not None:
            items.append(item)
            if len(items) == self._batch_size:
                return items
            try:
                item = self._queue.get_nowait()
            except queue.Empty:
                return items
        if items:
            self._queue.put(None)  # the end: seen again after this batch
        return items


class DatabaseWriter:
    """The one thread that writes to the database, a transaction at a time, for any thread.

    SQLite takes one writer at a time; a queue in front of it is fair where its lock is not.
    """

    def __init__(self, outages: Outages, on_crash: OnCrash, progress: Progress) -> None:
        self._outages = outages
        self._stage: Stage[tuple[Callable[[], Any], Future[Any]]] = Stage(
            "database",
            lambda: nullcontext(self._execute),
            progress,
            on_crash,
        )
        self.start = self._stage.start

    def stop(self) -> None:
        """Finish what is queued and end the thread."""
        self._stage.close()
        self._stage.join()

    def call(self, transaction: Callable[[], T]) -> T:
        """Run a transaction on the writer's thread and return, or raise, what it does.

        It is repeated while an outage stops it: a database out of reach, a full disk.
        """
        future: Future[T] = Future()
        self._stage.put((transaction, future))
        return future.result()

    def _execute(self, jobs: list[tuple[Callable[[], Any], Future[Any]]]) -> None:
        for transaction, future in jobs:
            answer_future(partial(self._outages.wait_out, transaction), future)


@dataclass(frozen=True, kw_only=True)
class Context:
    """Configuration, resources and services that all parts of one daemon share.

    Attributes
    ----------
    in_flight
        A slot is taken before a file is claimed, and given back at its end.
    stopped
        Set once nothing more is to be claimed.
    on_crash
        Called with the name of a thread that died, and with what killed it.
    """

    config: Config
    home: Home
    clock: Clock
    outages: Outages
    progress: Progress
    store: Store
    writer: DatabaseWriter
    in_flight: InFlight
    stopped: threading.Event
    on_crash: OnCrash

    def elapsed_ms(self, since_s: float) -> int:
        """Return the milliseconds since a monotonic time."""
        return round((self.clock.monotonic() - since_s) * 1000)
