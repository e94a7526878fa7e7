"""The results that drift is told from: the newest and the first ones of one model."""

from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

from sqlalchemy import Engine, Select, and_, case, select

from lungwatch.db.engine import reading
from lungwatch.db.schema import Image, Model, Result
from lungwatch.db.states import State
from lungwatch.gate import GATE_REASONS

if TYPE_CHECKING:
    from collections.abc import Iterable

    from sqlalchemy import Row


@dataclass(frozen=True, kw_only=True)
class DriftRow:
    """What drift is told from of one result: scored, or refused by the content gate.

    Attributes
    ----------
    finished_at
        UTC.
    reason
        Why the content gate refused the picture; None for a scored one.
    logit, gate_score, lung_area, lung_share
        As recorded; None where unknown.
    components
        The reduced embedding; None where the bundle has no axes, or nothing was scored.
    station, view_position, modality, manufacturer_model, photometric, format, rows, columns, \
bits_stored
        As the file says.
    """

    id: int
    finished_at: datetime
    reason: str | None
    logit: float | None
    gate_score: float | None
    lung_area: float | None
    lung_share: float | None
    components: list[float] | None
    station: str | None
    view_position: str | None
    modality: str | None
    manufacturer_model: str | None
    photometric: str | None
    format: str | None
    rows: int | None
    columns: int | None
    bits_stored: int | None


def drift_rows(
    engine: Engine, model_sha256: str, *, first: int, last: int, since: datetime | None = None
) -> tuple[list[DriftRow], list[DriftRow]]:
    """Return the first results of a model and its newest ones; they may overlap.

    The index over `finished_at` bounds what is read: nothing before the model was first used, and
    no more than is asked for.

    Parameters
    ----------
    model_sha256
        Of the model's file.
    first, last
        At most so many each.
    since
        Nothing that ended before; None for the model's first use.

    Returns
    -------
    oldest, newest
        The oldest first; the newest first.

    Raises
    ------
    DatabaseError
        If the database cannot be read.
    """
    with reading(engine) as connection:
        model = connection.execute(
            select(Model.id, Model.first_used_at).where(Model.sha256 == model_sha256)
        ).first()
        if model is None:
            return [], []
        start = model.first_used_at if since is None else max(since, model.first_used_at)
        chosen = _select(model.id).where(Result.finished_at >= start)
        oldest = chosen.order_by(Result.finished_at, Result.id).limit(first)
        newest = chosen.order_by(Result.finished_at.desc(), Result.id.desc()).limit(last)
        return _rows(connection.execute(oldest)), _rows(connection.execute(newest))


def _select(model_id: int) -> "Select[*tuple[Any, ...]]":
    scored = and_(Result.state.in_((State.RECORDED, State.DONE)), Result.logit.is_not(None))
    refused = and_(Result.state == State.REJECTED, Result.reason.in_(GATE_REASONS))
    # As a value, not a condition: SQLite would take the index over `state`, which is nearly every
    # row, and sort them all.
    is_told = case((scored, 1), (refused, 1), else_=0)
    columns: tuple[Any, ...] = (
        Result.id,
        Result.finished_at,
        Result.reason,
        Result.logit,
        Result.gate_score,
        Result.lung_area,
        Result.lung_share,
        Result.components,
        Image.station,
        Image.view_position,
        Image.modality,
        Image.manufacturer_model,
        Image.photometric,
        Image.format,
        # `Image.rows` would be a method of the row that comes back.
        Image.rows.label("rows"),
        Image.columns.label("columns"),
        Image.bits_stored,
    )
    return (
        select(*columns).join_from(Result, Image).where(Result.model_id == model_id, is_told == 1)
    )


def _rows(found: "Iterable[Row[*tuple[Any, ...]]]") -> list[DriftRow]:
    return [DriftRow(**row._mapping) for row in found]  # noqa: SLF001 - SQLAlchemy's public name
