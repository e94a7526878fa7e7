"""Results: every write to images, models and results, one transaction a method."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from typing import TYPE_CHECKING

from sqlalchemy import Connection, Engine, select

from lungwatch.db.audit import AuditEvent, add_events
from lungwatch.db.claims import Claim, Drop, claim_drop
from lungwatch.db.deliveries import OutboxPlan, queue_deliveries
from lungwatch.db.engine import (
    change_state,
    clean,
    has_ended_at,
    insert_if_new,
    meta_columns,
    reading,
    update_image,
    update_image_of,
    writing,
)
from lungwatch.db.models import Image, Model, Plausibility, Result
from lungwatch.db.states import State
from lungwatch.errors import NotFoundError, Reason

if TYPE_CHECKING:
    from lungwatch.attributes import RadiographMeta


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
        findings: Mapping[str, float] | None = None,
        calibration: str | None = None,
        components: Sequence[float] | None = None,
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
        findings
            Calibrated probability, 0..1, of each finding by name; None for COVID alone.
        calibration
            The site calibration that decided; None if the bundle's own did.
        components
            Of the embedding, for drift; None if the model's bundle has no axes.

        Raises
        ------
        IllegalTransition
            If the result is not claimed.
        """
        # Costs OpenCV, which commands that only read can do without.
        from lungwatch.contract import COVID_FINDING  # noqa: PLC0415

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
                findings=dict(findings or {COVID_FINDING: probability}),
                calibration=calibration,
                **asdict(plausibility),
                components=None if components is None else list(components),
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

    def request_retry(
        self, *, result_id: int, now: datetime, deeds: Sequence[AuditEvent] = ()
    ) -> None:
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
            add_events(connection, now, deeds)

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


class Store(ResultWriter):
    """The writing side of the record.

    Every method may raise `DatabaseError`; `DatabaseBusyError`, which is also a
    `TransientError`, where trying again may help.

    Parameters
    ----------
    outbox
        What is to be sent of each result that is done, and whereto; None for nothing.
    """

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

    def claim(
        self,
        *,
        token: str,
        sha256: str,
        size_bytes: int,
        source_name: str,
        path: str,
        model_id: int,
        max_attempts: int,
        now: datetime,
        exists: Callable[[str], bool],
        arrival: bool = True,
    ) -> Claim:
        """Note a dropped file and decide what is to be done with it.

        Parameters
        ----------
        token
            Names this drop, whatever happens: seen again after a crash, it counts once.
        sha256, size_bytes
            Of the file's bytes.
        source_name
            The name it was dropped under.
        path
            Where the file is now, relative to the home.
        model_id
            The model that is to score it.
        max_attempts
            Runs that may end in a crash before the file is given up.
        now
            The time, with a zone.
        exists
            Says whether a path relative to the home is there. A copy that is recorded but
            gone gives way to this one.
        arrival
            False for a file that nobody dropped (another run of one that is filed).

        Raises
        ------
        IllegalTransition
            If another process changed the result in between.
        """
        drop = Drop(
            token=token,
            sha256=sha256,
            size_bytes=size_bytes,
            source_name=source_name,
            path=path,
            model_id=model_id,
            max_attempts=max_attempts,
            now=now,
            exists=exists,
            arrival=arrival,
        )
        with writing(self._engine) as connection:
            return claim_drop(connection, drop)

    def filed_as_done(self, image_id: int) -> datetime | None:
        """Return when an image was received, if some model's result of it is done; else None."""
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
            update_image(connection, image_id, path=path)
