"""Claims: start, repeat or skip the run of a dropped file."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import NamedTuple

from sqlalchemy import ColumnElement, Connection, insert, select, update

from lungwatch.db.engine import change_state, clean, insert_if_new, update_image
from lungwatch.db.models import Arrival, Image, Result
from lungwatch.db.states import State
from lungwatch.errors import Reason


class _CurrentResult(NamedTuple):
    """Where a result stands."""

    id: int
    state: State
    attempts: int
    reason: str | None


class ClaimKind(StrEnum):
    """What the caller has to do with the file.

    ``run``: process it. ``file``: its result is recorded, file it and call `Store.finish`.
    ``refile``: its result is final, move it to where that says and call `Store.set_path`.
    ``duplicate``: another copy stands for it, remove this one. ``give_up``: it crashed the
    program too often and has just been failed, move it to quarantine and call
    `Store.set_path`.
    """

    RUN = "run"
    FILE = "file"
    REFILE = "refile"
    DUPLICATE = "duplicate"
    GIVE_UP = "give_up"


@dataclass(frozen=True, kw_only=True)
class Claim:
    """The record's answer to a dropped file.

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
        When the content came for the first time; it decides the folder in ``done``.
    file_path
        With ``run`` only: the copy that this one supersedes, relative to the home, to be
        removed before this one is filed, since it may lie where this one will go. None if
        there is none.
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
    """A file that asks to be claimed; the fields are those of `Store.claim`."""

    token: str
    sha256: str
    size_bytes: int
    source_name: str
    path: str
    model_id: int
    max_attempts: int
    now: datetime
    exists: Callable[[str], bool]
    arrival: bool


def claim_drop(connection: Connection, drop: Drop) -> Claim:
    """Decide within a write transaction what becomes of a dropped file."""
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
        # The lock puts claims of one content in line on PostgreSQL; SQLite has one writer.
        select(Image.id, Image.path, Image.received_at)
        .where(Image.sha256 == drop.sha256)
        .with_for_update()
    ).one()
    mine = image.path in (None, drop.path) or not drop.exists(image.path)
    result = _current_result(connection, image.id, drop, mine=mine)
    is_new = result is None
    if result is None:
        result = _insert(connection, image.id, drop)
    known_drop = (
        connection.scalar(select(Arrival.id).where(Arrival.token == drop.token)) is not None
    )
    kind = (
        ClaimKind.RUN
        if is_new
        else _decide(connection, drop, result, mine=mine, known_drop=known_drop)
    )
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
        connection.execute(
            update(Arrival).where(Arrival.token == drop.token).values(duplicate=True)
        )
    else:
        update_image(connection, image.id, path=drop.path)
    result = _find(connection, Result.id == result.id)
    assert result is not None
    superseded = kind is ClaimKind.RUN and image.path != drop.path
    return Claim(
        kind=kind,
        result_id=result.id,
        image_id=image.id,
        attempt=result.attempts,
        state=result.state,
        received_at=image.received_at,
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
    """Return the result that the file stands for, None if there is none yet.

    Mostly that of the model in use. Where the daemon was restarted with a new model, a run
    that the old one left behind comes first, or it would never end: what it recorded stays its
    own and only has to be filed; what was asked for or cut off becomes the new model's.
    """
    of_image = Result.image_id == image_id
    other = of_image & (Result.model_id != drop.model_id)
    own = _find(connection, of_image, Result.model_id == drop.model_id)
    left = _find(connection, other, Result.state.in_((State.CLAIMED, State.RECORDED)))
    if left is not None and (left.state is State.RECORDED or not mine):
        return left
    done = _find(connection, other, Result.state == State.DONE)
    if own is None and done is not None and not drop.arrival:
        # Taken from done/ for another model that was to score it too; nobody asked this one.
        if left is not None:
            _fail_other_model(connection, left.id, drop)
        return done
    if own is None:
        asked = _find(connection, other, Result.state == State.QUEUED) if done is None else None
        taken = left or asked
        if taken is not None:
            connection.execute(
                update(Result).where(Result.id == taken.id).values(model_id=drop.model_id)
            )
        return taken
    if left is not None:
        _fail_other_model(connection, left.id, drop)
    return own


def _fail_other_model(connection: Connection, result_id: int, drop: Drop) -> None:
    """End another model's run, which this one does not go on with."""
    change_state(
        connection,
        result_id,
        current=State.CLAIMED,
        target=State.FAILED,
        reason=Reason.MODEL_CHANGED,
        message="the daemon was restarted with another model, which has a result already",
        finished_at=drop.now,
    )


def _decide(
    connection: Connection,
    drop: Drop,
    result: _CurrentResult,
    *,
    mine: bool,
    known_drop: bool,
) -> ClaimKind:
    if result.state is State.QUEUED:
        return _start(connection, drop, result.id, State.QUEUED)
    if result.state is State.FAILED:
        # Without the second condition a file that is to go to quarantine would run for ever. A
        # retry (no arrival) of a failed result left the state `queued` before it failed again.
        if mine and (known_drop or not drop.arrival):
            return ClaimKind.REFILE
        return _start(connection, drop, result.id, State.FAILED)
    if not mine:
        return ClaimKind.DUPLICATE
    if result.state is State.CLAIMED:
        return _attempt(connection, drop, result.id, result.attempts)
    return ClaimKind.FILE if result.state is State.RECORDED else ClaimKind.REFILE


def _start(connection: Connection, drop: Drop, result_id: int, current: State) -> ClaimKind:
    change_state(
        connection,
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
            result_id,
            current=State.CLAIMED,
            target=State.FAILED,
            reason=Reason.CRASHED_REPEATEDLY,
            message=f"processing ended without a word {attempts} times",
            finished_at=drop.now,
        )
        return ClaimKind.GIVE_UP
    change_state(
        connection,
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
