"""Watching of the drop folder: kernel events as hints, and the loss and return of the folder."""

import errno
import logging
import os
import threading
from collections.abc import Callable
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
from lungwatch.daemon.intake.eligibility import Hint
from lungwatch.daemon.logs import event
from lungwatch.daemon.retry import OutageKind, Outages
from lungwatch.errors import describe

# File systems whose changes may be made by another machine, unseen by this kernel.
_REMOTE = ("nfs", "cifs", "smb", "fuse", "9p", "afs", "ceph", "gluster", "lustre", "virtiofs")


class Watcher(FileSystemEventHandler):
    """Collects hints from inotify, or none at all where polling has to do.

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
        """Whether the rescan is on its own."""
        return self.kind == "polling"

    def start(self) -> None:
        """Begin to watch; falls back to polling where the kernel's limits are exhausted."""
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
        _tell_of_overflow(self._on_overflow)

    def stop(self) -> None:
        """End watching and wait for the observer's threads."""
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
        """Whether hints can still come; False means that the service has to stop."""
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
    """Takes the one message by which watchdog tells that the kernel's queue ran over."""

    def __init__(self, tell: Callable[[], None]) -> None:
        super().__init__(logging.WARNING)
        self._tell = tell

    def emit(self, record: logging.LogRecord) -> None:
        """Pass on an overflow; nothing else, since the messages hold paths."""
        if "events were lost" in record.getMessage():
            self._tell()


def _tell_of_overflow(tell: Callable[[], None]) -> None:
    log = logging.getLogger("watchdog.observers")
    log.handlers[:] = [_Overflow(tell)]
    log.propagate = False


def file_system_of(folder: Path, mountinfo: Callable[[], str] | None = None) -> str:
    """Return the type of the file system that holds a folder, "unknown" if it can't be told."""
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
    """Notices that the folder went and came back, and has the new one watched."""

    def __init__(self, home: Home, watcher: Watcher, outages: Outages) -> None:
        self._home = home
        self._watcher = watcher
        self._outages = outages
        self._watched = self._look()
        self._is_lost = False

    def is_there(self) -> bool:
        """Whether files can be taken from the folder.

        One that was put in its place since, by mounting or by making it again, is watched
        from now on.
        """
        try:
            identity = self._look()
        except OSError as error:
            self.lose(error)
            return False
        # A folder that was made again may have got its predecessor's inode.
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
        """Note that the folder cannot be looked at."""
        if not self._is_lost:
            self._is_lost = True
            self._outages.begin(OutageKind.DROP_FOLDER, describe(error))

    def _look(self) -> tuple[int, int]:
        """Return device and inode of a folder that can be listed."""
        status = self._home.incoming.stat()
        os.scandir(self._home.incoming).close()
        if status.st_dev != self._home.work.stat().st_dev:
            # What a mount leaves bare when it goes; nothing can be moved out of it.
            raise OSError(errno.EXDEV, "it is on another file system than work/")
        return status.st_dev, status.st_ino
