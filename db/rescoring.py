"""Scoring anew: which filed images another model is to score, and the rows that ask for it."""

from collections.abc import Sequence
from datetime import datetime

from sqlalchemy import Engine, func, or_, select
from sqlalchemy.orm import aliased

from lungwatch.db.audit import Deed, note_within
from lungwatch.db.changes import change_state, insert_if_new
from lungwatch.db.engine import reading, writing
from lungwatch.db.rows import ResultFilter
from lungwatch.db.schema import Image, Model, Result
from lungwatch.db.selects import conditions
from lungwatch.db.states import UNFINISHED, State
from lungwatch.errors import Reason

_AT_ONCE = 500
# A run that another model's daemon has cut off is asked for again.
_CUT_OFF = (State.FAILED, Reason.MODEL_CHANGED)


def rescorable(engine: Engine, chosen: ResultFilter, model_id: int) -> list[int]:
    """Return the images in ``done/`` that a model has no result for, the newest first.

    Parameters
    ----------
    chosen
        Which results of other models; `limit` counts images.
    model_id
        The row of the model that is to score them.

    Returns
    -------
    list of int
        Numbers of the images' rows.
    """
    own = aliased(Result)
    has_own = select(own.id).where(
        own.image_id == Image.id,
        own.model_id == model_id,
        or_(own.state != _CUT_OFF[0], own.reason != _CUT_OFF[1], own.reason.is_(None)),
    )
    statement = (
        select(Image.id)
        .join_from(Image, Result)
        .join(Model)
        .where(
            *conditions(chosen),
            Result.state == State.DONE,
            Result.label.is_not(None),
            Image.path.startswith("done/"),
            ~has_own.exists(),
        )
        .group_by(Image.id, Image.received_at)
        .order_by(Image.received_at.desc(), Image.id.desc())
        .limit(chosen.limit)
    )
    with reading(engine) as connection:
        return list(connection.scalars(statement))


def queue_rescoring(
    engine: Engine,
    images: Sequence[int],
    model_id: int,
    now: datetime,
    deed: Deed,
) -> int:
    """Ask a model for results of images; the rows that are there stay.

    Parameters
    ----------
    images
        Numbers of the images' rows, those to be taken first at the front.
    deed
        What the audit says of it; written with the first rows, or not at all.

    Returns
    -------
    int
        How many are queued: those that the folder still has, and nobody has asked for meanwhile.
    """
    count = 0
    for start in range(0, len(images), _AT_ONCE):
        some = images[start : start + _AT_ONCE]
        with writing(engine) as connection:
            # Retention may have removed a file since.
            there = set(
                connection.scalars(
                    select(Image.id).where(Image.id.in_(some), Image.path.startswith("done/"))
                )
            )
            for image_id in some:
                if image_id not in there:
                    continue
                is_new = insert_if_new(
                    connection,
                    Result,
                    ("image_id", "model_id"),
                    {
                        "image_id": image_id,
                        "model_id": model_id,
                        "state": State.QUEUED,
                        "attempts": 0,
                        "flags": [],
                        "claimed_at": now,
                    },
                )
                if not is_new:
                    cut_off = connection.scalar(
                        select(Result.id).where(
                            Result.image_id == image_id,
                            Result.model_id == model_id,
                            Result.state == _CUT_OFF[0],
                            Result.reason == _CUT_OFF[1],
                        )
                    )
                    if cut_off is None:
                        continue
                    change_state(
                        connection,
                        cut_off,
                        current=State.FAILED,
                        target=State.QUEUED,
                        attempts=0,
                        reason=None,
                        message=None,
                        claimed_at=now,
                        finished_at=None,
                    )
                count += 1
            if start == 0:
                note_within(connection, now, [deed])
    return count


def asked_for(engine: Engine, model_id: int) -> int:
    """Return how many results a model has still to make: asked for, or cut off on their way."""
    statement = select(func.count()).where(
        Result.model_id == model_id, Result.state.in_(UNFINISHED)
    )
    with reading(engine) as connection:
        return connection.scalar(statement) or 0
