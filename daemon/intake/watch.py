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
from collections.abc import Callable, Container, Iterator, Mapping
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
        self._is_scan_due = False
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
        self.ask_for_scan()

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

    def take_scan_due(self) -> bool:
        """Return whether something happened since the last call that only a scan can follow."""
        with self._lock:
            is_due, self._is_scan_due = self._is_scan_due, False
        return is_due

    def ask_for_scan(self) -> None:
        """Have the whole drop folder looked through as soon as possible."""
        with self._lock:
            self._is_scan_due = True
        self.wake.set()

    def _on_overflow(self) -> None:
        event("inotify_overflow", level=logging.WARNING, why="events were lost; rescanning")
        self.ask_for_scan()

    def dispatch(self, seen: FileSystemEvent) -> None:
        """Turn one event into a hint; called on the observer's thread."""
        match seen:
            case FileClosedEvent():
                self._note(seen.src_path, Hint.CLOSED)
            case FileMovedEvent():
                self._note(seen.dest_path, Hint.COMPLETE)
            case FileModifiedEvent():
                # No waking: a long copy modifies its file thousands of times.
                self._note(seen.src_path, Hint.WRITING, wake=False)
            case FileCreatedEvent():
                self._note(seen.src_path, Hint.APPEARED)
            case _ if seen.is_directory and seen.event_type in ("created", "moved"):
                # Files may have come into it before it was watched.
                self.ask_for_scan()

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
    """Files and folders in the drop folder that cannot be taken, each logged once."""

    def __init__(self) -> None:
        super().__init__()
        self._reported: set[Path] = set()

    def report(self, path: Path, reason: str) -> None:
        """Log once why a file cannot be taken, without its name, which may hold a patient's."""
        self._reported.add(path)
        if path not in self:
            self.add(path)
            event("left_alone", level=logging.WARNING, reason=reason, inode=_inode(path))

    def forget_gone(self, seen: Container[str]) -> None:
        """Forget those that a whole scan has neither found nor reported.

        Whether a path leads to something is not asked: one beyond PATH_MAX, or in a folder that
        may not be searched, would seem to be gone, and be logged at each scan.
        """
        reported, self._reported = self._reported, set()
        self.difference_update(
            [path for path in self if path not in reported and str(path) not in seen]
        )


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
    except (FileNotFoundError, NotADirectoryError):
        return float("inf")
    except OSError:
        return 0.0  # never to be examined, as beyond PATH_MAX: it is logged at once


class DropScan:
    """The scan of the whole drop folder, which may be paused at every file.

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
    seen
        Paths of the regular files that the scan in progress, or the last one, has found.
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
        self.seen: set[str] = set()

    def is_skipped(self, path: Path) -> bool:
        """Tell whether a file below the drop folder is skipped for its name or a folder's."""
        return any(self._names.rule_for(name) for name in path.relative_to(self._root).parts)

    def examine(self, path: Path) -> Snapshot | None:
        """Return what `lstat` tells of a file; None if it cannot be taken, or is gone."""
        try:
            status = path.lstat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            self.unusable.report(path, error.strerror or "cannot be examined")
            return None
        return self._usable(path, status)

    def _usable(self, path: Path, status: os.stat_result) -> Snapshot | None:
        if not stat.S_ISREG(status.st_mode):
            self.unusable.report(path, "not a regular file")
            return None
        if status.st_size > _MAX_BYTES:
            self.unusable.report(path, f"larger than {_MAX_BYTES >> 30} GiB")
            return None
        return Snapshot.of(status, self._clock.now().timestamp())

    def files(
        self, known: Container[str] = frozenset()
    ) -> Iterator[tuple[Path | str, Snapshot | None]]:
        """Yield every regular file, folder by folder, in no order.

        Parameters
        ----------
        known
            Paths of files that are not examined again; they come as a text, without a snapshot.

        Raises
        ------
        OSError
            If the drop folder itself cannot be listed.
        """
        self.seen = set()
        skipped: dict[Path, NameRule] = {}
        yield from self._walk(known, skipped)
        self.skipped.replace(skipped, self._clock.now().timestamp())

    def _walk(
        self, known: Container[str], skipped: dict[Path, NameRule]
    ) -> Iterator[tuple[Path | str, Snapshot | None]]:
        pending = [self._root]
        while pending:
            folder = pending.pop()
            self._beat()
            try:
                with os.scandir(folder) as entries:
                    for entry in entries:
                        if entry.path in known:
                            self.seen.add(entry.path)
                            yield entry.path, None
                        elif (rule := self._names.rule_for(entry.name)) is not None:
                            skipped[Path(entry.path)] = rule
                        elif self._is_folder(entry):
                            pending.append(Path(entry.path))
                        elif (snapshot := self._examined(entry)) is not None:
                            self.seen.add(entry.path)
                            yield Path(entry.path), snapshot
            except OSError as error:
                if folder == self._root:
                    raise
                # Emptied and removed meanwhile, or a link took its place.
                if not isinstance(error, (FileNotFoundError, NotADirectoryError)):
                    self.unusable.report(folder, error.strerror or "cannot be listed")

    @staticmethod
    def _is_folder(entry: os.DirEntry[str]) -> bool:
        try:
            return entry.is_dir(follow_symlinks=False)
        except OSError:
            return False  # `_examined` reports it

    def _examined(self, entry: os.DirEntry[str]) -> Snapshot | None:
        try:
            return self._usable(Path(entry.path), entry.stat(follow_symlinks=False))
        except FileNotFoundError:
            return None
        except OSError as error:
            self.unusable.report(Path(entry.path), error.strerror or "cannot be examined")
            return None
