"""The thread that finds complete files in the drop folder and claims them."""

import contextlib
import errno
import logging
import os
import stat
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from lungwatch.daemon.claiming import Claimer
from lungwatch.daemon.clock import Clock
from lungwatch.daemon.home import Home
from lungwatch.daemon.inflight import InFlight
from lungwatch.daemon.logs import event
from lungwatch.daemon.records import Claimed
from lungwatch.daemon.stability import Snapshot, Stability
from lungwatch.daemon.watcher import Watcher
from lungwatch.daemon.writercheck import writer_of

# Names under which browsers, rsync, scp, Samba and editors build a file up.
_PARTIAL = (".part", ".partial", ".tmp", ".temp", ".crdownload", ".filepart", ".download", "~")
_POLL_S = 0.2
# The file is somebody's who does not let us move it, or on another file system.
_NOT_OURS = {errno.EACCES, errno.EPERM, errno.EXDEV}


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
    """

    def __init__(
        self,
        *,
        home: Home,
        watcher: Watcher,
        stability: Stability,
        claimer: Claimer,
        in_flight: InFlight,
        clock: Clock,
        rescan_s: float,
        min_free_mb: int,
        stopped: threading.Event,
        queued: Callable[[], list[tuple[Path, str]]],
        submit: Callable[[Claimed], None],
    ) -> None:
        self._home = home
        self._watcher = watcher
        self._stability = stability
        self._claimer = claimer
        self._in_flight = in_flight
        self._clock = clock
        self._rescan_s = rescan_s
        self._min_free_mb = min_free_mb
        self._queued = queued
        self._submit = submit
        self._stopped = stopped
        self._complained: set[Path] = set()
        self._is_short_of_space = False
        self.waiting = 0

    @property
    def left_alone(self) -> int:
        """Files that are seen and cannot be taken."""
        return len(self._complained)

    def run(self) -> None:
        """Take up what was in hand, then look again and again until stopped."""
        self.resume()
        while not self._stopped.is_set():
            # Cleared before looking: what comes during the look wakes the next one.
            self._watcher.wake.clear()
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
        for path, hint in self._watcher.take_hints().items():
            self._stability.hint(path, hint)
        found = dict(self._files())
        now_s = self._clock.monotonic()
        for path, snapshot in found.items():
            self._stability.observe(path, snapshot, now_s)
        self._stability.keep_only(found)
        self._complained = {path for path in self._complained if os.path.lexists(path)}
        queued = self._queued()
        self.waiting = len(found) + len(queued)
        for path in found:
            if self._is_complete(path):
                self._claim(path, partial(self._claimer.take, path))
            self.waiting -= 1
        for path, source_name in queued:
            self._claim(path, partial(self._claimer.retry, path, source_name))
            self.waiting -= 1
        return bool(queued) or any(path not in self._complained for path in found)

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

    def _files(self) -> Iterator[tuple[Path, Snapshot]]:
        """Yield every regular file in the drop folder, folder by folder, in the order of names."""
        now = self._clock.now().timestamp()
        pending = [self._home.incoming]
        while pending:
            folder = pending.pop()
            try:
                entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
            except OSError as error:
                if folder == self._home.incoming:
                    raise
                self._complain(folder, error.strerror or "cannot be listed")
                continue
            for entry in entries:
                path = Path(entry.path)
                try:
                    if entry.is_dir(follow_symlinks=False):
                        if not entry.name.startswith("."):
                            pending.append(path)
                        continue
                    status = entry.stat(follow_symlinks=False)
                except FileNotFoundError:
                    continue
                if entry.name.startswith(".") or entry.name.lower().endswith(_PARTIAL):
                    continue
                if not stat.S_ISREG(status.st_mode):
                    self._complain(path, "not a regular file")
                    continue
                yield (
                    path,
                    Snapshot(
                        size_bytes=status.st_size,
                        mtime_ns=status.st_mtime_ns,
                        inode=status.st_ino,
                        age_s=now - status.st_mtime,
                    ),
                )

    def _is_complete(self, path: Path) -> bool:
        try:
            writer = writer_of(path)
        except FileNotFoundError:
            return False
        except OSError as error:
            self._complain(path, error.strerror or "cannot be opened")
            return False
        return self._stability.is_complete(path, writer, self._clock.monotonic())

    def _claim(self, path: Path, claim: Callable[[], Claimed | None]) -> None:
        # The stop is looked at before every claim: what is not claimed stays where it is.
        while (
            self._stopped.is_set() or not self._has_space() or not self._in_flight.acquire(_POLL_S)
        ):
            if self._stopped.wait(_POLL_S if self._is_short_of_space else 0):
                return
        claimed = None
        try:
            claimed = claim()
        except FileNotFoundError:
            pass  # taken away again by whoever dropped it
        except OSError as error:
            if error.errno not in _NOT_OURS:
                raise
            self._complain(path, error.strerror or "it cannot be moved")
        finally:
            if claimed is None:
                self._in_flight.release()
        if claimed is not None:
            self._submit(claimed)

    def _has_space(self) -> bool:
        """Whether there is room for more; says so when that changes."""
        free_mb = self._home.free_mb()
        is_short = free_mb < self._min_free_mb
        if is_short != self._is_short_of_space:
            self._is_short_of_space = is_short
            action = "paused" if is_short else "resumed"
            event(
                action,
                level=logging.WARNING,
                reason="disk",
                free_mb=free_mb,
                min_free_mb=self._min_free_mb,
            )
        return not is_short

    def _complain(self, path: Path, reason: str) -> None:
        """Say once why a file is left lying; its name may hold a patient's."""
        if path not in self._complained:
            self._complained.add(path)
            inode = 0
            with contextlib.suppress(OSError):
                inode = path.lstat().st_ino
            event("left_alone", level=logging.WARNING, reason=reason, inode=inode)
