"""The intake thread: finds complete files in the drop folder and claims them, in fair order.

The thread does a little of everything in turn: it looks at the files that hints name, goes on with
a scan, and claims one ordinary file. A large or odd file is claimed by another thread, since it
takes long to copy. Nothing but that claim is done outside of the intake thread.
"""

import errno
import logging
import os
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue

from lungwatch.daemon.home import Home
from lungwatch.daemon.intake.claims import Claimer, ClaimInterrupted
from lungwatch.daemon.intake.custody import COPY_NAME
from lungwatch.daemon.intake.eligibility import CompletenessCheck, Hint, Snapshot
from lungwatch.daemon.intake.lanes import Candidate, LaneRules, Look, Turns, look_at
from lungwatch.daemon.intake.watch import DropFolder, DropScan, Watcher
from lungwatch.daemon.logs import event
from lungwatch.daemon.pipeline.records import Claimed
from lungwatch.daemon.retry import Backoff
from lungwatch.daemon.stage import Context, Lane, Stage
from lungwatch.errors import describe
from lungwatch.imaging.reader import max_file_bytes

_POLL_S = 0.2
# Another user's file that may not be moved, or one on another file system.
_NOT_OURS = {errno.EACCES, errno.EPERM, errno.EXDEV}
_MAX_DELAY_S = 60.0
_RETRIES_AT_ONCE = 4  # before a file is reported as unusable
_LOCAL_STABILITY_S = 1.0
_REMOTE_STABILITY_S = 5.0
# One turn's part of a scan, of the hints and of the files to be looked at.
_SLICE_S = 0.05
# Until a file is looked at again that is open for writing, or cannot be opened.
_LOOK_AGAIN_S = 1.0
# A scan of many files leaves that much more time than it takes.
_SCAN_PAUSE = 4
_NO_USER = -1
_SLOW_STOP_S = 5.0
_MIB = 1024 * 1024
_Walk = Iterator[tuple[Path | str, Snapshot | None]]


class Watermark:
    """The free space of a home, below which nothing is claimed; pause and resumption are logged.

    Parameters
    ----------
    min_free_mb
        In MiB.
    """

    def __init__(self, home: Home, min_free_mb: int) -> None:
        self._home = home
        self._min_free_mb = min_free_mb
        self.is_short = False

    def has_space(self) -> bool:
        """Tell whether there is room for more."""
        try:
            free_mb = self._home.free_mb()
        except OSError:
            return False  # the home itself is missing; the scan reports that
        # A tenth more to resume, or the next claimed file would pause it again.
        enough_mb = self._min_free_mb * (11 if self.is_short else 10) / 10
        is_short = free_mb < enough_mb
        if is_short != self.is_short:
            self.is_short = is_short
            event(
                "paused" if is_short else "resumed",
                level=logging.WARNING,
                reason="disk",
                free_mb=free_mb,
                min_free_mb=self._min_free_mb,
            )
        return not is_short


@dataclass(frozen=True, kw_only=True)
class _Outcome:
    """How a claim ended: `error` if it failed; `claimed` if the file is in the pipeline now."""

    file: Candidate
    claimed: Claimed | None = None
    error: OSError | ClaimInterrupted | None = None


class Intake:
    """Intake of the drop folder: hints at once, and a whole scan every `rescan_s`.

    Parameters
    ----------
    watcher
        Watches the drop folder.
    queued
        Returns (path, source name) of the quarantined files to try again.
    submit
        Takes a claimed file, which holds a slot of `Context.in_flight`.
    takes_drops
        Whether files of the drop folder are taken; else only those that `queued` returns.
    """

    def __init__(
        self,
        context: Context,
        watcher: Watcher,
        claimer: Claimer,
        *,
        queued: Callable[[], list[tuple[Path, str]]],
        submit: Callable[[Claimed], None],
        takes_drops: bool = True,
    ) -> None:
        config, home = context.config, context.home
        self._context = context
        self._stopped = context.stopped
        self._outages = context.outages
        self._in_flight = context.in_flight
        self._clock = context.clock
        self._watcher = watcher
        self._claimer = claimer
        self._queued = queued
        self._submit = submit
        self._takes_drops = takes_drops
        self._beat = partial(context.progress.beat, "intake")
        self._stability = CompletenessCheck(
            stability_s=config.stability_s
            or (_REMOTE_STABILITY_S if watcher.is_polling else _LOCAL_STABILITY_S),
            open_timeout_s=config.open_timeout_s,
            closes_often=config.stability_s > 0,
        )
        self._rules = LaneRules(
            from_bytes=config.slow_from_mb * _MIB,
            from_pixels=config.slow_from_pixels,
            readable_bytes=max_file_bytes(config.read_policy),
        )
        self._watermark = Watermark(home, config.min_free_mb)
        self._scan = DropScan(
            home.incoming,
            config.name_rules,
            skip_log_s=config.open_timeout_s,
            clock=context.clock,
            beat=self._beat,
        )
        self._unusable = self._scan.unusable
        self.skipped = self._scan.skipped
        self._postponed = Backoff[Path](most_s=_MAX_DELAY_S)
        self._folder = DropFolder(home, watcher, context.outages)
        # Every file to take, by path: it waits for its turn, is parked, or is being claimed.
        # Other threads read copies.
        self._known: dict[str, Candidate] = {}
        self._turns = {lane: Turns() for lane in Lane}
        self._parked: dict[str, float] = {}
        self._hinted: deque[tuple[Path, Hint]] = deque()
        self._walk: _Walk | None = None
        self._walk_began_s = self._walk_due_s = self._walk_earliest_s = float("-inf")
        self._queued_due_s = float("-inf")
        self._slow = Stage[Candidate](
            "intake_slow",
            lambda: nullcontext(self._claim_slow),
            context.progress,
            context.on_crash,
            extra_s=_MAX_DELAY_S,
        )
        self._outcomes: SimpleQueue[_Outcome] = SimpleQueue()
        # Files of the slow lane that a previous process left, processed one at a time.
        self._resumed: deque[Candidate] = deque()

    @property
    def waiting(self) -> int:
        """Number of files to take, in the drop folder or in quarantine on request."""
        return len(self._to_take())

    @property
    def waiting_by_lane(self) -> dict[Lane, int]:
        """The same of each lane."""
        lanes = [file.lane for file in self._to_take()]
        return {lane: lanes.count(lane) for lane in Lane}

    @property
    def oldest_waiting_at(self) -> float | None:
        """When the oldest file of the drop folder came, in seconds since the epoch, if any."""
        return min((file.came_at_s for file in self._to_take() if file.is_dropped), default=None)

    @property
    def unusable(self) -> int:
        """Number of files in the drop folder that cannot be taken."""
        return len(self._unusable)

    def _to_take(self) -> list[Candidate]:
        return [file for file in self._known.copy().values() if file.path not in self._unusable]

    def run(self) -> None:
        """Resume files in `work/`, then take files until stopped."""
        self._slow.start()
        try:
            self.resume()
            while not self._stopped.is_set():
                # Cleared before the turn: a file that comes meanwhile starts the next one.
                self._watcher.wake.clear()
                with self._context.progress.busy("intake"):
                    wait_s = self._take_turn()
                if wait_s > 0:
                    self._watcher.wake.wait(wait_s)
        finally:
            self._slow.close()
            # A claim of many gigabytes may go on; the next start continues it.
            self._slow.join(_SLOW_STOP_S)

    def stop(self) -> None:
        """End `run` after the file that is being claimed."""
        self._stopped.set()
        self._watcher.wake.set()

    def scan(self) -> bool:
        """Scan the whole drop folder once and claim every complete file, on this thread.

        Returns
        -------
        bool
            Whether there was a file to take, now or later.
        """
        self._note_hints(float("inf"))
        if self._takes_drops and not self._walk_on(float("inf"), is_due=True):
            return True
        self._note_queued()
        self._release_parked()
        had_work = bool(self._to_take())
        while self._resumed and self._wait_for_slot(Lane.SLOW):
            self._settle(self._claim(self._resumed.popleft()))
            self._wait_until_ended()
        for lane in Lane:
            while not self._stopped.is_set() and (file := self._next_of(lane, float("inf"))):
                if not self._wait_for_slot(lane):
                    break
                self._settle(self._claim(file))
        return had_work

    def resume(self) -> None:
        """Continue with the files that a previous process left in `work/`.

        One at a time: if one of them crashed that process, it is processed alone now, and the
        others do not use up their attempts with it. Those of the slow lane follow beside the new
        files of the ordinary one.
        """
        # Before the first claim: afterwards the pipeline removes empty folders itself.
        for folder in list(self._context.home.work.iterdir()):
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()  # made for a file that was not moved into it
        for path in self._left_in_work():
            file = Candidate(
                path=path,
                uid=_NO_USER,
                folder="",
                came_at_s=float("-inf"),
                lane=self._lane_of(path),
                claim=partial(self._claimer.resume, path),
                is_dropped=False,
            )
            self._known[file.key] = file
            if file.lane is Lane.SLOW:
                self._resumed.append(file)
                continue
            if self._wait_for_slot(Lane.ORDINARY):
                self._settle(self._claim(file))
            self._wait_until_ended()

    def _left_in_work(self) -> list[Path]:
        files = self._context.home.work.rglob("*")
        return [path for path in files if path.is_file() and path.name != COPY_NAME]

    def _wait_until_ended(self) -> None:
        while not self._stopped.is_set() and not self._in_flight.wait_empty(_POLL_S):
            self._beat()

    def _lane_of(self, path: Path) -> Lane:
        """Return the lane of a file that the daemon has already."""
        try:
            return self._rules.lane_of(Snapshot.of(path.lstat(), 0.0), look_at(path))
        except OSError:
            return Lane.ORDINARY  # its claim meets the error

    def _take_turn(self) -> float:
        """Do a part of everything that is due; return for how long nothing is."""
        self._beat()
        while True:
            try:
                self._settle(self._outcomes.get_nowait())
            except Empty:
                break
        if self._takes_drops:
            self._note_hints(self._clock.monotonic() + _SLICE_S)
            self._walk_on(self._clock.monotonic() + _SLICE_S)
        if self._clock.monotonic() >= self._queued_due_s:
            self._note_queued()
        self._release_parked()
        if self._stopped.is_set() or not self._may_claim():
            return _POLL_S
        self._hand_over()
        if self._turns[Lane.ORDINARY]:
            # A slot first: whose turn it is may change while none is free.
            if self._in_flight.acquire(0.0 if self._walk is not None else _POLL_S):
                self._claim_next()
            return 0.0
        return 0.0 if self._walk is not None or self._hinted else self._idle_s()

    def _idle_s(self) -> float:
        now_s = self._clock.monotonic()
        due = [self._queued_due_s, *self._parked.values()]
        if self._takes_drops:
            due.append(self._walk_due_s)
        if self._turns[Lane.SLOW] or self._resumed:
            return _POLL_S  # a slot comes free without waking this thread
        return min(max(min(due) - now_s, 0.01), self._context.config.rescan_s)

    def _may_claim(self) -> bool:
        return self._watermark.has_space() and not self._outages.current

    def _wait_for_slot(self, lane: Lane) -> bool:
        """Wait until a file may be claimed and take a slot; False if the service stops."""
        # The stop is checked before every claim: a file that is not claimed stays where it is.
        while (
            self._stopped.is_set()
            or not self._may_claim()
            or not self._in_flight.acquire(_POLL_S, lane)
        ):
            self._beat()
            is_waiting = self._watermark.is_short or self._outages.current
            if self._stopped.wait(_POLL_S if is_waiting else 0):
                return False
        self._beat()
        return True

    def _note_hints(self, until_s: float) -> None:
        """Look at the files that hints name."""
        self._hinted.extend(self._watcher.take_hints().items())
        while self._hinted:
            path, hint = self._hinted.popleft()
            self._stability.hint(path, hint)
            if hint is not Hint.WRITING:
                self._find(path)
            if self._clock.monotonic() > until_s:
                break
        if self._watcher.take_scan_due():
            self._walk_due_s = self._walk_earliest_s

    def _find(self, path: Path) -> None:
        """Note a file of the drop folder of which something was heard."""
        if str(path) in self._known:
            # At once in turn: it may just have become complete.
            if str(path) in self._parked:
                self._parked[str(path)] = float("-inf")
            return
        if not path.is_relative_to(self._context.home.incoming) or self._scan.is_skipped(path):
            return
        snapshot = self._scan.examine(path)
        if snapshot is not None:
            self._scan.seen.add(str(path))
            self._note(path, snapshot)

    def _walk_on(self, until_s: float, *, is_due: bool = False) -> bool:
        """Begin or continue a scan of the drop folder; False if the folder is away."""
        now_s = self._clock.monotonic()
        if self._walk is None:
            if not is_due and now_s < self._walk_due_s:
                return True
            self._walk_due_s = now_s + self._context.config.rescan_s
            if not self._folder.is_there():
                return False
            self._walk, self._walk_began_s = self._scan.files(self._known), now_s
        try:
            for path, snapshot in self._walk:
                self._note(path, snapshot)
                if self._clock.monotonic() > until_s:
                    return True
        except OSError as error:
            self._walk = None
            self._folder.lose(error)
            return False
        self._walk = None
        self._end_walk()
        return True

    def _end_walk(self) -> None:
        """Forget what a whole scan has not found."""
        now_s = self._clock.monotonic()
        took_s = now_s - self._walk_began_s
        self._walk_earliest_s = now_s + _SCAN_PAUSE * took_s
        self._walk_due_s = max(self._walk_earliest_s, now_s + self._context.config.rescan_s)
        seen = self._scan.seen
        seen.update(key for key, file in self._known.items() if not file.is_dropped)
        for key in [
            *self._turns[Lane.ORDINARY].keys(),
            *self._turns[Lane.SLOW].keys(),
            *self._parked,
        ]:
            if key not in seen:
                self._forget(self._known[key])
        self._unusable.forget_gone(seen)
        self._stability.forget_early_hints()

    def _note(self, path: Path | str, snapshot: Snapshot | None) -> None:
        """Note a file that was found in the drop folder."""
        if snapshot is None or not isinstance(path, Path) or str(path) in self._known:
            return
        self._stability.observe(path, snapshot, self._clock.monotonic())
        self._add(
            Candidate(
                path=path,
                uid=snapshot.uid,
                folder=str(path.parent),
                came_at_s=snapshot.changed_at_s,
                lane=self._rules.by_size(snapshot),
                claim=partial(self._claimer.take, path),
            )
        )

    def _note_queued(self) -> None:
        """Note the quarantined files that are to be tried again."""
        self._queued_due_s = self._clock.monotonic() + self._context.config.rescan_s
        for path, source_name in self._outages.wait_out(self._queued):
            if str(path) not in self._known:
                self._add(
                    Candidate(
                        path=path,
                        uid=_NO_USER,
                        folder="",
                        came_at_s=self._clock.now().timestamp(),
                        lane=self._lane_of(path),
                        claim=partial(self._claimer.retry, path, source_name),
                        is_dropped=False,
                    )
                )

    def _add(self, file: Candidate) -> None:
        self._known[file.key] = file
        self._turns[file.lane].add(file)

    def _forget(self, file: Candidate) -> None:
        self._known.pop(file.key, None)
        self._parked.pop(file.key, None)
        for turns in self._turns.values():
            turns.discard(file.key)
        self._stability.forget(file.path)
        self._postponed.succeeded(file.path)

    def _park(self, file: Candidate, wait_s: float) -> None:
        """Look at a file again after some time, or at the next hint of it."""
        self._parked[file.key] = self._clock.monotonic() + wait_s

    def _release_parked(self) -> None:
        now_s = self._clock.monotonic()
        for key in [key for key, due_s in self._parked.items() if due_s <= now_s]:
            del self._parked[key]
            file = self._known[key]
            self._turns[file.lane].add(file)

    def _next_of(self, lane: Lane, until_s: float) -> Candidate | None:
        """Return the next file of a lane that may be taken; None if there is none, or no time."""
        while (file := self._turns[lane].pop()) is not None:
            if not file.is_dropped or self._is_ready(file):
                return file
            if self._clock.monotonic() > until_s:
                break
        return None

    def _is_ready(self, file: Candidate) -> bool:
        """Tell whether a dropped file may be taken now, in the lane that it is in."""
        self._beat()
        snapshot = self._scan.examine(file.path)
        look = None if snapshot is None else self._look_at(file)
        if snapshot is None or look is None:
            if file.key not in self._parked:
                self._forget(file)
            return False
        now_s = self._clock.monotonic()
        self._stability.observe(file.path, snapshot, now_s)
        wait_s = self._stability.wait_s(file.path, look.writer, now_s)
        if wait_s > 0:
            self._park(file, min(wait_s, _LOOK_AGAIN_S))
            return False
        if (why := self._rules.refusal(snapshot, look)) is not None:
            self._unusable.report(file.path, why)
            self._park(file, _MAX_DELAY_S)
            return False
        lane = self._rules.lane_of(snapshot, look)
        if lane is not file.lane:
            self._add(replace(file, lane=lane))
        return lane is file.lane

    def _look_at(self, file: Candidate) -> Look | None:
        """Look at a file; None if it is gone, or cannot be opened, and is parked then."""
        try:
            return look_at(file.path)
        except FileNotFoundError:
            return None
        except OSError as error:
            self._unusable.report(file.path, error.strerror or "cannot be opened")
            self._park(file, _LOOK_AGAIN_S)
            return None

    def _claim_next(self) -> None:
        """Claim an ordinary file; a slot is held."""
        file = self._next_of(Lane.ORDINARY, self._clock.monotonic() + _SLICE_S)
        if file is None:
            self._in_flight.release(ended=False)
        else:
            self._settle(self._claim(file))

    def _hand_over(self) -> None:
        """Give the slow lane's thread what it has slots for."""
        until_s = self._clock.monotonic() + _SLICE_S
        if self._resumed:
            is_alone = self._in_flight.by_lane[Lane.SLOW] == 0
            if is_alone and self._in_flight.acquire(0.0, Lane.SLOW):
                self._slow.put(self._resumed.popleft())
            return
        while self._turns[Lane.SLOW]:
            if not self._in_flight.acquire(0.0, Lane.SLOW):
                return
            file = self._next_of(Lane.SLOW, until_s)
            if file is None:
                self._in_flight.release(Lane.SLOW, ended=False)
                return
            self._slow.put(file)

    def _claim_slow(self, files: list[Candidate]) -> None:
        """Claim files of the slow lane, on its own thread."""
        for file in files:
            if self._stopped.is_set():
                self._in_flight.release(Lane.SLOW, ended=False)
                continue
            self._outcomes.put(self._claim(file))
            self._watcher.wake.set()

    def _claim(self, file: Candidate) -> _Outcome:
        """Claim a file for which a slot is held; called on both threads."""
        claimed, has_ended, failure = None, False, None
        try:
            claimed = file.claim()
            # A known content has its end here; a file still being written to is back.
            has_ended = claimed is None and not os.path.lexists(file.path)
        except FileNotFoundError:
            pass  # removed again by its dropper
        except (OSError, ClaimInterrupted) as error:
            failure = error
        finally:
            if claimed is None:
                self._in_flight.release(file.lane, ended=has_ended)
        if claimed is not None:
            self._submit(replace(claimed, lane=file.lane))
        return _Outcome(file=file, claimed=claimed, error=failure)

    def _settle(self, outcome: _Outcome) -> None:
        """Note how a claim ended."""
        file, error = outcome.file, outcome.error
        if isinstance(error, ClaimInterrupted):
            # In `work/` by now.
            path = error.path
            self._known.pop(file.key, None)
            file = replace(
                file, path=path, is_dropped=False, claim=partial(self._claimer.resume, path)
            )
            self._known[file.key] = file
            self._postpone(file, error)
        elif error is not None and error.errno in _NOT_OURS:
            self._unusable.report(file.path, error.strerror or "it cannot be moved")
            self._park(file, _LOOK_AGAIN_S)
        elif error is not None:
            self._postpone(file, error)
        else:
            self._forget(file)
            # It was given back, or another one took its name meanwhile.
            if file.is_dropped and os.path.lexists(file.path):
                self._find(file.path)

    def _postpone(self, file: Candidate, error: OSError | ClaimInterrupted) -> None:
        """Leave a file for later, later each time; reported once some retries have failed."""
        cause = error.__cause__ if isinstance(error, ClaimInterrupted) else error
        why = describe(cause) if isinstance(cause, OSError) else "it cannot be claimed"
        wait_s = self._postponed.failed(file.path, self._clock.monotonic())
        self._park(file, wait_s)
        if self._postponed.failures(file.path) > _RETRIES_AT_ONCE:
            self._unusable.report(file.path, why)
        else:
            event("retry", level=logging.WARNING, error=why, wait_s=wait_s)
