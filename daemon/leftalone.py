"""What lies in the drop folder and cannot be taken."""

import contextlib
import logging
import os
from pathlib import Path

from lungwatch.daemon.logs import event


class LeftAlone:
    """The files that are left lying, each said once."""

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
            inode = 0
            with contextlib.suppress(OSError):
                inode = path.lstat().st_ino
            event("left_alone", level=logging.WARNING, reason=reason, inode=inode)

    def forget_gone(self) -> None:
        """Forget those that somebody took away."""
        self._paths = {path for path in self._paths if os.path.lexists(path)}
