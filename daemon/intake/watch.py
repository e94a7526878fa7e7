"""Watching and scanning of the drop folder: kernel events, complete scans, skipped files.

Kernel events are hints and never the truth: inotify loses events when its queue overflows, sees
nothing of what other machines write to a network share, and knows nothing of files in folders
that were created a moment ago. The scan finds everything; a hint only makes it sooner.
"""

import contextlib
import errno
import logging
import os
import stat
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from watchdog.events import (
    FileClosedEvent,
    FileCreatedEvent,
    FileModifiedEvent,
    FileMovedEvent,
    FileSystemEvent,
    FileSystemEventHandler,
)
from watchdog.observers.inotify import InotifyObserver

from lungwatch.daemon.config import ObserverChoice
from lungwatch.daemon.home import Home
from lungwatch.daemon.intake.eligibility import Hint, NameKind, NameRule, NameRules, Snapshot
from lungwatch.daemon.logs import event
from lungwatch.daemon.retry import Clock, OutageKind, Outages
from lungwatch.errors import describe

# File systems whose changes may be made by another machine, unseen by this kernel.
_REMOTE = ("nfs", "cifs", "smb", "fuse", "9p", "afs", "ceph", "gluster", "lustre", "virtiofs")
# Hashing a sparse file of many terabytes would keep every other file waiting for hours.
_MAX_BYTES = 8 << 30
_WHY = {
    NameKind.LITTER: "another program's own, by its name",
    NameKind.UNFINISHED: "its name says that it is unfinished; rename it if it is complete",
}
# Another program's files concern no user; a user may wait for the other ones.
_LEVELS = {NameKind.LITTER: logging.INFO, NameKind.UNFINISHED: logging.WARNING}


class Watcher(FileSystemEventHandler):
    """Collector of hints from inotify; of none where the drop folder is only polled.

    Parameters
    ----------
    folder
        The drop folder, watched with everything below it.
    choice
        "auto", "inotify" or "polling".
    """

    def __init__(self, folder: Path, choice: ObserverChoice) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._hints: dict[Path, Hint] = {}
        self._observer: InotifyObserver | None = None
        self.wake = threading.Event()
        self._choice = choice
        self._is_restarting = False
        self.kind, self.why = _choose(folder, choice)

    @property
    def is_polling(self) -> bool:
        """Tell whether there are no hints, only rescans."""
        return self.kind == "polling"

    def start(self) -> None:
        """Start watching; fall back to polling where the kernel's limits are exhausted."""
        if self.is_polling:
            return
        # Directories are watched for all events; FileOpened and the like are filtered here.
        try:
            # Without a free inotify instance the observer cannot even be made.
            observer = InotifyObserver()
            observer.schedule(self, str(self._folder), recursive=True)
            observer.start()
        except OSError as error:
            self.kind = "polling"
            self.why = f"inotify is not available: {error.strerror}"
            return
        self._observer = observer
        _report_overflow(self._on_overflow)

    def stop(self) -> None:
        """Stop watching and wait for the observer's threads."""
        if self._observer is not None:
            # watchdog logs an error when its thread wakes up after the stop that woke it.
            logging.getLogger("watchdog.observers.inotify").setLevel(logging.CRITICAL)
            self._observer.stop()
            self._observer.join()
            self._observer = None

    def restart(self) -> None:
        """Watch the folder that is at the path now."""
        self._is_restarting = True
        try:
            self.stop()
            self.kind, self.why = _choose(self._folder, self._choice)
            self.start()
        finally:
            self._is_restarting = False
        self.wake.set()

    @property
    def is_alive(self) -> bool:
        """Tell whether hints can still come; if not, the service has to stop."""
        observer = self._observer
        return (
            self.is_polling or self._is_restarting or (observer is not None and observer.is_alive())
        )

    def take_hints(self) -> dict[Path, Hint]:
        """Return the hints since the last call."""
        with self._lock:
            hints, self._hints = self._hints, {}
        return hints

    def _on_overflow(self) -> None:
        event("inotify_overflow", level=logging.WARNING, why="events were lost; rescanning")
        self.wake.set()

    def dispatch(self, seen: FileSystemEvent) -> None:
        """Turn one event into a hint; called on the observer's thread."""
        match seen:
            case FileClosedEvent():
                self._note(seen.src_path, Hint.COMPLETE)
            case FileMovedEvent():
                self._note(seen.dest_path, Hint.COMPLETE)
            case FileModifiedEvent():
                # No waking: a long copy modifies its file thousands of times.
                self._note(seen.src_path, Hint.WRITING, wake=False)
            case FileCreatedEvent():
                self._note(seen.src_path, Hint.APPEARED)
            case _ if seen.is_directory and seen.event_type in ("created", "moved"):
                self.wake.set()

    def _note(self, path: str | bytes, hint: Hint, *, wake: bool = True) -> None:
        name = path.decode(errors="surrogateescape") if isinstance(path, bytes) else path
        if not name:
            return
        with self._lock:
            self._hints[Path(name)] = hint
        if wake:
            self.wake.set()


class _Overflow(logging.Handler):
    """Handler for the message by which watchdog reports that the kernel's queue overflowed."""

    def __init__(self, report: Callable[[], None]) -> None:
        super().__init__(logging.WARNING)
        self._report = report

    def emit(self, record: logging.LogRecord) -> None:
        """Report an overflow and nothing else, since the messages hold paths."""
        if "events were lost" in record.getMessage():
            self._report()


def _report_overflow(report: Callable[[], None]) -> None:
    log = logging.getLogger("watchdog.observers")
    log.handlers[:] = [_Overflow(report)]
    log.propagate = False


def file_system_of(folder: Path, mountinfo: Callable[[], str] | None = None) -> str:
    """Return the type of the file system that holds a folder; "unknown" if it is not known."""
    read = mountinfo or Path("/proc/self/mountinfo").read_text
    try:
        lines = read().splitlines()
    except OSError:
        return "unknown"
    best, kind = -1, "unknown"
    resolved = folder.resolve()
    for line in lines:
        # proc(5): 36 35 98:0 /root /mount/point options - type source options
        before, _, after = line.partition(" - ")
        mount = Path(before.split()[4].replace("\\040", " "))
        if resolved.is_relative_to(mount) and len(mount.parts) >= best:
            best, kind = len(mount.parts), after.split()[0]
    return kind


def _choose(folder: Path, choice: ObserverChoice) -> tuple[str, str]:
    if choice != "auto":
        return choice, "set in the configuration"
    kind = file_system_of(folder)
    if kind.startswith(_REMOTE):
        return "polling", f"{kind} may change from other machines"
    return "inotify", f"{kind} is local"


class DropFolder:
    """The drop folder itself: its loss and return. A new folder at its path is watched again."""

    def __init__(self, home: Home, watcher: Watcher, outages: Outages) -> None:
        self._home = home
        self._watcher = watcher
        self._outages = outages
        self._watched = self._look()
        self._is_lost = False

    def is_there(self) -> bool:
        """Tell whether files can be taken from the folder.

        A folder that took its place, mounted or created again, is watched from now on.
        """
        try:
            identity = self._look()
        except OSError as error:
            self.lose(error)
            return False
        # A folder that was created again may have its predecessor's inode.
        is_new = self._is_lost or identity != self._watched
        if self._is_lost:
            self._is_lost = False
            self._outages.end(OutageKind.DROP_FOLDER)
        if is_new:
            self._watched = identity
            self._watcher.restart()
            event("watching", observer=self._watcher.kind, why=self._watcher.why)
        return True

    def lose(self, error: OSError) -> None:
        """Note that the folder cannot be read."""
        if not self._is_lost:
            self._is_lost = True
            self._outages.begin(OutageKind.DROP_FOLDER, describe(error))

    def _look(self) -> tuple[int, int]:
        """Return device and inode of a folder that can be listed."""
        status = self._home.incoming.stat()
        os.scandir(self._home.incoming).close()
        if status.st_dev != self._home.work.stat().st_dev:
            # The mount point under a file system that was unmounted; files cannot be moved out.
            raise OSError(errno.EXDEV, "it is on another file system than work/")
        return status.st_dev, status.st_ino


class UnusableFiles(set[Path]):
    """Files in the drop folder that cannot be taken, each logged once."""

    def report(self, path: Path, reason: str) -> None:
        """Log once why a file cannot be taken, without its name, which may hold a patient's."""
        if path not in self:
            self.add(path)
            event("left_alone", level=logging.WARNING, reason=reason, inode=_inode(path))

    def forget_gone(self) -> None:
        """Forget those that were removed."""
        self.difference_update([path for path in self if not os.path.lexists(path)])


class SkippedFiles:
    """Files and folders that the last scan skipped for their names, each logged once.

    Parameters
    ----------
    log_after_s
        Seconds without a change after which a file with an unfinished file's name is logged;
        most are renamed before.

    Attributes
    ----------
    by_pattern
        Their number by pattern; a folder counts as one. Thread-safe.
    """

    def __init__(self, log_after_s: float) -> None:
        self._log_after_s = log_after_s
        self._found: Mapping[Path, NameRule] = {}
        self._logged: set[Path] = set()
        self.by_pattern: Mapping[str, int] = {}

    def replace(self, found: Mapping[Path, NameRule], now: float) -> None:
        """Set what a scan found, at `now` in seconds since the epoch, and log what is due."""
        self._found = found
        self._logged &= found.keys()
        self.by_pattern = dict(Counter(rule.pattern for rule in found.values()))
        for path, rule in found.items():
            if path not in self._logged and (
                rule.kind is NameKind.LITTER or now - _changed_at(path) >= self._log_after_s
            ):
                self._log(path, rule)

    def log_all(self) -> None:
        """Log what was not due yet, since no scan follows."""
        for path, rule in self._found.items():
            if path not in self._logged:
                self._log(path, rule)

    def _log(self, path: Path, rule: NameRule) -> None:
        self._logged.add(path)
        event(
            "skipped",
            level=_LEVELS[rule.kind],
            pattern=rule.pattern,
            reason=_WHY[rule.kind],
            inode=_inode(path),
        )


def _inode(path: Path) -> int:
    with contextlib.suppress(OSError):
        return path.lstat().st_ino
    return 0


def _changed_at(path: Path) -> float:
    """Return when a file was last changed, in seconds since the epoch; infinity if it is gone."""
    try:
        # It cannot be set back, while a copy keeps the original's mtime.
        return path.lstat().st_ctime
    except OSError:
        return float("inf")


class DropScan:
    """The scan of the whole drop folder.

    Parameters
    ----------
    root
        The drop folder.
    names
        Which names are skipped; of a folder, with all that is in it.
    skip_log_s
        See `SkippedFiles`.
    beat
        Called at each folder: a scan of many files takes its time.

    Attributes
    ----------
    unusable
        What can never be taken: no regular file, too large, not readable.
    skipped
        What the last scan skipped for its name.
    """

    def __init__(
        self,
        root: Path,
        names: NameRules,
        *,
        skip_log_s: float,
        clock: Clock,
        beat: Callable[[], None],
    ) -> None:
        self._root = root
        self._names = names
        self._clock = clock
        self._beat = beat
        self.unusable = UnusableFiles()
        self.skipped = SkippedFiles(skip_log_s)

    def files(self) -> Iterator[tuple[Path, Snapshot]]:
        """Yield every regular file, folder by folder, in the order of names.

        Raises
        ------
        OSError
            If the drop folder itself cannot be listed.
        """
        now = self._clock.now().timestamp()
        skipped: dict[Path, NameRule] = {}
        pending = [self._root]
        while pending:
            folder = pending.pop()
            self._beat()
            try:
                entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
            except OSError as error:
                if folder == self._root:
                    raise
                if isinstance(error, FileNotFoundError):
                    continue  # emptied and removed meanwhile
                self.unusable.report(folder, error.strerror or "cannot be listed")
                continue
            for entry in entries:
                path = Path(entry.path)
                if (rule := self._names.rule_for(entry.name)) is not None:
                    skipped[path] = rule
                    continue
                try:
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(path)
                        continue
                    status = entry.stat(follow_symlinks=False)
                except FileNotFoundError:
                    continue
                except OSError as error:
                    self.unusable.report(path, error.strerror or "cannot be examined")
                    continue
                if not stat.S_ISREG(status.st_mode):
                    self.unusable.report(path, "not a regular file")
                    continue
                if status.st_size > _MAX_BYTES:
                    self.unusable.report(path, f"larger than {_MAX_BYTES >> 30} GiB")
                    continue
                yield (
                    path,
                    Snapshot(
                        size_bytes=status.st_size,
                        mtime_ns=status.st_mtime_ns,
                        inode=status.st_ino,
                        age_s=now - status.st_mtime,
                        # It cannot be set back, while a copy keeps the original's mtime.
                        changed_at_s=status.st_ctime,
                    ),
                )
        self.skipped.replace(skipped, now)
