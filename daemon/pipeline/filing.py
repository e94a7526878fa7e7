"""Filing: the move to `done/` or `quarantine/` with its row, and recovery at start."""

import logging
import os
from collections.abc import Callable
from datetime import datetime
from functools import partial
from pathlib import Path

from sqlalchemy import Engine

from lungwatch.daemon.home import Home
from lungwatch.daemon.intake.archives import resume_unpacked
from lungwatch.daemon.logs import event
from lungwatch.daemon.retry import Clock
from lungwatch.daemon.stage import DatabaseWriter, crashpoint
from lungwatch.db.queries import TrackedFile, has_result, rows_in_work
from lungwatch.db.results import Store
from lungwatch.db.states import State
from lungwatch.errors import HomeError, Reason
from lungwatch.files import FileKind, file_kind, fsync_dir, make_dirs, move_atomic


class Filing:
    """Moves files to their last place. Every move can be repeated after a crash.

    A move and the word of it to the row happen together on the writer's thread: a second file
    of the same content, claimed in between, would find the first one gone.
    """

    def __init__(self, home: Home, store: Store, writer: DatabaseWriter, clock: Clock) -> None:
        self._home = home
        self._store = store
        self._writer = writer
        self._clock = clock

    def file(self, *, result_id: int, sha256: str, received_at: datetime, path: Path) -> Path:
        """Move a recorded file to `done/`, then set its row to done."""
        target = _target_path(path, partial(self._home.done_path, sha256, received_at))
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
        target = _target_path(path, place)
        relative = self._home.relative(target)

        def move_and_tell() -> None:
            self._move(path, target)
            crashpoint("quarantined")
            self._store.set_path(image_id=image_id, path=relative)

        self._writer.call(move_and_tell)
        return target

    def refile(self, *, image_id: int, sha256: str, received_at: datetime, path: Path) -> None:
        """Put back a content that is done, and whose file was gone from `done/`."""
        target = _target_path(path, partial(self._home.done_path, sha256, received_at))
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


def _target_path(path: Path, place: Callable[[str], Path]) -> Path:
    """Return where a file goes: `place` makes it of the suffix, which its content tells.

    A passing trouble after the move has the whole step repeated; the file is there by then.
    """
    try:
        return place(file_kind(path).value)
    except FileNotFoundError:
        for target in (place(kind.value) for kind in FileKind):
            if target.is_file():
                return target
        raise


def recover(home: Home, engine: Engine, store: Store, clock: Clock) -> int:
    """Finish every row whose file was moved out of `work/` before the row was told.

    Returns
    -------
    int
        How many rows were mended.
    """
    _remove_temporaries(home)
    resume_unpacked(home, lambda sha256: has_result(engine, sha256, Reason.UNPACKED))
    mended = 0
    for row in rows_in_work(engine):
        if row.path is not None and home.exists(row.path):
            continue
        _repair_row(row, home, store, clock)
        mended += 1
    return mended


def check_clear(home: Home, engine: Engine, model_id: int) -> None:
    """Refuse to go on where a run of another model was cut off: its files are that model's.

    Raises
    ------
    HomeError
        If something is in hand, or in `work/`, that is not this model's.
    """
    rows = [row for row in rows_in_work(engine) if row.state in (State.CLAIMED, State.RECORDED)]
    mine = {row.path for row in rows_in_work(engine) if row.model_id == model_id}
    others = [row for row in rows if row.model_id != model_id]
    files = [home.relative(path) for path in home.work.rglob("*") if path.is_file()]
    if others or not mine.issuperset(files):
        raise HomeError(
            f"a run that was cut off has left files in {home.work}: start the daemon, or "
            "`lungwatch run --once`, which goes on with them, and then this command again"
        )


def _repair_row(row: TrackedFile, home: Home, store: Store, clock: Clock) -> None:
    filed = _find_filed(home.done_path(row.sha256, row.received_at, ""))
    kept = _find_filed(home.quarantine_path(row.sha256, row.reason or "", ""))
    match row.state:
        case State.RECORDED if filed:
            store.finish(result_id=row.result_id, path=home.relative(filed), now=clock.now())
        case State.DONE if filed:
            store.set_path(image_id=row.image_id, path=home.relative(filed))
        # In done/ if it was scored by another model, too.
        case State.REJECTED | State.FAILED | State.QUEUED if place := kept or filed:
            store.set_path(image_id=row.image_id, path=home.relative(place))
        case State.CLAIMED | State.RECORDED:
            store.lose(result_id=row.result_id, now=clock.now())
        case _:
            # Only somebody else can have removed it; the row's own state stays true.
            store.set_path(image_id=row.image_id, path=None)
    event("recovered", row.sha256, level=logging.WARNING, state=row.state)


def _find_filed(stem: Path) -> Path | None:
    """Return the file of this name with any extension."""
    found = sorted(stem.parent.glob(f"{stem.name}.*")) if stem.parent.is_dir() else []
    return found[0] if found else None


def _remove_temporaries(home: Home) -> None:
    """Remove half-written overlays, and half-made copies of files that had other names."""
    for folder in (home.overlays, home.work):
        for path in folder.rglob(".tmp-*"):
            path.unlink(missing_ok=True)
