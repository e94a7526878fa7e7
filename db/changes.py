"""Pieces of a write transaction that the store's methods share."""

from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime
from enum import StrEnum
from typing import TYPE_CHECKING

from sqlalchemy import Connection, select, update
from sqlalchemy.dialects import postgresql, sqlite

from lungwatch.db.delivery_states import DeliveryState
from lungwatch.db.schema import Base, Delivery, Image, Result
from lungwatch.db.states import IllegalTransition, State, check_transition
from lungwatch.errors import NotFoundError

if TYPE_CHECKING:
    from lungwatch.imaging import RadiographMeta

Value = str | int | float | datetime | list[str] | list[float] | dict[str, float] | None


def insert_if_new(
    connection: Connection, table: type[Base], unique: tuple[str, ...], values: Mapping[str, Value]
) -> bool:
    """Insert a row unless its `unique` columns are taken; say whether it was inserted."""
    dialect = postgresql if connection.dialect.name == "postgresql" else sqlite
    statement = dialect.insert(table).values(**values)
    return connection.execute(statement.on_conflict_do_nothing(index_elements=unique)).rowcount == 1


def change_state(
    connection: Connection, result_id: int, *, current: State, target: State, **values: Value
) -> bool:
    """Set a result's state by compare-and-set, and other columns along with it.

    Returns
    -------
    bool
        Whether it was changed. False if the result came to this end at the very instant
        `finished_at`: by an earlier try of the same transaction, whose COMMIT a server has
        carried out and, dying, not answered.

    Raises
    ------
    IllegalTransition
        If the table of transitions does not hold the change, or the result is not in
        `current`.
    NotFoundError
        If there is no such result.
    """
    check_transition(current, target)
    found = compare_and_set(connection, Result, result_id, current=current, target=target, **values)
    if found == current:
        return True
    if found == target and has_ended_at(connection, result_id, values.get("finished_at")):
        return False
    raise IllegalTransition(f"result {result_id} is {found}, not {current}: it cannot be {target}")


def has_ended_at(connection: Connection, result_id: int, moment: Value) -> bool:
    """Whether a result came to its end at just this moment; False for None."""
    known = select(Result.id).where(Result.id == result_id, Result.finished_at == moment)
    return moment is not None and connection.scalar(known) is not None


def compare_and_set(
    connection: Connection,
    table: type[Result] | type[Delivery],
    row_id: int,
    *,
    current: State | DeliveryState,
    target: State | DeliveryState,
    **values: Value,
) -> StrEnum:
    """Set a row's state, and other columns along with it, if it is in `current`.

    Returns
    -------
    StrEnum
        The state that the row was found in; it was changed if that is `current`.

    Raises
    ------
    NotFoundError
        If there is no such row.
    """
    changed = connection.execute(
        update(table)
        .where(table.id == row_id, table.state == current)
        .values(state=target, **values)
    )
    if changed.rowcount == 1:
        return current
    found = connection.scalar(select(table.state).where(table.id == row_id))
    if found is None:
        raise NotFoundError(f"there is no {table.__tablename__} {row_id}")
    return found


def update_image(connection: Connection, image_id: int, **values: Value) -> None:
    """Set columns of an image.

    Raises
    ------
    NotFoundError
        If there is no such image.
    """
    changed = connection.execute(update(Image).where(Image.id == image_id).values(**values))
    if changed.rowcount != 1:
        raise NotFoundError(f"there is no image {image_id}")


def update_image_of(connection: Connection, result_id: int, **values: Value) -> None:
    """Set columns of the image that a result is about."""
    image_id = select(Result.image_id).where(Result.id == result_id).scalar_subquery()
    connection.execute(update(Image).where(Image.id == image_id).values(**values))


def meta_columns(meta: "RadiographMeta") -> dict[str, Value]:
    """Return what a file says about its image as columns of `Image`."""
    return {
        name: clean(value) if isinstance(value, str) else value
        for name, value in asdict(meta).items()
    }


def clean(text: str) -> str:
    """Return text that every database can store.

    File names may hold bytes that are no UTF-8, DICOM values may hold NUL: shown as escapes.
    """
    return text.encode("utf-8", "backslashreplace").decode().replace("\0", "\\x00")
