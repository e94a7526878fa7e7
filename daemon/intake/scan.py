"""Scan of the drop folder: the files that wait, and those that are skipped, each logged once."""

import contextlib
import logging
import os
import stat
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from lungwatch.daemon.intake.eligibility import NameKind, NameRule, NameRules, Snapshot
from lungwatch.daemon.logs import event
from lungwatch.daemon.retry import Clock


class WaitingFiles:
    """The files that wait, as the last look at the drop folder found them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._since: dict[Path, float] = {}

    @property
    def count(self) -> int:
        """How many wait."""
        with self._lock:
            return len(self._since)

    @property
    def oldest_at(self) -> float | None:
        """When the oldest of them came, in seconds since the epoch; None if none waits."""
        with self._lock:
            return min(self._since.values(), default=None)

    def replace(self, since: Mapping[Path, float]) -> None:
        """Take over a new look: the files and when each came, in seconds since the epoch."""
        with self._lock:
            self._since = dict(since)

    def leave(self, path: Path) -> None:
        """Note that a file waits no longer."""
        with self._lock:
            self._since.pop(path, None)


_WHY = {
    NameKind.LITTER: "another program's own, by its name",
    NameKind.UNFINISHED: "its name says that it is unfinished; rename it if it is complete",
}

# Another program's files are no concern of anybody; somebody may wait for the other ones.
_LEVELS = {NameKind.LITTER: logging.INFO, NameKind.UNFINISHED: logging.WARNING}


class UnusableFiles:
    """The files that cannot be taken."""

    def __init__(self) -> None:
        self._paths: set[Path] = set()

    def __len__(self) -> int:
        return len(self._paths)

    def __contains__(self, path: Path) -> bool:
        return path in self._paths

    def add(self, path: Path, reason: str) -> None:
        """Say once why a file is left lying; its name may hold a patient's."""
        if path not in self._paths:
            self._paths.add(path)
            event("left_alone", level=logging.WARNING, reason=reason, inode=_inode(path))

    def forget_gone(self) -> None:
        """Forget those that somebody took away."""
        self._paths = {path for path in self._paths if os.path.lexists(path)}


class SkippedFiles:
    """Files and folders that are skipped for their names, as the last look found them.

    Parameters
    ----------
    told_after_s
        Seconds without a change after which a file is logged that its name calls unfinished:
        most are renamed before.
    """

    def __init__(self, told_after_s: float) -> None:
        self._told_after_s = told_after_s
        self._found: Mapping[Path, NameRule] = {}
        self._told: set[Path] = set()
        self._by_pattern: Mapping[str, int] = {}

    @property
    def by_pattern(self) -> Mapping[str, int]:
        """How many there are of each pattern; a folder is one. For all threads."""
        return self._by_pattern

    def replace(self, found: Mapping[Path, NameRule], now: float) -> None:
        """Take over a new look, at `now` in seconds since the epoch, and log what is due."""
        self._found = found
        self._told &= found.keys()
        self._by_pattern = dict(Counter(rule.pattern for rule in found.values()))
        for path, rule in found.items():
            if path not in self._told and (
                rule.kind is NameKind.LITTER or now - _changed_at(path) >= self._told_after_s
            ):
                self._tell(path, rule)

    def tell_all(self) -> None:
        """Log what has not been due: there is no other look."""
        for path, rule in self._found.items():
            if path not in self._told:
                self._tell(path, rule)

    def _tell(self, path: Path, rule: NameRule) -> None:
        self._told.add(path)
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
    """Return when a file was last changed, in seconds since the epoch; infinity for a lost one."""
    try:
        # Nobody can set it back, and a copy keeps the original's mtime.
        return path.lstat().st_ctime
    except OSError:
        return float("inf")


# To hash a sparse file of many terabytes, which costs its dropper nothing, would keep every other
# file waiting for hours, and starve the watchdog.
_MAX_BYTES = 8 << 30


class DropScan:
    """Walks through the drop folder.

    Parameters
    ----------
    root
        The drop folder.
    names
        Which names are skipped; of a folder, with all that is in it.
    unusable
        Gets what can never be taken: what is no regular file, is too large or cannot be seen.
    skipped
        Gets what is skipped for its name, anew at each look.
    beat
        Called at each folder: a look at many files takes its time.
    """

    def __init__(
        self,
        root: Path,
        *,
        names: NameRules,
        unusable: UnusableFiles,
        skipped: SkippedFiles,
        clock: Clock,
        beat: Callable[[], None],
    ) -> None:
        self._root = root
        self._names = names
        self._unusable = unusable
        self._skipped = skipped
        self._clock = clock
        self._beat = beat

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
                self._unusable.add(folder, error.strerror or "cannot be listed")
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
                    self._unusable.add(path, error.strerror or "cannot be looked at")
                    continue
                if not stat.S_ISREG(status.st_mode):
                    self._unusable.add(path, "not a regular file")
                    continue
                if status.st_size > _MAX_BYTES:
                    self._unusable.add(path, f"larger than {_MAX_BYTES >> 30} GiB")
                    continue
                yield (
                    path,
                    Snapshot(
                        size_bytes=status.st_size,
                        mtime_ns=status.st_mtime_ns,
                        inode=status.st_ino,
                        age_s=now - status.st_mtime,
                        # Nobody can set it back, and a copy keeps the original's mtime.
                        changed_at_s=status.st_ctime,
                    ),
                )
        self._skipped.replace(skipped, now)
