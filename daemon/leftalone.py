"""Files in the drop folder that are not taken, each logged once."""

import contextlib
import logging
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from lungwatch.daemon.logs import event
from lungwatch.daemon.namerules import NameKind, NameRule

_WHY = {
    NameKind.LITTER: "another program's own, by its name",
    NameKind.UNFINISHED: "its name says that it is unfinished; rename it if it is complete",
}
# Another program's files are no concern of anybody; somebody may wait for the other ones.
_LEVELS = {NameKind.LITTER: logging.INFO, NameKind.UNFINISHED: logging.WARNING}


class LeftAlone:
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


class Skipped:
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
