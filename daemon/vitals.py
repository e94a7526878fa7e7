"""What each stage of the pipeline is doing, and for how long: real progress, for the watchdog."""

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from lungwatch.daemon.clock import Clock
from lungwatch.daemon.config import Config

# A decoder is started and asked twice at most, and each time killed (see decoder.process).
_DECODER_S = 65.0
_OUTBOX_S = 900.0  # one association of many objects, each with the network's timeouts
DEFAULT_LIMIT_S = 300.0


@dataclass(frozen=True, kw_only=True)
class Stuck:
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
class StageVitals:
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
class _Stage:
    units: dict[int, _Unit] = field(default_factory=dict)
    finished: int = 0
    progress_s: float
    waiting: Callable[[], int] | None = None
    waiting_since_s: float | None = None


class Vitals:
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
        self._stages: dict[str, _Stage] = {}
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

    def stuck(self, now_s: float) -> list[Stuck]:
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
                    found.append(Stuck(stage=name, seconds=seconds))
            return found

    def snapshot(self) -> dict[str, StageVitals]:
        """Return every stage that has been heard of, by name."""
        with self._lock:
            now_s = self._clock.monotonic()
            return {
                name: StageVitals(
                    busy=len(stage.units),
                    finished=stage.finished,
                    waiting=stage.waiting() if stage.waiting is not None else 0,
                    oldest_s=max((now_s - u.since_s for u in stage.units.values()), default=0.0),
                )
                for name, stage in sorted(self._stages.items())
            }

    def _stage(self, name: str) -> _Stage:
        if name not in self._stages:
            self._stages[name] = _Stage(progress_s=self._clock.monotonic())
        return self._stages[name]


def limits_of(config: Config) -> dict[str, float]:
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
