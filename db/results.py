"""Result transitions of a claimed file; each method is one transaction."""

from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from typing import TYPE_CHECKING

from sqlalchemy import Connection, Engine, select

from lungwatch.db.audit import Deed, note_within
from lungwatch.db.changes import (
    change_state,
    clean,
    has_ended_at,
    meta_columns,
    update_image_of,
)
from lungwatch.db.deliveries import OutboxPlan, queue_deliveries
from lungwatch.db.engine import writing
from lungwatch.db.schema import Result
from lungwatch.db.states import State
from lungwatch.errors import NotFoundError, Reason
from lungwatch.plausibility import Plausibility

if TYPE_CHECKING:
    from lungwatch.imaging import RadiographMeta

_NOT_GATED = Plausibility()


class ResultWriter:
    """Changes results by compare-and-set; the part of `Store` that knows of nothing else.

    Parameters
    ----------
    outbox
        What is to be sent of each result that is done, and whereto; None for nothing.
    """

    def __init__(self, engine: Engine, outbox: OutboxPlan | None = None) -> None:
        self._engine = engine
        self._outbox = outbox

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
        uncertain: tuple[float, float] | None = None,
        plausibility: Plausibility = _NOT_GATED,
        calibration: str | None = None,
    ) -> None:
        """Write a result; the file is to be filed next.

        Parameters
        ----------
        probability, threshold
            Calibrated, 0..1.
        flags
            Codes of what is remarkable about the case.
        overlay
            Path relative to the home.
        now
            When the result came about; `finish` sets it anew once the file is filed.
        uncertain
            Bounds of the probabilities that are UNCERTAIN; None if the model tells none.
        plausibility
            What the content gate found.
        calibration
            The site calibration that decided; None if the bundle's own did.

        Raises
        ------
        IllegalTransition
            If the result is not claimed.
        """
        uncertain_from, uncertain_to = uncertain or (None, None)
        with writing(self._engine) as connection:
            is_new = change_state(
                connection,
                result_id,
                current=State.CLAIMED,
                target=State.RECORDED,
                label=label,
                probability=probability,
                logit=logit,
                threshold=threshold,
                uncertain_from=uncertain_from,
                uncertain_to=uncertain_to,
                calibration=calibration,
                **asdict(plausibility),
                flags=list(flags),
                overlay=overlay,
                overlay_removed_at=None,
                duration_ms=duration_ms,
                finished_at=now,
            )
            if is_new:
                update_image_of(connection, result_id, **meta_columns(meta))

    def record_unpacked(
        self, *, result_id: int, count: int, duration_ms: int, now: datetime
    ) -> None:
        """Note that an archive's files go on alone; it has no label, and is to be filed next.

        Parameters
        ----------
        count
            Files that came out of it.

        Raises
        ------
        IllegalTransition
            If the result is not claimed.
        """
        with writing(self._engine) as connection:
            change_state(
                connection,
                result_id,
                current=State.CLAIMED,
                target=State.RECORDED,
                reason=Reason.UNPACKED,
                message=f"the zip archive's {count} files were unpacked and go on alone",
                duration_ms=duration_ms,
                finished_at=now,
            )

    def finish(self, *, result_id: int, path: str, now: datetime) -> None:
        """Note that the file of a recorded result is filed at `path`, and queue what is sent.

        Raises
        ------
        IllegalTransition
            If the result is not recorded.
        """
        with writing(self._engine) as connection:
            is_new = change_state(
                connection, result_id, current=State.RECORDED, target=State.DONE, finished_at=now
            )
            if not is_new:
                return
            update_image_of(connection, result_id, path=path)
            if self._outbox is not None:
                queue_deliveries(connection, result_id, self._outbox, now)

    def reject(
        self,
        *,
        result_id: int,
        reason: str,
        message: str,
        meta: "RadiographMeta | None",
        duration_ms: int,
        now: datetime,
        plausibility: Plausibility = _NOT_GATED,
    ) -> None:
        """Note that the file is no usable chest X-ray; it is to go to quarantine next.

        Raises
        ------
        IllegalTransition
            If the result is not claimed.
        """
        self._end(
            State.REJECTED,
            result_id=result_id,
            reason=reason,
            message=message,
            meta=meta,
            duration_ms=duration_ms,
            now=now,
            plausibility=plausibility,
        )

    def fail(
        self,
        *,
        result_id: int,
        reason: str,
        message: str,
        meta: "RadiographMeta | None",
        duration_ms: int,
        now: datetime,
        plausibility: Plausibility = _NOT_GATED,
    ) -> None:
        """Note that the file could not be processed; it is to go to quarantine next.

        Raises
        ------
        IllegalTransition
            If the result is not claimed.
        """
        self._end(
            State.FAILED,
            result_id=result_id,
            reason=reason,
            message=message,
            meta=meta,
            duration_ms=duration_ms,
            now=now,
            plausibility=plausibility,
        )

    def lose(self, *, result_id: int, now: datetime) -> None:
        """Note that somebody took a file away between its claim and its end.

        Raises
        ------
        IllegalTransition
            If the result is neither claimed nor recorded.
        NotFoundError
            If there is no such result.
        """
        with writing(self._engine) as connection:
            current = _state_of(connection, result_id)
            if current is State.FAILED and has_ended_at(connection, result_id, now):
                return  # by an earlier try, as in `change_state`
            change_state(
                connection,
                result_id,
                current=current,
                target=State.FAILED,
                reason=Reason.FILE_VANISHED,
                message="the file was removed from work/ by somebody else; drop it again",
                finished_at=now,
            )
            update_image_of(connection, result_id, path=None)

    def request_retry(self, *, result_id: int, now: datetime, deeds: Sequence[Deed] = ()) -> None:
        """Ask for another run of a failed or rejected result.

        Parameters
        ----------
        result_id, now
            Which result, and the time, with a zone.
        deeds
            What the audit says of it: either both are written, or neither.

        Raises
        ------
        IllegalTransition
            If it neither failed nor was rejected.
        NotFoundError
            If there is no such result.
        """
        with writing(self._engine) as connection:
            change_state(
                connection,
                result_id,
                current=_state_of(connection, result_id),
                target=State.QUEUED,
                attempts=0,
                reason=None,
                message=None,
                claimed_at=now,
                finished_at=None,
                duration_ms=None,
                **asdict(_NOT_GATED),
            )
            note_within(connection, now, deeds)

    def _end(
        self,
        target: State,
        *,
        result_id: int,
        reason: str,
        message: str,
        meta: "RadiographMeta | None",
        duration_ms: int,
        now: datetime,
        plausibility: Plausibility = _NOT_GATED,
    ) -> None:
        with writing(self._engine) as connection:
            is_new = change_state(
                connection,
                result_id,
                current=State.CLAIMED,
                target=target,
                reason=reason,
                message=clean(message),
                duration_ms=duration_ms,
                finished_at=now,
                **asdict(plausibility),
            )
            if is_new and meta is not None:
                update_image_of(connection, result_id, **meta_columns(meta))


def _state_of(connection: Connection, result_id: int) -> State:
    state = connection.scalar(select(Result.state).where(Result.id == result_id))
    if state is None:
        raise NotFoundError(f"there is no result {result_id}")
    return state
