"""Filing: the move to `done/` or `quarantine/` with its row, and recovery at start."""

import logging
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

from sqlalchemy import Engine

from lungwatch.daemon.home import Home
from lungwatch.daemon.intake.archives import resume_unpacked
from lungwatch.daemon.intake.custody import COPY_NAME
from lungwatch.daemon.logs import event
from lungwatch.daemon.pipeline.records import Claimed
from lungwatch.daemon.retry import Clock
from lungwatch.daemon.stage import Context, CrashPoint, crashpoint
from lungwatch.db.models import State
from lungwatch.db.queries import TrackedFile, has_result, rows_in_work
from lungwatch.db.results import Store
from lungwatch.errors import HomeError, Reason
from lungwatch.files import fsync_dir, make_dirs, move_atomic


class Filing:
    """Moves files to their last place. Every move can be repeated after a crash.

    A move and the update of the row happen together on the writer's thread: a second file of
    the same content, claimed in between, would find the first one gone.
    """

    def __init__(self, context: Context) -> None:
        self._home = context.home
        self._store = context.store
        self._writer = context.writer
        self._clock = context.clock

    def file(self, claim: Claimed) -> Path:
        """Move a recorded file to `done/`, then set its row to done; return its place."""
        now = self._clock.now()
        return self._place(
            claim,
            partial(self._home.done_path, claim.sha256, claim.received_at),
            lambda path: self._store.finish(result_id=claim.result_id, path=path, now=now),
            point="filed",
        )

    def quarantine(self, claim: Claimed, reason: str) -> Path:
        """Move a rejected or failed file to `quarantine/`; its row says so already.

        One that another model's result is done for stays in `done/`: two rows refer to it.
        """
        received_at = self._store.filed_as_done(claim.image_id)
        place = (
            partial(self._home.quarantine_path, claim.sha256, reason)
            if received_at is None
            else partial(self._home.done_path, claim.sha256, received_at)
        )
        return self._place(claim, place, point="quarantined")

    def refile(self, claim: Claimed) -> None:
        """Put back a content that is done, and whose file was gone from `done/`."""
        place = partial(self._home.done_path, claim.sha256, claim.received_at)
        self._place(claim, place)

    def set_aside(self, sha256: str, path: Path) -> None:
        """Move an object that lungwatch made itself to quarantine, without a row."""
        self._move(path, self._home.own_object_path(sha256))
        crashpoint("own_object")

    def discard(self, path: Path) -> None:
        """Remove a file whose very bytes are kept elsewhere in this home."""
        path.unlink(missing_ok=True)
        self._leave(path)

    def _place(
        self,
        claim: Claimed,
        place: Callable[[str], Path],
        update_row: Callable[[str], None] | None = None,
        *,
        point: CrashPoint | None = None,
    ) -> Path:
        """Move a file and update its row, or only its path; `place` takes the suffix."""
        target = place(claim.file.kind.value)
        relative = self._home.relative(target)

        def move_and_update() -> None:
            self._move(claim.path, target)
            if point is not None:
                crashpoint(point)
            if update_row is not None:
                update_row(relative)
            else:
                self._store.set_path(image_id=claim.image_id, path=relative)

        self._writer.call(move_and_update)
        return target

    def _move(self, source: Path, target: Path) -> None:
        make_dirs(target.parent)
        # After a transient error that follows the move, all of this is repeated.
        if os.path.lexists(source) or not target.is_file():
            move_atomic(source, target)
        self._leave(source)

    def _leave(self, path: Path) -> None:
        """Remove the folder that held one file's claim."""
        if path.parent.parent != self._home.work or not path.parent.is_dir():
            return
        # If another program put a file there, recovery handles it at the next start.
        if not any(path.parent.iterdir()):
            path.parent.rmdir()
            fsync_dir(self._home.work)


def recover(home: Home, engine: Engine, store: Store, clock: Clock) -> int:
    """Finish every row whose file was moved out of `work/` before the row was updated.

    Returns
    -------
    int
        How many rows were repaired.
    """
    _remove_temporaries(home)
    resume_unpacked(home, lambda sha256: has_result(engine, sha256, Reason.UNPACKED))
    repaired = 0
    for row in rows_in_work(engine):
        if row.path is not None and home.exists(row.path):
            continue
        _repair_row(row, home, store, clock)
        repaired += 1
    return repaired


def check_clear(home: Home, engine: Engine, model_id: int) -> None:
    """Refuse to continue after an interrupted run of another model, whose files are not this one's.

    Raises
    ------
    HomeError
        If a claimed result, or a file in `work/`, is another model's.
    """
    rows = [row for row in rows_in_work(engine) if row.state in (State.CLAIMED, State.RECORDED)]
    mine = {row.path for row in rows_in_work(engine) if row.model_id == model_id}
    others = [row for row in rows if row.model_id != model_id]
    files = [
        home.relative(path)
        for path in home.work.rglob("*")
        if path.is_file() and path.name != COPY_NAME
    ]
    if others or not mine.issuperset(files):
        raise HomeError(
            f"an interrupted run has left files in {home.work}: start the daemon, or "
            "`lungwatch run --once`, which continues with them, and then this command again"
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
            store.fail_vanished(result_id=row.result_id, now=clock.now())
        case _:
            # Another program removed it; the state of the row stays right.
            store.set_path(image_id=row.image_id, path=None)
    event("recovered", row.sha256, level=logging.WARNING, state=row.state)


def _find_filed(stem: Path) -> Path | None:
    """Return the file of this name with any extension."""
    found = sorted(stem.parent.glob(f"{stem.name}.*")) if stem.parent.is_dir() else []
    return found[0] if found else None


def _remove_temporaries(home: Home) -> None:
    """Remove half-written overlays, and half-made copies of an earlier version."""
    for folder in (home.overlays, home.work):
        for path in folder.rglob(".tmp-*"):
            path.unlink(missing_ok=True)
    for path in home.work.glob(f"*/{COPY_NAME}"):
        # Somebody removed the original: its copy is all that there is.
        if len(list(path.parent.iterdir())) == 1:
            path.rename(path.with_name("recovered"))
