"""Filing: the move to `done/` or `quarantine/`, and the row that records it."""

import os
from collections.abc import Callable
from datetime import datetime
from functools import partial
from pathlib import Path

from lungwatch.atomicfile import fsync_dir, make_dirs, move_atomic
from lungwatch.daemon.clock import Clock
from lungwatch.daemon.crashpoint import crashpoint
from lungwatch.daemon.home import SUFFIXES, Home, suffix_of
from lungwatch.daemon.writer import Writer
from lungwatch.db.store import Store


class Filing:
    """Moves files to their last place. Every move can be repeated after a crash.

    A move and the word of it to the row happen together on the writer's thread: a second file
    of the same content, claimed in between, would find the first one gone.
    """

    def __init__(self, home: Home, store: Store, writer: Writer, clock: Clock) -> None:
        self._home = home
        self._store = store
        self._writer = writer
        self._clock = clock

    def file(self, *, result_id: int, sha256: str, received_at: datetime, path: Path) -> Path:
        """Move a recorded file to `done/`, then set its row to done."""
        target = _target(path, partial(self._home.done_path, sha256, received_at))
        relative = self._home.relative(target)
        now = self._clock.now()

        def move_and_tell() -> None:
            self._move(path, target)
            crashpoint("filed")
            self._store.finish(result_id=result_id, path=relative, now=now)

        self._writer.call(move_and_tell)
        return target

    def quarantine(self, *, image_id: int, sha256: str, reason: str, path: Path) -> Path:
        """Move a rejected or failed file to `quarantine/`; its row says so already.

        One that another model's result is done for stays in `done/`: two rows tell of it.
        """
        received_at = self._store.filed_as_done(image_id)
        place = (
            partial(self._home.quarantine_path, sha256, reason)
            if received_at is None
            else partial(self._home.done_path, sha256, received_at)
        )
        target = _target(path, place)
        relative = self._home.relative(target)

        def move_and_tell() -> None:
            self._move(path, target)
            crashpoint("quarantined")
            self._store.set_path(image_id=image_id, path=relative)

        self._writer.call(move_and_tell)
        return target

    def refile(self, *, image_id: int, sha256: str, received_at: datetime, path: Path) -> None:
        """Put back a content that is done, and whose file was gone from `done/`."""
        target = _target(path, partial(self._home.done_path, sha256, received_at))
        relative = self._home.relative(target)

        def move_and_tell() -> None:
            self._move(path, target)
            self._store.set_path(image_id=image_id, path=relative)

        self._writer.call(move_and_tell)

    def set_aside(self, sha256: str, path: Path) -> None:
        """Move an object that lungwatch made itself to quarantine; no row tells of it."""
        self._move(path, self._home.own_object_path(sha256))
        crashpoint("own_object")

    def discard(self, path: Path) -> None:
        """Remove a file whose very bytes are kept elsewhere in this home."""
        path.unlink(missing_ok=True)
        self._leave(path)

    def _move(self, source: Path, target: Path) -> None:
        make_dirs(target.parent)
        # A passing trouble after the move has all of this repeated.
        if os.path.lexists(source) or not target.is_file():
            move_atomic(source, target)
        self._leave(source)

    def _leave(self, path: Path) -> None:
        """Remove the folder that held one file's claim."""
        if path.parent.parent != self._home.work or not path.parent.is_dir():
            return
        # A stranger's file in there stops this; the recovery looks at it at the next start.
        if not any(path.parent.iterdir()):
            path.parent.rmdir()
            fsync_dir(self._home.work)


def _target(path: Path, place: Callable[[str], Path]) -> Path:
    """Return where a file goes: `place` makes it of the suffix, which its content tells.

    A passing trouble after the move has the whole step repeated; the file is there by then.
    """
    try:
        return place(suffix_of(path))
    except FileNotFoundError:
        for target in map(place, SUFFIXES):
            if target.is_file():
                return target
        raise
