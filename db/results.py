"""Results: every write to images, models and results, one transaction a method.

The time is passed in, and is part of a change: the same call, made again after a lost answer to
COMMIT, finds its own change and changes nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from typing import TYPE_CHECKING, Literal

from sqlalchemy import Connection, Engine, select, update

from lungwatch.db.audit import AuditEvent, add_events
from lungwatch.db.claims import Claim, Drop, claim_drop
from lungwatch.db.deliveries import OutboxPlan, queue_deliveries
from lungwatch.db.engine import (
    Value,
    change_state,
    clean,
    has_finished_at,
    insert_if_new,
    reading,
    state_of,
    writing,
)
from lungwatch.db.models import Image, Model, Plausibility, Result, State
from lungwatch.errors import NotFoundError, Reason

if TYPE_CHECKING:
    from lungwatch.attributes import RadiographMeta

_NOT_GATED = Plausibility()
# Two runs of one model on one image, in batches of other sizes or on another processor.
_SAME_PROBABILITY = 1e-3
REQUEUED: Mapping[str, Value] = {
    "attempts": 0,
    "reason": None,
    "message": None,
    "finished_at": None,
    "duration_ms": None,
    **asdict(_NOT_GATED),
}
"""Columns of a result that is to run again."""


class Store:
    """The writing side of the database.

    Every method may raise `DatabaseError`; `DatabaseBusyError`, which is also a `TransientError`,
    where trying again may help; and those that change a state `IllegalTransition`, where the
    result is in another state than the one to be changed.

    Parameters
    ----------
    outbox
        What is sent of each result that is done, and to which destinations; None for nothing.
    """

    def __init__(self, engine: Engine, outbox: OutboxPlan | None = None) -> None:
        self._engine = engine
        self._outbox = outbox

    def register_model(
        self, *, name: str, version: str, sha256: str, contract_json: str, now: datetime
    ) -> int:
        """Note that a model is in use and return its row's id; the same file has one row."""
        with writing(self._engine) as connection:
            insert_if_new(
                connection,
                Model,
                ("sha256",),
                {
                    "name": clean(name),
                    "version": clean(version),
                    "sha256": sha256,
                    "contract": contract_json,
                    "first_used_at": now,
                },
            )
            return connection.execute(select(Model.id).where(Model.sha256 == sha256)).scalar_one()

    def claim(self, drop: Drop) -> Claim:
        """Note a dropped file and decide what is to be done with it."""
        with writing(self._engine) as connection:
            return claim_drop(connection, drop)

    def record(
        self,
        *,
        result_id: int,
        meta: "RadiographMeta",
        label: str,
        probability: float,
        logit: float,
        threshold: float,
        flags: Sequence[str],
        overlay: str,
        duration_ms: int,
        now: datetime,
        overlay_sha256: str | None = None,
        uncertain: tuple[float, float] | None = None,
        plausibility: Plausibility = _NOT_GATED,
        findings: Mapping[str, float] | None = None,
        calibration: str | None = None,
        components: Sequence[float] | None = None,
    ) -> None:
        """Write a result; the file is to be filed next.

        Parameters
        ----------
        probability, threshold
            Calibrated, 0..1.
        overlay
            Path relative to the home.
        now
            Time of the result; `finish` sets it anew once the file is filed.
        overlay_sha256
            Of the overlay's bytes; None if it is not known.
        uncertain
            Bounds [from, to) of the probabilities that are UNCERTAIN; None if the model has none.
        plausibility
            The content gate's measurements.
        findings
            Calibrated probability, 0..1, of each finding by name; None for COVID alone.
        calibration
            The site calibration that decided; None for the bundle's own.
        components
            Projection of the embedding, for drift; None if the model's bundle has no axes.
        """
        # It imports OpenCV, which commands that only read do without.
        from lungwatch.contract import COVID_FINDING  # noqa: PLC0415

        uncertain_from, uncertain_to = uncertain or (None, None)
        self._end_run(
            result_id,
            State.RECORDED,
            meta=meta,
            plausibility=plausibility,
            duration_ms=duration_ms,
            finished_at=now,
            label=label,
            probability=probability,
            logit=logit,
            threshold=threshold,
            uncertain_from=uncertain_from,
            uncertain_to=uncertain_to,
            findings=dict(findings or {COVID_FINDING: probability}),
            calibration=calibration,
            components=None if components is None else list(components),
            flags=list(flags),
            overlay=overlay,
            overlay_sha256=overlay_sha256,
            overlay_removed_at=None,
        )

    def restore_overlay(
        self,
        *,
        result_id: int,
        label: str,
        probability: float,
        threshold: float,
        flags: Sequence[str],
        overlay: str,
        overlay_sha256: str,
    ) -> bool:
        """Note the overlay of a result that is done, if it shows what the result says.

        Nothing else of the result changes.

        Parameters
        ----------
        label, probability, threshold, flags
            What the overlay shows.

        Returns
        -------
        bool
            False if the result says something else, or has an overlay already; nothing is
            changed then.
        """
        with writing(self._engine) as connection:
            row = connection.execute(
                select(Result.label, Result.probability, Result.threshold, Result.flags).where(
                    Result.id == result_id,
                    Result.state == State.DONE,
                    Result.overlay.is_(None) | (Result.overlay_sha256 == overlay_sha256),
                )
            ).one_or_none()
            if row is None or row.probability is None:
                return False
            same = (row.label, row.threshold, set(row.flags)) == (label, threshold, set(flags))
            if not same or abs(row.probability - probability) > _SAME_PROBABILITY:
                return False
            connection.execute(
                update(Result)
                .where(Result.id == result_id)
                .values(overlay=overlay, overlay_sha256=overlay_sha256, overlay_removed_at=None)
            )
        return True

    def record_unpacked(
        self, *, result_id: int, count: int, duration_ms: int, now: datetime
    ) -> None:
        """Note that an archive was unpacked into `count` files; it is filed next, unlabelled."""
        self._end_run(
            result_id,
            State.RECORDED,
            duration_ms=duration_ms,
            finished_at=now,
            reason=Reason.UNPACKED,
            message=f"the zip archive's {count} files were unpacked, each a drop of its own",
        )

    def end(
        self,
        state: Literal[State.REJECTED, State.FAILED],
        *,
        result_id: int,
        reason: str,
        message: str,
        meta: "RadiographMeta | None",
        duration_ms: int,
        now: datetime,
        plausibility: Plausibility = _NOT_GATED,
    ) -> None:
        """Note that a claimed file is not usable or could not be processed; quarantine is next."""
        self._end_run(
            result_id,
            state,
            meta=meta,
            plausibility=plausibility,
            duration_ms=duration_ms,
            finished_at=now,
            reason=reason,
            message=clean(message),
        )

    def _end_run(
        self,
        result_id: int,
        target: State,
        *,
        meta: "RadiographMeta | None" = None,
        plausibility: Plausibility = _NOT_GATED,
        **values: Value,
    ) -> None:
        with writing(self._engine) as connection:
            is_new = change_state(
                connection,
                Result,
                result_id,
                current=State.CLAIMED,
                target=target,
                **asdict(plausibility),
                **values,
            )
            if is_new and meta is not None:
                stated = {
                    name: clean(value) if isinstance(value, str) else value
                    for name, value in asdict(meta).items()
                }
                _update_image_of(connection, result_id, **stated)

    def finish(self, *, result_id: int, path: str, now: datetime) -> None:
        """Note that the file of a recorded result is filed at `path`, and queue what is sent."""
        with writing(self._engine) as connection:
            is_new = change_state(
                connection,
                Result,
                result_id,
                current=State.RECORDED,
                target=State.DONE,
                finished_at=now,
            )
            if not is_new:
                return
            _update_image_of(connection, result_id, path=path)
            if self._outbox is not None:
                queue_deliveries(connection, result_id, self._outbox, now)

    def fail_vanished(self, *, result_id: int, now: datetime) -> None:
        """Note that another program removed a file between its claim and its end.

        Raises
        ------
        NotFoundError
            If there is no such result.
        """
        with writing(self._engine) as connection:
            current = state_of(connection, Result, result_id)
            if current is State.FAILED and has_finished_at(connection, result_id, now):
                return  # by an earlier try, as in `change_state`
            change_state(
                connection,
                Result,
                result_id,
                current=current,
                target=State.FAILED,
                reason=Reason.FILE_VANISHED,
                message="the file was removed from work/ by another program; drop it again",
                finished_at=now,
            )
            _update_image_of(connection, result_id, path=None)

    def request_retry(
        self, *, result_id: int, now: datetime, events: Sequence[AuditEvent] = ()
    ) -> None:
        """Queue another run of a failed or rejected result, and write its audit events with it.

        Raises
        ------
        NotFoundError
            If there is no such result.
        """
        with writing(self._engine) as connection:
            change_state(
                connection,
                Result,
                result_id,
                current=state_of(connection, Result, result_id),
                target=State.QUEUED,
                claimed_at=now,
                **REQUEUED,
            )
            add_events(connection, now, events)

    def filed_as_done(self, image_id: int) -> datetime | None:
        """Return when an image was received if a result of it is done, by any model; else None."""
        statement = (
            select(Image.received_at)
            .join(Result)
            .where(Image.id == image_id, Result.state == State.DONE)
            .limit(1)
        )
        with reading(self._engine) as connection:
            return connection.scalar(statement)

    def set_path(self, *, image_id: int, path: str | None) -> None:
        """Note where an image's file is now, relative to the home; None if it is nowhere.

        Raises
        ------
        NotFoundError
            If there is no such image.
        """
        with writing(self._engine) as connection:
            changed = connection.execute(
                update(Image).where(Image.id == image_id).values(path=path)
            )
            if changed.rowcount != 1:
                raise NotFoundError(f"there is no image {image_id}")


def _update_image_of(connection: Connection, result_id: int, **values: Value) -> None:
    image_id = select(Result.image_id).where(Result.id == result_id).scalar_subquery()
    connection.execute(update(Image).where(Image.id == image_id).values(**values))
