"""The intake thread: finds complete files in the drop folder and claims them."""

import errno
import logging
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

from lungwatch.daemon.home import Home
from lungwatch.daemon.intake.claims import Claimer, ClaimInterrupted
from lungwatch.daemon.intake.custody import COPY_NAME
from lungwatch.daemon.intake.eligibility import CompletenessCheck, writer_of
from lungwatch.daemon.intake.watch import DropFolder, DropScan, Watcher
from lungwatch.daemon.logs import event
from lungwatch.daemon.pipeline.records import Claimed
from lungwatch.daemon.retry import Backoff
from lungwatch.daemon.stage import Context
from lungwatch.errors import describe

_POLL_S = 0.2
# Another user's file that may not be moved, or one on another file system.
_NOT_OURS = {errno.EACCES, errno.EPERM, errno.EXDEV}
_MAX_DELAY_S = 60.0
_RETRIES_AT_ONCE = 4  # before a file is reported as unusable
_LOCAL_STABILITY_S = 1.0
_REMOTE_STABILITY_S = 5.0


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


class Intake:
    """Intake of the drop folder, scanned at every hint and every `rescan_s`.

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
        # By path, when each came, in seconds since the epoch; read by other threads.
        self._waiting: dict[Path, float] = {}
        self._queued_left = 0

    @property
    def waiting(self) -> int:
        """Number of files to take, in the drop folder or in quarantine on request."""
        return len(self._waiting) + self._queued_left

    @property
    def oldest_waiting_at(self) -> float | None:
        """When the oldest file of the drop folder came, in seconds since the epoch, if any."""
        return min(tuple(self._waiting.values()), default=None)

    @property
    def unusable(self) -> int:
        """Number of files in the drop folder that cannot be taken."""
        return len(self._unusable)

    def run(self) -> None:
        """Resume files in `work/`, then scan repeatedly until stopped."""
        self.resume()
        while not self._stopped.is_set():
            # Cleared before the scan: a file that comes meanwhile starts the next scan.
            self._watcher.wake.clear()
            with self._context.progress.busy("intake"):
                self.scan()
            self._watcher.wake.wait(self._context.config.rescan_s)

    def stop(self) -> None:
        """End `run` after the file that is being claimed."""
        self._stopped.set()
        self._watcher.wake.set()

    def scan(self) -> bool:
        """Scan the whole drop folder once and claim every complete file.

        Returns
        -------
        bool
            Whether there was a file to take, now or later.
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
        self._unusable.forget_gone()
        for path in self._postponed:
            if not os.path.lexists(path):
                self._postponed.succeeded(path)
        queued = self._outages.wait_out(self._queued)
        self._waiting = {
            path: seen.changed_at_s for path, seen in found.items() if path not in self._unusable
        }
        self._queued_left = len(queued)
        for path in found:
            if self._is_due(path) and self._is_complete(path):
                self._claim(path, partial(self._claimer.take, path))
            if path in self._unusable or not os.path.lexists(path):
                self._waiting.pop(path, None)
        for path in [p for p in self._postponed if p not in found and self._is_due(p)]:
            self._claim(path, partial(self._claimer.resume, path))
        for path, source_name in queued:
            self._claim(path, partial(self._claimer.retry, path, source_name))
            self._queued_left -= 1
        return bool(queued) or any(
            path not in self._unusable for path in (*found, *self._postponed)
        )

    def resume(self) -> None:
        """Continue with the files that a previous process left in `work/`.

        One at a time: if one of them crashed that process, it is processed alone now, and the
        others do not use up their attempts with it.
        """
        # Before the first claim: afterwards the pipeline removes empty folders itself.
        for folder in list(self._context.home.work.iterdir()):
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()  # made for a file that was not moved into it
        for path in self._left_in_work():
            self._claim(path, partial(self._claimer.resume, path))
            while not self._stopped.is_set() and not self._in_flight.wait_empty(_POLL_S):
                pass

    def _left_in_work(self) -> list[Path]:
        files = self._context.home.work.rglob("*")
        return [path for path in files if path.is_file() and path.name != COPY_NAME]

    def _is_complete(self, path: Path) -> bool:
        self._beat()
        try:
            writer = writer_of(path)
        except FileNotFoundError:
            return False
        except OSError as error:
            self._unusable.report(path, error.strerror or "cannot be opened")
            return False
        return self._stability.is_complete(path, writer, self._clock.monotonic())

    def _claim(self, path: Path, claim: Callable[[], Claimed | None]) -> None:
        # The stop is checked before every claim: a file that is not claimed stays where it is.
        while (
            self._stopped.is_set()
            or not self._watermark.has_space()
            or self._outages.current
            or not self._in_flight.acquire(_POLL_S)
        ):
            self._beat()
            is_waiting = self._watermark.is_short or self._outages.current
            if self._stopped.wait(_POLL_S if is_waiting else 0):
                return
        self._beat()
        claimed, has_ended = None, False
        try:
            claimed = claim()
            # A known content has its end here; a file still being written to is back.
            has_ended = claimed is None and not os.path.lexists(path)
        except FileNotFoundError:
            pass  # removed again by its dropper
        except OSError as error:
            if error.errno in _NOT_OURS:
                self._unusable.report(path, error.strerror or "it cannot be moved")
            else:
                self._postpone(path, error)
        except ClaimInterrupted as error:
            self._postpone(error.path, error)
        finally:
            if claimed is None:
                self._in_flight.release(ended=has_ended)
        if claimed is not None:
            self._postponed.succeeded(path)
            self._submit(claimed)

    def _is_due(self, path: Path) -> bool:
        return self._postponed.is_due(path, self._clock.monotonic())

    def _postpone(self, path: Path, error: OSError | ClaimInterrupted) -> None:
        """Leave a file for later, later each time; reported once some retries have failed."""
        cause = error.__cause__ if isinstance(error, ClaimInterrupted) else error
        why = describe(cause) if isinstance(cause, OSError) else "it cannot be claimed"
        wait_s = self._postponed.failed(path, self._clock.monotonic())
        if self._postponed.failures(path) > _RETRIES_AT_ONCE:
            self._unusable.report(path, why)
        else:
            event("retry", level=logging.WARNING, error=why, wait_s=wait_s)
