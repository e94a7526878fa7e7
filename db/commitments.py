"""Storage commitment: requests to destinations, their reports, and requests of other systems."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import Connection, Engine, func, or_, select, update

from lungwatch.db.engine import (
    Value,
    change_state,
    clean,
    columns_for,
    insert_if_new,
    read_rows,
    reading,
    writing,
)
from lungwatch.db.models import (
    COMMITMENT_TRANSITIONS,
    UNCOMMITTED,
    CommitmentRequest,
    CommitmentState,
    CommitmentTransaction,
    Delivery,
    DeliveryState,
    IllegalTransition,
    Image,
    RequestState,
    Result,
    State,
)


@dataclass(frozen=True, kw_only=True)
class DueCommitment:
    """A sent object whose commitment is to be asked for."""

    id: int
    sha256: str
    kind: str
    sop_class_uid: str | None
    sop_instance_uid: str
    sent_at: datetime
    commitment_tries: int | None


@dataclass(frozen=True, kw_only=True)
class ReportOutcome:
    """What a destination's report changed.

    Attributes
    ----------
    committed
        SOP Instance UIDs whose deliveries are committed now.
    again, failed
        Deliveries that are sent again, and those that have failed for good.
    """

    destination: str
    committed: tuple[str, ...]
    again: int
    failed: int


@dataclass(frozen=True, kw_only=True)
class RequestRow:
    """Another system's request; the fields are those of `CommitmentRequest`."""

    id: int
    transaction_uid: str
    ae_title: str
    instances: list[str]
    state: RequestState
    attempts: int
    next_attempt_at: datetime | None
    error: str | None
    committed: int | None
    created_at: datetime
    reported_at: datetime | None


class Commitments:
    """The writing side. Each method is one transaction; the time is passed in.

    Every method may raise `DatabaseError`.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def request(
        self,
        destination: str,
        ids: Collection[int],
        *,
        transaction_uid: str,
        now: datetime,
        due_at: datetime,
    ) -> None:
        """Note that a destination is being asked, before it is: all of them, or none.

        Parameters
        ----------
        due_at
            When it is asked again without a report.
        """
        with writing(self._engine) as connection:
            insert_if_new(
                connection,
                CommitmentTransaction,
                ("transaction_uid",),
                {
                    "transaction_uid": transaction_uid,
                    "destination": destination,
                    "requested_at": now,
                },
            )
            for delivery_id in ids:
                _change(
                    connection,
                    delivery_id,
                    CommitmentState.DUE,
                    CommitmentState.REQUESTED,
                    commitment_uid=transaction_uid,
                    commitment_at=now,
                    commitment_due_at=due_at,
                )
            connection.execute(
                update(Delivery)
                .where(Delivery.id.in_(ids))
                .values(commitment_tries=func.coalesce(Delivery.commitment_tries, 0) + 1)
            )

    def postpone(
        self, transaction_uid: str, *, error: str, now: datetime, due_at: datetime
    ) -> None:
        """Ask for what a transaction was about again later: the request was not taken."""
        with writing(self._engine) as connection:
            connection.execute(
                update(Delivery)
                .where(
                    Delivery.commitment_uid == transaction_uid,
                    Delivery.commitment == CommitmentState.REQUESTED,
                )
                .values(
                    commitment=CommitmentState.DUE,
                    commitment_at=now,
                    commitment_due_at=due_at,
                    commitment_error=clean(error),
                )
            )

    def expire(self, destination: str, *, now: datetime, limit: timedelta) -> list[str]:
        """Ask again where no report came in time, and fail what has waited longer than `limit`.

        Returns
        -------
        list of str
            SOP Instance UIDs of the failed.
        """
        waiting = (Delivery.destination == destination, Delivery.commitment.in_(UNCOMMITTED))
        late = (*waiting, Delivery.sent_at < now - limit)
        with writing(self._engine) as connection:
            found = connection.execute(select(Delivery.sop_instance_uid).where(*late))
            failed = [str(row.sop_instance_uid) for row in found if row.sop_instance_uid]
            connection.execute(
                update(Delivery)
                .where(*late)
                .values(
                    commitment=CommitmentState.FAILED,
                    commitment_at=now,
                    commitment_due_at=None,
                    commitment_error=func.coalesce(
                        Delivery.commitment_error, "no report before the deadline"
                    ),
                )
            )
            connection.execute(
                update(Delivery)
                .where(
                    Delivery.destination == destination,
                    Delivery.commitment == CommitmentState.REQUESTED,
                    Delivery.commitment_due_at <= now,
                )
                .values(
                    commitment=CommitmentState.DUE,
                    commitment_at=now,
                    commitment_error="no report in time",
                )
            )
            return failed

    def report(
        self,
        transaction_uid: str,
        *,
        committed: Collection[str],
        failed: Mapping[str, int],
        now: datetime,
        next_attempt_at: datetime,
        most: int,
    ) -> ReportOutcome | None:
        """Apply a destination's report; None for a transaction that was never requested.

        What it does not have is sent again, `most` times in all; then the delivery has failed. A
        failure counts for the last request alone, success for any.

        Parameters
        ----------
        committed
            SOP Instance UIDs.
        failed
            Failure reason (PS3.4 J.3.3.1.1) by SOP Instance UID.
        """
        with writing(self._engine) as connection:
            known = select(CommitmentTransaction.destination).where(
                CommitmentTransaction.transaction_uid == transaction_uid
            )
            destination = connection.scalar(known)
            if destination is None:
                return None
            rows = connection.execute(
                select(
                    Delivery.id,
                    Delivery.sop_instance_uid,
                    Delivery.commitment,
                    Delivery.commitment_uid,
                    func.coalesce(Delivery.commitment_failures, 0).label("failures"),
                ).where(
                    Delivery.destination == destination,
                    Delivery.state == DeliveryState.SENT,
                    Delivery.commitment.in_(UNCOMMITTED),
                    Delivery.sop_instance_uid.in_([*committed, *failed]),
                )
            ).all()
            done, again, ended = [], 0, 0
            for row in rows:
                uid = str(row.sop_instance_uid)
                if uid in committed and uid not in failed:
                    _change(
                        connection,
                        row.id,
                        row.commitment,
                        CommitmentState.COMMITTED,
                        commitment_at=now,
                        commitment_due_at=None,
                        commitment_error=None,
                    )
                    done.append(uid)
                elif row.commitment_uid == transaction_uid:
                    error = f"not committed: failure reason 0x{failed[uid]:04X}"
                    has_failed = row.failures + 1 >= most
                    _lose(
                        connection,
                        row.id,
                        failures=row.failures + 1,
                        error=error,
                        now=now,
                        next_attempt_at=None if has_failed else next_attempt_at,
                    )
                    again, ended = again + (not has_failed), ended + has_failed
            return ReportOutcome(
                destination=destination, committed=tuple(done), again=again, failed=ended
            )

    def accept(
        self, ae_title: str, transaction_uid: str, instances: Collection[str], now: datetime
    ) -> int:
        """Note another system's request, and return its id; the same one twice is one row."""
        mine = (
            CommitmentRequest.ae_title == ae_title,
            CommitmentRequest.transaction_uid == transaction_uid,
        )
        with writing(self._engine) as connection:
            values: dict[str, Value] = {
                "instances": list(instances),
                "state": RequestState.PENDING,
                "attempts": 0,
                "next_attempt_at": now,
                "error": None,
                "committed": None,
                "created_at": now,
            }
            is_new = insert_if_new(
                connection,
                CommitmentRequest,
                ("ae_title", "transaction_uid"),
                {**values, "ae_title": ae_title, "transaction_uid": transaction_uid},
            )
            if not is_new:
                connection.execute(update(CommitmentRequest).where(*mine).values(**values))
            return connection.execute(select(CommitmentRequest.id).where(*mine)).scalar_one()

    def put_off(
        self, request_id: int, *, error: str | None, next_attempt_at: datetime, is_try: bool
    ) -> None:
        """Report later: not decided yet, or the requester was not reached (`is_try`)."""
        self._update(
            request_id,
            next_attempt_at=next_attempt_at,
            attempts=CommitmentRequest.attempts + is_try,
            **({} if error is None else {"error": clean(error)}),
        )

    def reported(self, request_id: int, *, committed: int, now: datetime) -> None:
        """Note that the requester has taken the report."""
        self._update(
            request_id,
            state=RequestState.REPORTED,
            next_attempt_at=None,
            committed=committed,
            reported_at=now,
        )

    def not_reported(self, request_id: int, error: str) -> None:
        """Give a report up."""
        self._update(
            request_id, state=RequestState.FAILED, next_attempt_at=None, error=clean(error)
        )

    def _update(self, request_id: int, **values: object) -> None:
        with writing(self._engine) as connection:
            connection.execute(
                update(CommitmentRequest)
                .where(
                    CommitmentRequest.id == request_id,
                    CommitmentRequest.state == RequestState.PENDING,
                )
                .values(**values)
            )


def _change(
    connection: Connection,
    delivery_id: int,
    current: CommitmentState,
    target: CommitmentState,
    **values: Value,
) -> None:
    if target not in COMMITMENT_TRANSITIONS[current]:
        raise IllegalTransition(f"a commitment cannot go from {current} to {target}")
    changed = connection.execute(
        update(Delivery)
        .where(Delivery.id == delivery_id, Delivery.commitment == current)
        .values(commitment=target, **values)
    )
    if changed.rowcount != 1:
        raise IllegalTransition(f"the commitment of delivery {delivery_id} is not {current}")


def _lose(
    connection: Connection,
    delivery_id: int,
    *,
    failures: int,
    error: str,
    now: datetime,
    next_attempt_at: datetime | None,
) -> None:
    """Queue a delivery again that its destination does not have; without a time it has failed."""
    has_failed = next_attempt_at is None
    change_state(
        connection,
        Delivery,
        delivery_id,
        current=DeliveryState.SENT,
        target=DeliveryState.FAILED if has_failed else DeliveryState.QUEUED,
        attempts=0,
        refusals=0,
        error=error,
        next_attempt_at=next_attempt_at,
        commitment=CommitmentState.FAILED if has_failed else None,
        commitment_at=now,
        commitment_due_at=None,
        commitment_failures=failures,
        commitment_error=error,
    )


def due_commitments(
    engine: Engine, destination: str, *, now: datetime, longest: timedelta, limit: int
) -> list[DueCommitment]:
    """Return the objects that a destination is to be asked about now.

    Parameters
    ----------
    longest
        As of `due_deliveries`.
    """
    statement = (
        select(*columns_for(DueCommitment, Delivery, {"sha256": Image.sha256}))
        .select_from(Delivery)
        .join(Result)
        .join(Image)
        .where(
            Delivery.destination == destination,
            Delivery.state == DeliveryState.SENT,
            Delivery.commitment == CommitmentState.DUE,
            Delivery.sop_instance_uid.is_not(None),
            or_(
                Delivery.commitment_due_at <= now,
                Delivery.commitment_due_at > now + longest,
            ),
        )
        .order_by(Delivery.commitment_due_at, Delivery.id)
        .limit(limit)
    )
    return read_rows(engine, DueCommitment, statement)


def pending_requests(engine: Engine, ae_title: str, now: datetime) -> list[RequestRow]:
    """Return the requests of one requester that are to be reported now, the oldest first."""
    statement = (
        select(*columns_for(RequestRow, CommitmentRequest))
        .where(
            CommitmentRequest.ae_title == ae_title,
            CommitmentRequest.state == RequestState.PENDING,
            CommitmentRequest.next_attempt_at <= now,
        )
        .order_by(CommitmentRequest.id)
    )
    return read_rows(engine, RequestRow, statement)


def list_requests(engine: Engine, *, pending_only: bool = False) -> list[RequestRow]:
    """Return other systems' requests, the oldest first."""
    statement = select(*columns_for(RequestRow, CommitmentRequest)).order_by(CommitmentRequest.id)
    if pending_only:
        statement = statement.where(CommitmentRequest.state == RequestState.PENDING)
    return read_rows(engine, RequestRow, statement)


def kept_paths(engine: Engine, sop_instance_uids: Collection[str]) -> dict[str, list[str]]:
    """Return where the files of SOP instances are that have been filed, relative to the home.

    What retention removed, what another program took away and what is not decided yet is not
    among them.
    """
    image = Image.__table__.c
    found: dict[str, list[str]] = {}
    wanted = sorted(sop_instance_uids)
    with reading(engine) as connection:
        for start in range(0, len(wanted), _AT_ONCE):
            statement = (
                select(image.sop_uid, Image.path)
                .join_from(Image, Result)
                .where(
                    image.sop_uid.in_(wanted[start : start + _AT_ONCE]),
                    Image.path.is_not(None),
                    Image.removed_at.is_(None),
                    Result.state != State.CLAIMED,
                )
            )
            for uid, path in connection.execute(statement):
                found.setdefault(uid, []).append(path)
    return found


_AT_ONCE = 500
