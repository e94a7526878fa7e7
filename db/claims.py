"""Claims: start, repeat or skip the run of a dropped file."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import NamedTuple

from sqlalchemy import ColumnElement, Connection, insert, select, update

from lungwatch.db.engine import change_state, clean, insert_if_new
from lungwatch.db.models import Arrival, Image, Result, State
from lungwatch.errors import Reason


class _CurrentResult(NamedTuple):
    """A result as the claim finds it."""

    id: int
    state: State
    attempts: int
    reason: str | None


class ClaimKind(StrEnum):
    """Instruction to the caller of a claim."""

    RUN = "run"
    """Process it."""
    FILE = "file"
    """Its result is recorded: file it and call `Store.finish`."""
    REFILE = "refile"
    """Its result is final: move it to the folder of that state and call `Store.set_path`."""
    REDRAW = "redraw"
    """As `REFILE`, and retention removed its overlay: draw it again, call
    `Store.restore_overlay`, then file it."""
    DUPLICATE = "duplicate"
    """Another copy of the same content is kept: remove this one."""
    GIVE_UP = "give_up"
    """It crashed the process too often and has just been failed: move it to quarantine and call
    `Store.set_path`."""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """The database's answer to a dropped file.

    Attributes
    ----------
    kind
        What to do.
    result_id, image_id
        Rows of the database.
    attempt
        Runs started since the last drop or retry, this one included.
    state, reason
        The result's, after the claim.
    received_at
        When the content was first received, or came again after retention removed it; it
        decides the folder in ``done``.
    file_path
        With ``run`` only: the copy that this one supersedes, relative to the home, to be removed
        before this one is filed, since both may have the same place. None if there is none.
    """

    kind: ClaimKind
    result_id: int
    image_id: int
    attempt: int
    state: State
    received_at: datetime
    file_path: str | None
    reason: str | None


@dataclass(frozen=True, kw_only=True)
class Drop:
    """A file to be claimed.

    Attributes
    ----------
    token
        Identifies this drop: seen again after a crash, it counts once.
    sha256, size_bytes
        Of the file's bytes.
    source_name
        The name it was dropped under.
    path
        Where the file is now, relative to the home.
    model_id
        The model that is to score it.
    max_attempts
        Runs that may end in a crash before the file fails.
    now
        The time, with a zone.
    exists
        Returns whether a path relative to the home exists. A recorded copy that is gone is
        superseded by this one.
    arrival
        False for a file that nobody dropped (another run of one that is filed).
    """

    token: str
    sha256: str
    size_bytes: int
    source_name: str
    path: str
    model_id: int
    max_attempts: int
    now: datetime
    exists: Callable[[str], bool]
    arrival: bool = True


def claim_drop(connection: Connection, drop: Drop) -> Claim:
    """Decide, within a write transaction, what is done with a dropped file."""
    source_name = clean(drop.source_name)
    insert_if_new(
        connection,
        Image,
        ("sha256",),
        {
            "sha256": drop.sha256,
            "size_bytes": drop.size_bytes,
            "source_name": source_name,
            "received_at": drop.now,
        },
    )
    image = connection.execute(
        # The lock serialises claims of one content on PostgreSQL; SQLite has one writer.
        select(Image.id, Image.path, Image.received_at, Image.removed_at)
        .where(Image.sha256 == drop.sha256)
        .with_for_update()
    ).one()
    received_at = image.received_at
    if drop.arrival and image.path is None and image.removed_at is not None:
        # Kept from now on, in the folder of today.
        received_at = drop.now
        renewed = {"received_at": drop.now, "removed_at": None}
        connection.execute(update(Image).where(Image.id == image.id).values(**renewed))
    mine = image.path in (None, drop.path) or not drop.exists(image.path)
    result = _current_result(connection, image.id, drop, mine=mine)
    is_new = result is None
    if result is None:
        result = _insert(connection, image.id, drop)
    of_drop = Arrival.token == drop.token
    known_drop = connection.scalar(select(Arrival.id).where(of_drop)) is not None
    kind = (
        ClaimKind.RUN
        if is_new
        else _decide(connection, drop, result, mine=mine, known_drop=known_drop)
    )
    if kind is ClaimKind.REFILE and drop.arrival:
        kind = _redraw(connection, drop, result.id, known_drop=known_drop)
    if drop.arrival and not known_drop:
        connection.execute(
            insert(Arrival).values(
                token=drop.token,
                image_id=image.id,
                result_id=result.id,
                source_name=source_name,
                arrived_at=drop.now,
                duplicate=kind is not ClaimKind.RUN,
            )
        )
    if kind is ClaimKind.DUPLICATE:
        connection.execute(update(Arrival).where(of_drop).values(duplicate=True))
    else:
        connection.execute(update(Image).where(Image.id == image.id).values(path=drop.path))
    result = _find(connection, Result.id == result.id)
    assert result is not None
    superseded = kind is ClaimKind.RUN and image.path != drop.path
    return Claim(
        kind=kind,
        result_id=result.id,
        image_id=image.id,
        attempt=result.attempts,
        state=result.state,
        received_at=received_at,
        file_path=image.path if superseded else None,
        reason=result.reason,
    )


def _insert(connection: Connection, image_id: int, drop: Drop) -> _CurrentResult:
    connection.execute(
        insert(Result).values(
            image_id=image_id,
            model_id=drop.model_id,
            state=State.CLAIMED,
            attempts=1,
            flags=[],
            claimed_at=drop.now,
        )
    )
    found = _find(connection, Result.image_id == image_id, Result.model_id == drop.model_id)
    assert found is not None
    return found


def _current_result(
    connection: Connection, image_id: int, drop: Drop, *, mine: bool
) -> _CurrentResult | None:
    """Return the result that the file belongs to, None if there is none yet.

    Mostly that of the model in use. Where the daemon was restarted with a new model, a run that
    the old one left unfinished comes first, or it would never end: what it recorded remains its
    own and only has to be filed; what was queued or interrupted becomes the new model's.
    """
    of_image = Result.image_id == image_id
    other = of_image & (Result.model_id != drop.model_id)
    own = _find(connection, of_image, Result.model_id == drop.model_id)
    left = _find(connection, other, Result.state.in_((State.CLAIMED, State.RECORDED)))
    if left is not None and (left.state is State.RECORDED or not mine):
        return left
    done = _find(connection, other, Result.state == State.DONE)
    if own is None and done is not None and not drop.arrival:
        # Taken from done/ for rescoring by another model; this one was not requested.
        if left is not None:
            _fail_other_model(connection, left.id, drop)
        return done
    if own is None:
        queued = _find(connection, other, Result.state == State.QUEUED) if done is None else None
        taken = left or queued
        if taken is not None:
            connection.execute(
                update(Result).where(Result.id == taken.id).values(model_id=drop.model_id)
            )
        return taken
    if left is not None:
        _fail_other_model(connection, left.id, drop)
    return own


def _fail_other_model(connection: Connection, result_id: int, drop: Drop) -> None:
    """End another model's run, which the model in use does not continue."""
    change_state(
        connection,
        Result,
        result_id,
        current=State.CLAIMED,
        target=State.FAILED,
        reason=Reason.MODEL_CHANGED,
        message="the daemon was restarted with another model, which has a result already",
        finished_at=drop.now,
    )


def _decide(
    connection: Connection, drop: Drop, result: _CurrentResult, *, mine: bool, known_drop: bool
) -> ClaimKind:
    if result.state is State.QUEUED:
        return _start(connection, drop, result.id, State.QUEUED)
    if result.state is State.FAILED:
        # Without the second condition a file on its way to quarantine would run for ever. A
        # retry (no arrival) of a failed result left the state `queued` before it failed again.
        if mine and (known_drop or not drop.arrival):
            return ClaimKind.REFILE
        return _start(connection, drop, result.id, State.FAILED)
    if not mine:
        return ClaimKind.DUPLICATE
    if result.state is State.CLAIMED:
        return _attempt(connection, drop, result.id, result.attempts)
    return ClaimKind.FILE if result.state is State.RECORDED else ClaimKind.REFILE


def _redraw(connection: Connection, drop: Drop, result_id: int, *, known_drop: bool) -> ClaimKind:
    """Let the overlay that retention removed be drawn again, unless that crashes every time."""
    attempts = connection.scalar(
        select(Result.attempts).where(
            Result.id == result_id,
            Result.model_id == drop.model_id,
            Result.state == State.DONE,
            Result.overlay.is_(None),
            Result.overlay_removed_at.is_not(None),
        )
    )
    if attempts is None or (known_drop and attempts >= drop.max_attempts):
        return ClaimKind.REFILE
    attempts = attempts + 1 if known_drop else 1
    connection.execute(update(Result).where(Result.id == result_id).values(attempts=attempts))
    return ClaimKind.REDRAW


def _start(connection: Connection, drop: Drop, result_id: int, current: State) -> ClaimKind:
    change_state(
        connection,
        Result,
        result_id,
        current=current,
        target=State.CLAIMED,
        attempts=1,
        claimed_at=drop.now,
        reason=None,
        message=None,
        finished_at=None,
        duration_ms=None,
    )
    return ClaimKind.RUN


def _attempt(connection: Connection, drop: Drop, result_id: int, attempts: int) -> ClaimKind:
    if attempts + 1 > drop.max_attempts:
        change_state(
            connection,
            Result,
            result_id,
            current=State.CLAIMED,
            target=State.FAILED,
            reason=Reason.CRASHED_REPEATEDLY,
            message=f"the process crashed {attempts} times on this file",
            finished_at=drop.now,
        )
        return ClaimKind.GIVE_UP
    change_state(
        connection,
        Result,
        result_id,
        current=State.CLAIMED,
        target=State.CLAIMED,
        attempts=attempts + 1,
        claimed_at=drop.now,
    )
    return ClaimKind.RUN


def _find(connection: Connection, *conditions: ColumnElement[bool]) -> _CurrentResult | None:
    row = connection.execute(
        select(Result.id, Result.state, Result.attempts, Result.reason)
        .where(*conditions)
        .order_by(Result.id)
        .limit(1)
    ).first()
    return None if row is None else _CurrentResult(*row)
