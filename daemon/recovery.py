"""Recovery at start: rows and folders left by a dead process are brought together.

Files in `work/` are taken up by the intake, which claims them as if they had just been
moved there. What is left for this module are rows that speak of a file in `work/` which is
there no more, because the process died between moving it and saying so.
"""

import logging
from pathlib import Path

from sqlalchemy import Engine

from lungwatch.daemon.clock import Clock
from lungwatch.daemon.home import Home
from lungwatch.daemon.logs import event
from lungwatch.daemon.unpacking import resume_unpacked
from lungwatch.db.queries import TrackedFile, has_result, rows_in_work
from lungwatch.db.states import State
from lungwatch.db.store import Store
from lungwatch.errors import HomeError, Reason


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
        _mend(row, home, store, clock)
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


def _mend(row: TrackedFile, home: Home, store: Store, clock: Clock) -> None:
    filed = _find(home.done_path(row.sha256, row.received_at, ""))
    kept = _find(home.quarantine_path(row.sha256, row.reason or "", ""))
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


def _find(stem: Path) -> Path | None:
    """Return the file of this name with any extension."""
    found = sorted(stem.parent.glob(f"{stem.name}.*")) if stem.parent.is_dir() else []
    return found[0] if found else None


def _remove_temporaries(home: Home) -> None:
    """Remove half-written overlays, and half-made copies of files that had other names."""
    for folder in (home.overlays, home.work):
        for path in folder.rglob(".tmp-*"):
            path.unlink(missing_ok=True)
