"""The intake thread: finds complete files in the drop folder and claims them."""

import errno
import logging
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from lungwatch.daemon.home import Home, Watermark
from lungwatch.daemon.intake.claims import Claimer, ClaimInterrupted
from lungwatch.daemon.intake.eligibility import CompletenessCheck, NameRules, writer_of
from lungwatch.daemon.intake.scan import DropScan, SkippedFiles, UnusableFiles, WaitingFiles
from lungwatch.daemon.intake.watch import DropFolder, Watcher
from lungwatch.daemon.logs import event
from lungwatch.daemon.pipeline.records import Claimed
from lungwatch.daemon.retry import Clock, Outages
from lungwatch.daemon.stage import InFlight, Progress
from lungwatch.errors import describe

_POLL_S = 0.2

# The file is somebody's who does not let us move it, or on another file system.
_NOT_OURS = {errno.EACCES, errno.EPERM, errno.EXDEV}

_FIRST_DELAY_S = 0.5

_MAX_DELAY_S = 60.0

_TRIES_UNSAID = 4


@dataclass(frozen=True, kw_only=True)
class _Postponed:
    """A file in the drop folder or in `work/` that could not be claimed.

    Attributes
    ----------
    tries
        That failed so far.
    due_s
        Monotonic time of the next one.
    """

    tries: int
    due_s: float


class Intake:
    """Looks at the drop folder, at every hint and every `rescan_s`, and claims what is complete.

    Parameters
    ----------
    stopped
        Set by whoever wants `run`, or a scan that is under way, to end.
    queued
        Returns (path, source name) of the quarantined files to try again.
    submit
        Takes a claimed file, which holds a slot of `in_flight`.
    takes_drops
        Whether files of the drop folder are taken; else only those that `queued` returns.
    """

    def __init__(
        self,
        *,
        home: Home,
        watcher: Watcher,
        stability: CompletenessCheck,
        names: NameRules,
        claimer: Claimer,
        in_flight: InFlight,
        outages: Outages,
        vitals: Progress,
        clock: Clock,
        rescan_s: float,
        open_timeout_s: float,
        min_free_mb: int,
        stopped: threading.Event,
        queued: Callable[[], list[tuple[Path, str]]],
        submit: Callable[[Claimed], None],
        takes_drops: bool = True,
    ) -> None:
        self._home = home
        self._watcher = watcher
        self._stability = stability
        self._claimer = claimer
        self._in_flight = in_flight
        self._outages = outages
        self._vitals = vitals
        self._clock = clock
        self._rescan_s = rescan_s
        self._queued = queued
        self._submit = submit
        self._takes_drops = takes_drops
        self._stopped = stopped
        self._left_alone = UnusableFiles()
        self.skipped = SkippedFiles(open_timeout_s)
        self._watermark = Watermark(home, min_free_mb)
        self._scan = DropScan(
            home.incoming,
            names=names,
            left_alone=self._left_alone,
            skipped=self.skipped,
            clock=clock,
            beat=partial(vitals.beat, "intake"),
        )
        self._postponed: dict[Path, _Postponed] = {}
        self._folder = DropFolder(home, watcher, outages)
        self.waiting_files = WaitingFiles()
        self._queued_left = 0

    @property
    def waiting(self) -> int:
        """Files that are to be taken: in the drop folder, or in quarantine to be tried again."""
        return self.waiting_files.count + self._queued_left

    @property
    def left_alone(self) -> int:
        """Files that are seen and cannot be taken."""
        return len(self._left_alone)

    def run(self) -> None:
        """Take up what was in hand, then look again and again until stopped."""
        self.resume()
        while not self._stopped.is_set():
            # Cleared before looking: what comes during the look wakes the next one.
            self._watcher.wake.clear()
            with self._vitals.busy("intake"):
                self.scan()
            self._watcher.wake.wait(self._rescan_s)

    def stop(self) -> None:
        """End `run` after the file that it is claiming."""
        self._stopped.set()
        self._watcher.wake.set()

    def scan(self) -> bool:
        """Look at the whole drop folder once and claim every complete file.

        Returns
        -------
        bool
            Whether there was anything to take, now or later.
        """
        if not self._folder.is_there():
            return True
        for path, hint in self._watcher.take_hints().items():
            self._stability.hint(path, hint)
        try:
            found = dict(self._scan.files()) if self._takes_drops else {}
        except OSError as error:
            self._folder.lose(error)
            return True
        now_s = self._clock.monotonic()
        for path, snapshot in found.items():
            self._stability.observe(path, snapshot, now_s)
        self._stability.keep_only(found)
        self._left_alone.forget_gone()
        self._postponed = {
            path: kept for path, kept in self._postponed.items() if os.path.lexists(path)
        }
        queued = self._outages.ride_out(self._queued)
        self.waiting_files.replace(
            {p: seen.changed_at_s for p, seen in found.items() if p not in self._left_alone}
        )
        self._queued_left = len(queued)
        for path in found:
            if self._is_due(path) and self._is_complete(path):
                self._claim(path, partial(self._claimer.take, path))
            if path in self._left_alone or not os.path.lexists(path):
                self.waiting_files.leave(path)
        for path in [path for path in self._postponed if path not in found and self._is_due(path)]:
            self._claim(path, partial(self._claimer.resume, path))
        for path, source_name in queued:
            self._claim(path, partial(self._claimer.retry, path, source_name))
            self._queued_left -= 1
        return bool(queued) or any(
            path not in self._left_alone for path in (*found, *self._postponed)
        )

    def resume(self) -> None:
        """Go on with what a previous process left in `work/`; nothing else can be in there.

        One after the other: if one of them was what killed that process, it goes alone this
        time, and its neighbours are not given up along with it.
        """
        # Before the first claim: from then on the pipeline empties and removes folders itself.
        for folder in list(self._home.work.iterdir()):
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()  # claimed, and not renamed into: its file is where it was
        for path in [path for path in self._home.work.rglob("*") if path.is_file()]:
            self._claim(path, partial(self._claimer.resume, path))
            while not self._stopped.is_set() and not self._in_flight.wait_empty(_POLL_S):
                pass

    def _is_complete(self, path: Path) -> bool:
        self._vitals.beat("intake")
        try:
            writer = writer_of(path)
        except FileNotFoundError:
            return False
        except OSError as error:
            self._left_alone.add(path, error.strerror or "cannot be opened")
            return False
        return self._stability.is_complete(path, writer, self._clock.monotonic())

    def _claim(self, path: Path, claim: Callable[[], Claimed | None]) -> None:
        # The stop is looked at before every claim: what is not claimed stays where it is.
        while (
            self._stopped.is_set()
            or not self._watermark.has_space()
            or self._outages.current
            or not self._in_flight.acquire(_POLL_S)
        ):
            self._vitals.beat("intake")
            is_waiting = self._watermark.is_short or self._outages.current
            if self._stopped.wait(_POLL_S if is_waiting else 0):
                return
        self._vitals.beat("intake")
        claimed, has_ended = None, False
        try:
            claimed = claim()
            # Known bytes meet their end here; what is still being written is given back.
            has_ended = claimed is None and not os.path.lexists(path)
        except FileNotFoundError:
            pass  # taken away again by whoever dropped it
        except OSError as error:
            if error.errno in _NOT_OURS:
                self._left_alone.add(path, error.strerror or "it cannot be moved")
            else:
                self._postpone(path, error)
        except ClaimInterrupted as error:
            self._postpone(error.path, error)
        finally:
            if claimed is None:
                self._in_flight.release(ended=has_ended)
        if claimed is not None:
            self._postponed.pop(path, None)
            self._submit(claimed)

    def _is_due(self, path: Path) -> bool:
        kept = self._postponed.get(path)
        return kept is None or self._clock.monotonic() >= kept.due_s

    def _postpone(self, path: Path, error: OSError | ClaimInterrupted) -> None:
        """Leave a file for later, later each time; said once it has been tried a few times."""
        cause = error.__cause__ if isinstance(error, ClaimInterrupted) else error
        why = describe(cause) if isinstance(cause, OSError) else "it cannot be claimed"
        tries = self._postponed[path].tries + 1 if path in self._postponed else 1
        delay_s = min(_FIRST_DELAY_S * 2 ** (tries - 1), _MAX_DELAY_S)
        self._postponed[path] = _Postponed(tries=tries, due_s=self._clock.monotonic() + delay_s)
        if tries > _TRIES_UNSAID:
            self._left_alone.add(path, why)
        else:
            event("retry", level=logging.WARNING, error=why, wait_s=delay_s)
