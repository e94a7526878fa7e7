"""Removal of files by retention: what may go, its mark in the rows, and the clock's reading."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import ColumnElement, Engine, case, delete, func, insert, select, update
from sqlalchemy.orm import QueryableAttribute

from lungwatch.db.audit import AuditEvent, add_events
from lungwatch.db.engine import columns_for, read_rows, reading, writing
from lungwatch.db.models import (
    UNCOMMITTED,
    UNFINISHED,
    Arrival,
    Audit,
    ClockReading,
    Delivery,
    DeliveryState,
    Image,
    Result,
)

# What was refused can be sent again (`lungwatch pacs send --failed`), and is built anew for that.
_NEEDS_FILES = (DeliveryState.QUEUED, DeliveryState.SENDING, DeliveryState.FAILED)


@dataclass(frozen=True, kw_only=True)
class RemovableFile:
    """A file that nothing needs any more.

    Attributes
    ----------
    row_id
        Of the image whose original it is, or of the result whose overlay.
    path
        Relative to the home.
    finished_at
        When the last of its results ended, or the content came again after its removal.
    received_at
        When the content came.
    """

    row_id: int
    path: str
    finished_at: datetime
    received_at: datetime


def removable_originals(engine: Engine) -> list[RemovableFile]:
    """Return the originals of ended results with nothing to be sent or to be committed."""
    ended = func.max(_later(Result.finished_at)).label("finished_at")
    statement = (
        select(Image.id.label("row_id"), Image.path, ended, Image.received_at)
        .join(Result)
        .where(
            Image.path.startswith("done/") | Image.path.startswith("quarantine/"),
            _is_unused(),
        )
        .group_by(Image.id, Image.path, Image.received_at)
        .having(func.max(Result.finished_at).is_not(None))
    )
    return read_rows(engine, RemovableFile, statement)


def removable_overlays(engine: Engine) -> list[RemovableFile]:
    """Return the overlays of ended results with nothing to be sent or to be committed."""
    statement = (
        select(
            Result.id.label("row_id"),
            Result.overlay.label("path"),
            _later(Result.finished_at).label("finished_at"),
            Image.received_at,
        )
        .join_from(Result, Image)
        .where(
            Result.overlay.is_not(None),
            Result.finished_at.is_not(None),
            Result.state.not_in(UNFINISHED),
            ~_is_to_be_sent(Result.id),
        )
    )
    return read_rows(engine, RemovableFile, statement)


def mark_original_removed(engine: Engine, file: RemovableFile, now: datetime) -> bool:
    """Note that an original is removed, unless it is needed again; return whether it was noted."""
    with writing(engine) as connection:
        changed = connection.execute(
            update(Image)
            .where(Image.id == file.row_id, Image.path == file.path, _is_unused())
            .values(path=None, removed_at=now)
        )
    return changed.rowcount == 1


def mark_overlay_removed(engine: Engine, file: RemovableFile, now: datetime) -> bool:
    """Note that an overlay is removed, unless it is needed again; return whether it was noted."""
    with writing(engine) as connection:
        changed = connection.execute(
            update(Result)
            .where(
                Result.id == file.row_id,
                Result.overlay == file.path,
                Result.state.not_in(UNFINISHED),
                ~_is_to_be_sent(Result.id),
            )
            .values(overlay=None, overlay_sha256=None, overlay_removed_at=now)
        )
    return changed.rowcount == 1


def _is_unused() -> ColumnElement[bool]:
    """Of an image: no result that has not ended, nothing to be sent or to be committed."""
    used = select(Result.id).where(
        Result.image_id == Image.id, Result.state.in_(UNFINISHED) | _is_to_be_sent(Result.id)
    )
    return ~used.correlate(Image).exists()


def _is_to_be_sent(result_id: QueryableAttribute[int]) -> ColumnElement[bool]:
    return (
        select(Delivery.id)
        .where(
            Delivery.result_id == result_id,
            # A destination that says it does not have the object is sent it again, built anew.
            Delivery.state.in_(_NEEDS_FILES) | Delivery.commitment.in_(UNCOMMITTED),
        )
        .exists()
    )


def _later(finished_at: QueryableAttribute[datetime | None]) -> ColumnElement[datetime | None]:
    """The later of a result's end and its image's receipt: what came again is new again."""
    return case((Image.received_at > finished_at, Image.received_at), else_=finished_at)


@dataclass(frozen=True, kw_only=True)
class Reading:
    """The system clock's time beside the kernel's, as `ClockReading` keeps it.

    Attributes
    ----------
    boot_id
        Empty where it is not known.
    boottime_s
        Seconds since the boot.
    """

    at: datetime
    boot_id: str
    boottime_s: float


def last_reading(engine: Engine) -> Reading | None:
    """Return the kept reading of the clock; None before the first."""
    statement = select(*columns_for(Reading, ClockReading)).limit(1)
    found = read_rows(engine, Reading, statement)
    return found[0] if found else None


def save_reading(engine: Engine, taken: Reading, events: Sequence[AuditEvent] = ()) -> None:
    """Keep a reading of the clock in place of the last one, with its audit events."""
    with writing(engine) as connection:
        connection.execute(delete(ClockReading))
        connection.execute(
            insert(ClockReading).values(
                id=1, at=taken.at, boot_id=taken.boot_id, boottime_s=taken.boottime_s
            )
        )
        add_events(connection, taken.at, events)


def last_stop(engine: Engine) -> str | None:
    """Return why the last run of retention was stopped; None if it was not."""
    statement = (
        select(Audit.detail)
        .where(Audit.action == "retention run", Audit.target == "home")
        .order_by(Audit.id.desc())
        .limit(1)
    )
    with reading(engine) as connection:
        detail = connection.scalar(statement)
    reason = (detail or {}).get("reason")
    return None if reason is None else str(reason)


def newest_time(engine: Engine) -> datetime | None:
    """Return the newest time that a row of results, arrivals or the audit trail holds."""
    columns = (Image.received_at, Result.finished_at, Arrival.arrived_at, Audit.at)
    with reading(engine) as connection:
        times = [connection.scalar(select(func.max(column))) for column in columns]
    return max((at for at in times if at is not None), default=None)
