"""Which files are finished with, and forgetting them once they are to go."""

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, Engine, Select, func, select, update
from sqlalchemy.orm import QueryableAttribute

from lungwatch.db.delivery_states import DeliveryState
from lungwatch.db.engine import reading, writing
from lungwatch.db.schema import Delivery, Image, Result
from lungwatch.db.states import UNFINISHED

# What was refused can be sent again (`lungwatch pacs send --failed`), and is built anew for that.
_WAITING = (DeliveryState.QUEUED, DeliveryState.SENDING, DeliveryState.FAILED)


@dataclass(frozen=True, kw_only=True)
class Kept:
    """A file that all has been done with.

    Attributes
    ----------
    row_id
        Of the image whose original it is, or of the result whose overlay.
    path
        Relative to the home.
    finished_at
        When the last of its results came to its end.
    """

    row_id: int
    path: str
    finished_at: datetime


def kept_originals(engine: Engine) -> list[Kept]:
    """Return the originals of which every result has an end and nothing is still to be sent."""
    ended = func.max(Result.finished_at).label("finished_at")
    statement = (
        select(Image.id.label("row_id"), Image.path, ended)
        .join(Result)
        .where(
            Image.path.startswith("done/") | Image.path.startswith("quarantine/"),
            _is_finished_with(),
        )
        .group_by(Image.id, Image.path)
        .having(ended.is_not(None))
    )
    return _kept(engine, statement)


def kept_overlays(engine: Engine) -> list[Kept]:
    """Return the overlays of results that have ended and that nothing waits to be sent of."""
    statement = select(
        Result.id.label("row_id"), Result.overlay.label("path"), Result.finished_at
    ).where(
        Result.overlay.is_not(None),
        Result.finished_at.is_not(None),
        Result.state.not_in(UNFINISHED),
        ~_waits(Result.id),
    )
    return _kept(engine, statement)


def forget_original(engine: Engine, kept: Kept, now: datetime) -> bool:
    """Note that an original is removed, if it is finished with still; say whether it was."""
    with writing(engine) as connection:
        changed = connection.execute(
            update(Image)
            .where(Image.id == kept.row_id, Image.path == kept.path, _is_finished_with())
            .values(path=None, removed_at=now)
        )
    return changed.rowcount == 1


def forget_overlay(engine: Engine, kept: Kept, now: datetime) -> bool:
    """Note that an overlay is removed, if nothing waits for it; say whether it was."""
    with writing(engine) as connection:
        changed = connection.execute(
            update(Result)
            .where(
                Result.id == kept.row_id,
                Result.overlay == kept.path,
                Result.state.not_in(UNFINISHED),
                ~_waits(Result.id),
            )
            .values(overlay=None, overlay_removed_at=now)
        )
    return changed.rowcount == 1


def _is_finished_with() -> ColumnElement[bool]:
    """Of an image: no result on its way, nothing of it in the outbox."""
    unfinished = select(Result.id).where(
        Result.image_id == Image.id, Result.state.in_(UNFINISHED) | _waits(Result.id)
    )
    return ~unfinished.correlate(Image).exists()


def _waits(result_id: QueryableAttribute[int]) -> ColumnElement[bool]:
    return (
        select(Delivery.id)
        .where(Delivery.result_id == result_id, Delivery.state.in_(_WAITING))
        .exists()
    )


def _kept(engine: Engine, statement: "Select[*tuple[Any, ...]]") -> list[Kept]:
    with reading(engine) as connection:
        return [Kept(**row._mapping) for row in connection.execute(statement)]  # noqa: SLF001 - SQLAlchemy's public name
