"""Removing what has been kept for long enough: never a file that is not finished with."""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Literal

from sqlalchemy import Engine

from lungwatch.atomicfile import fsync_dir
from lungwatch.daemon.config import Config
from lungwatch.daemon.home import Home
from lungwatch.db.keeping import (
    Kept,
    forget_original,
    forget_overlay,
    kept_originals,
    kept_overlays,
)

Folder = Literal["done", "quarantine", "overlays"]
_GIB = 1024**3


@dataclass(frozen=True, kw_only=True)
class Removal:
    """A file that is to go.

    Attributes
    ----------
    folder
        Which of the home's folders it is in.
    why
        "age" or "space".
    """

    folder: Folder
    kept: Kept
    size_bytes: int
    why: Literal["age", "space"]


class Retention:
    """Applies the limits of a configuration to a home, beside a running daemon or without one.

    The row is changed first, on condition that the file is still finished with, then the file is
    removed. What a crash leaves between the two, `lungwatch reconcile` removes.
    """

    def __init__(self, config: Config, home: Home, engine: Engine) -> None:
        self._config = config
        self._home = home
        self._engine = engine

    def plan(self, now: datetime) -> list[Removal]:
        """Return what the limits want removed, the oldest first.

        Raises
        ------
        DatabaseError
            If the database cannot be read.
        """
        found = sorted(self._files(), key=lambda item: item[1].finished_at)
        limits = {
            "done": self._config.retain_done_days,
            "quarantine": self._config.retain_quarantine_days,
            "overlays": self._config.retain_overlays_days,
        }
        chosen: list[Removal] = []
        left: list[tuple[Folder, Kept, int]] = []
        for folder, kept, size in found:
            days = limits[folder]
            if days and kept.finished_at < now - timedelta(days=days):
                chosen.append(Removal(folder=folder, kept=kept, size_bytes=size, why="age"))
            else:
                left.append((folder, kept, size))
        if self._config.retain_max_gb:
            too_many = sum(size for *_, size in left) - self._config.retain_max_gb * _GIB
            for folder, kept, size in left:
                if too_many <= 0:
                    break
                chosen.append(Removal(folder=folder, kept=kept, size_bytes=size, why="space"))
                too_many -= size
        return chosen

    def remove(self, removal: Removal, now: datetime) -> bool:
        """Remove one file; False if it is in use again.

        Raises
        ------
        DatabaseError
            If the row cannot be changed; the file stays then.
        OSError
            If the file cannot be removed.
        """
        kept = removal.kept
        forgotten = (
            forget_overlay(self._engine, kept)
            if removal.folder == "overlays"
            else forget_original(self._engine, kept, now)
        )
        if not forgotten:
            return False
        path = self._home.absolute(kept.path)
        path.unlink(missing_ok=True)
        fsync_dir(path.parent)
        self._tidy(path.parent, self._home.root / removal.folder)
        return True

    def _files(self) -> Iterator[tuple[Folder, Kept, int]]:
        for kept in kept_originals(self._engine):
            folder: Folder = "done" if kept.path.startswith("done/") else "quarantine"
            if (size := self._size(kept.path)) is not None:
                yield folder, kept, size
        for kept in kept_overlays(self._engine):
            if (size := self._size(kept.path)) is not None:
                yield "overlays", kept, size

    def _size(self, relative: str) -> int | None:
        path = self._home.absolute(relative)
        # A link put there by somebody may lead anywhere; a missing file is reconcile's to tell.
        if not path.is_file() or path.resolve() != self._home.root.resolve() / relative:
            return None
        return path.stat().st_size

    @staticmethod
    def _tidy(folder: Path, root: Path) -> None:
        """Remove the date folders that have become empty."""
        while folder != root and not any(folder.iterdir()):
            try:
                folder.rmdir()
            except OSError:  # the daemon has just filed something there
                return
            folder = folder.parent
