"""One look at the whole drop folder: which files are there, and how each looks."""

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from lungwatch.daemon.clock import Clock
from lungwatch.daemon.leftalone import LeftAlone, Skipped
from lungwatch.daemon.namerules import NameRule, NameRules
from lungwatch.daemon.stability import Snapshot

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
    left_alone
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
        left_alone: LeftAlone,
        skipped: Skipped,
        clock: Clock,
        beat: Callable[[], None],
    ) -> None:
        self._root = root
        self._names = names
        self._left_alone = left_alone
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
                self._left_alone.add(folder, error.strerror or "cannot be listed")
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
                    self._left_alone.add(path, error.strerror or "cannot be looked at")
                    continue
                if not stat.S_ISREG(status.st_mode):
                    self._left_alone.add(path, "not a regular file")
                    continue
                if status.st_size > _MAX_BYTES:
                    self._left_alone.add(path, f"larger than {_MAX_BYTES >> 30} GiB")
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
