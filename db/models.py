"""Tables of the database, and the states of results and deliveries with their transitions.

The migrations in `lungwatch.db.migrations` bring a database of an earlier version to these tables.
A state changes by compare-and-set: the change names the state that it starts from, and a pair that
the table of transitions does not hold is an error before the database is asked.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, ClassVar

from sqlalchemy import (
    JSON,
    BigInteger,
    DateTime,
    Dialect,
    Double,
    Enum,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Text,
    UniqueConstraint,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.types import TypeDecorator

from lungwatch.attributes import ATTRIBUTES
from lungwatch.errors import DatabaseError


class State(StrEnum):
    """State of one image with one model."""

    QUEUED = "queued"
    """Another run was requested."""
    CLAIMED = "claimed"
    """The file is being processed."""
    RECORDED = "recorded"
    """The result is written, the file is not moved to its final folder yet."""
    DONE = "done"
    REJECTED = "rejected"
    FAILED = "failed"


class DeliveryState(StrEnum):
    """State of one delivery: one object of a result for one destination."""

    QUEUED = "queued"
    """To be sent when it is due."""
    SENDING = "sending"
    """Being built or sent, by this process or by one that died."""
    SENT = "sent"
    """The destination answered with success. Never sent again on its own."""
    FAILED = "failed"
    """The destination refused it for good."""
    INVALID = "invalid"
    """No valid object could be built; nothing was sent."""


class CommitmentState(StrEnum):
    """Storage commitment of one delivery (PS3.4 annex J); none where it is not asked for."""

    DUE = "due"
    """Sent; the destination is to be asked when it is due."""
    REQUESTED = "requested"
    """Being asked, or asked: the destination's report is awaited."""
    COMMITTED = "committed"
    """The destination has taken responsibility for the object."""
    FAILED = "failed"
    """The destination does not have it, or has not reported before the deadline."""


class RequestState(StrEnum):
    """Another system's request for storage commitment of what was received here."""

    PENDING = "pending"
    """To be decided and reported."""
    REPORTED = "reported"
    FAILED = "failed"
    """The requester could not be told."""


COMMITMENT_TRANSITIONS: Mapping[CommitmentState, frozenset[CommitmentState]] = {
    # To committed: the late report on an earlier request.
    CommitmentState.DUE: frozenset(
        {CommitmentState.REQUESTED, CommitmentState.COMMITTED, CommitmentState.FAILED}
    ),
    # To due: not reached, no report in time, or the process died; asked again.
    CommitmentState.REQUESTED: frozenset(
        {CommitmentState.DUE, CommitmentState.COMMITTED, CommitmentState.FAILED}
    ),
    CommitmentState.COMMITTED: frozenset(),
    CommitmentState.FAILED: frozenset(),
}

UNCOMMITTED = (CommitmentState.DUE, CommitmentState.REQUESTED)

RESULT_TRANSITIONS: Mapping[State, frozenset[State]] = {
    State.QUEUED: frozenset({State.CLAIMED}),
    # To itself: another attempt after a crash.
    State.CLAIMED: frozenset({State.CLAIMED, State.RECORDED, State.REJECTED, State.FAILED}),
    # A recorded result is never computed again: only the filing is repeated. It fails if the
    # file was removed by another program.
    State.RECORDED: frozenset({State.DONE, State.FAILED}),
    State.DONE: frozenset(),
    State.REJECTED: frozenset({State.QUEUED}),
    # To claimed: the same bytes were dropped again.
    State.FAILED: frozenset({State.QUEUED, State.CLAIMED}),
}

DELIVERY_TRANSITIONS: Mapping[DeliveryState, frozenset[DeliveryState]] = {
    DeliveryState.QUEUED: frozenset({DeliveryState.SENDING}),
    DeliveryState.SENDING: frozenset(
        {
            DeliveryState.SENT,
            DeliveryState.QUEUED,  # not reached, a temporary refusal, or the process died
            DeliveryState.FAILED,
            DeliveryState.INVALID,
        }
    ),
    # To queued: somebody asked to send it again, or the destination reported that it has lost it.
    # To failed: it reported that for the last time.
    DeliveryState.SENT: frozenset({DeliveryState.QUEUED, DeliveryState.FAILED}),
    # The others on request only.
    DeliveryState.FAILED: frozenset({DeliveryState.QUEUED}),
    DeliveryState.INVALID: frozenset({DeliveryState.QUEUED}),
}

UNFINISHED = (State.QUEUED, State.CLAIMED, State.RECORDED)

UNSENT = (DeliveryState.QUEUED, DeliveryState.SENDING)

DELIVERY_ORDER = (
    DeliveryState.FAILED,
    DeliveryState.INVALID,
    DeliveryState.QUEUED,
    DeliveryState.SENDING,
    DeliveryState.SENT,
)
"""Order in which one state stands for all deliveries of a result: the most urgent first."""


class IllegalTransition(DatabaseError):  # noqa: N818 - named after the tables that it guards
    """A result or a delivery cannot go from its state to the requested one."""


def check_transition(current: State | DeliveryState, target: State | DeliveryState) -> None:
    """Refuse a change that the table of transitions does not hold.

    Raises
    ------
    IllegalTransition
        If `target` may not follow `current`.
    """
    # A type each: the members of the two enumerations compare equal by their text.
    allowed, what = (
        (RESULT_TRANSITIONS[current], "result")
        if isinstance(current, State)
        else (DELIVERY_TRANSITIONS[current], "delivery")
    )
    if type(target) is not type(current) or target not in allowed:
        raise IllegalTransition(f"a {what} cannot go from {current} to {target}")


class UtcDateTime(TypeDecorator[datetime]):
    """An instant: aware datetimes in and out, UTC in the database, alike on both databases.

    SQLite keeps text without a zone, which sorts and compares correctly because it is
    always UTC; PostgreSQL has ``timestamptz``.
    """

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Convert to UTC; a naive datetime is a defect of the program."""
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError(f"{value.isoformat()} has no time zone")
        value = value.astimezone(UTC)
        return value.replace(tzinfo=None) if dialect.name == "sqlite" else value

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:  # noqa: ARG002 - TypeDecorator's signature
        """Return the instant in UTC."""
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


def _state_column(states: type[StrEnum]) -> Enum:
    return Enum(
        states,
        native_enum=False,
        length=16,
        values_callable=lambda members: [member.value for member in members],
    )


class Base(DeclarativeBase):
    """Base of all tables; constraint names are fixed so that migrations can address them."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map: ClassVar[dict[Any, Any]] = {
        datetime: UtcDateTime(),
        # Its default differs between SQLAlchemy's versions.
        float: Double(),
        State: _state_column(State),
        DeliveryState: _state_column(DeliveryState),
        CommitmentState: _state_column(CommitmentState),
        RequestState: _state_column(RequestState),
        list[str]: JSON(),
        # NULL for none, which SQL can ask for, instead of JSON's null.
        list[float]: JSON(none_as_null=True),
        dict[str, object]: JSON(),
        # Rows without findings hold NULL, not JSON's null.
        dict[str, float]: JSON(none_as_null=True),
    }


class Image(Base):
    """One content: the same bytes are one image, however often and under whatever names they come.

    Each attribute of `lungwatch.attributes` is a column too, NULL until the file is decoded; in
    queries it is `Image.__table__.c.<name>`.
    """

    __tablename__ = "image"

    id: Mapped[int] = mapped_column(primary_key=True)
    sha256: Mapped[str] = mapped_column(String(64), unique=True)
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    source_name: Mapped[str] = mapped_column(Text)
    """The name it first came under."""
    path: Mapped[str | None] = mapped_column(Text)
    """Where the file is, relative to the home; None while that is not known."""
    received_at: Mapped[datetime] = mapped_column(index=True)
    format: Mapped[str | None] = mapped_column(String(16))
    removed_at: Mapped[datetime | None]
    """When retention removed the file, if `path` is None for that reason."""


for _name, _attribute in ATTRIBUTES.items():
    if _name not in Image.__table__.c:
        _type = {"number": Integer, "instant": UtcDateTime}.get(_attribute.kind, Text)
        setattr(Image, _name, mapped_column(_type, index=_attribute.is_indexed, nullable=True))


class Model(Base):
    """One model file that was used, with its contract at that time."""

    __tablename__ = "model"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(Text)
    version: Mapped[str] = mapped_column(Text)
    sha256: Mapped[str] = mapped_column(String(64), unique=True)
    """Of ``model.onnx``: two builds of one version are two models."""
    contract: Mapped[str] = mapped_column(Text)
    first_used_at: Mapped[datetime]


class Result(Base):
    """The outcome of one image with one model."""

    __tablename__ = "result"
    __table_args__ = (
        UniqueConstraint("image_id", "model_id"),
        Index(None, "state"),
        Index(None, "finished_at"),
    )

    id: Mapped[int] = mapped_column(primary_key=True)
    image_id: Mapped[int] = mapped_column(ForeignKey("image.id"))
    model_id: Mapped[int] = mapped_column(ForeignKey("model.id"))
    state: Mapped[State]
    reason: Mapped[str | None] = mapped_column(String(64))
    message: Mapped[str | None] = mapped_column(Text)
    attempts: Mapped[int]
    """Runs started since the last drop or retry."""
    label: Mapped[str | None] = mapped_column(String(16))
    probability: Mapped[float | None]
    """Calibrated, 0..1."""
    logit: Mapped[float | None]
    threshold: Mapped[float | None]
    uncertain_from: Mapped[float | None]
    uncertain_to: Mapped[float | None]
    """Probabilities within [from, to) are UNCERTAIN; equal where the model never abstains."""
    findings: Mapped[dict[str, float] | None]
    """Calibrated probability, 0..1, of each finding by name, that of COVID as `covid`."""
    gate_score: Mapped[float | None]
    lung_area: Mapped[float | None]
    lung_share: Mapped[float | None]
    """The fields of `Plausibility`; of refused files too."""
    calibration: Mapped[str | None] = mapped_column(String(64))
    """The site calibration that decided (`lungwatch.bundle`); None: the bundle's own."""
    components: Mapped[list[float] | None]
    """The embedding projected on the axes of the bundle's `drift.json`; None without one."""
    flags: Mapped[list[str]]
    overlay: Mapped[str | None] = mapped_column(Text)
    """Where the overlay is, relative to the home."""
    overlay_sha256: Mapped[str | None] = mapped_column(String(64))
    """Of the overlay's bytes; None for one that schema 0010 or an earlier one recorded."""
    claimed_at: Mapped[datetime | None]
    """When the last attempt began; of a queued one, when it was requested."""
    finished_at: Mapped[datetime | None]
    duration_ms: Mapped[int | None]

    overlay_removed_at: Mapped[datetime | None]
    """When retention removed the overlay, if `overlay` is None for that reason."""


class Arrival(Base):
    """One dropped file; the same content dropped twice is two arrivals of one image."""

    __tablename__ = "arrival"

    id: Mapped[int] = mapped_column(primary_key=True)
    token: Mapped[str] = mapped_column(String(128), unique=True)
    """Made by the daemon; the same drop seen again after a crash has the same token."""
    image_id: Mapped[int] = mapped_column(ForeignKey("image.id"))
    result_id: Mapped[int] = mapped_column(ForeignKey("result.id"), index=True)
    source_name: Mapped[str] = mapped_column(Text)
    arrived_at: Mapped[datetime]
    duplicate: Mapped[bool]
    """Its bytes were known and it started no run."""


class Audit(Base):
    """One audit event; rows are added and never changed."""

    __tablename__ = "audit"

    id: Mapped[int] = mapped_column(primary_key=True)
    at: Mapped[datetime] = mapped_column(index=True)
    actor: Mapped[str] = mapped_column(Text)
    action: Mapped[str] = mapped_column(String(64))
    detail: Mapped[dict[str, object]]
    uid: Mapped[int | None]
    host: Mapped[str | None] = mapped_column(Text)
    target: Mapped[str | None] = mapped_column(Text)
    """A result's number, a folder, a digest; no patient data."""
    outcome: Mapped[str] = mapped_column(String(16), server_default="ok")
    """``started``, ``ok`` or ``failed``."""
    login: Mapped[str | None] = mapped_column(Text)
    login_uid: Mapped[int | None] = mapped_column(BigInteger)
    """The user that the person logged in as, which sudo leaves as it is."""
    environment: Mapped[str | None] = mapped_column(Text)
    """What SUDO_USER and the like said of the user; proves nothing."""


class OwningHome(Base):
    """The home that this database belongs to; one row, or none before the first start."""

    __tablename__ = "home"

    id: Mapped[int] = mapped_column(primary_key=True)
    mark: Mapped[str] = mapped_column(String(36))
    """As in the home's own file."""
    place: Mapped[str] = mapped_column(Text)
    first_used_at: Mapped[datetime]


class ClockReading(Base):
    """The system clock at the last run of retention, beside a clock that nobody sets.

    One row, or none before the first.
    """

    __tablename__ = "clock_reading"

    id: Mapped[int] = mapped_column(primary_key=True)
    at: Mapped[datetime]
    """By the system clock."""
    boot_id: Mapped[str] = mapped_column(String(36))
    """Of the kernel: ``/proc/sys/kernel/random/boot_id``."""
    boottime_s: Mapped[float]
    """``CLOCK_BOOTTIME``: seconds since that boot, suspension included."""


class LeaseHolding(Base):
    """The database's identity, and the lease of the daemon that works with it; one row.

    See `lungwatch.db.identity`.
    """

    __tablename__ = "lease"

    id: Mapped[int] = mapped_column(primary_key=True)
    database_id: Mapped[str] = mapped_column(String(36))
    """Random, made at the first start."""
    counter: Mapped[int] = mapped_column(BigInteger)
    """Advanced by every acquisition and renewal, and by nothing else."""
    token: Mapped[str | None] = mapped_column(String(36))
    """Random, of the process that holds the lease; None for no one."""
    place: Mapped[str | None] = mapped_column(Text)
    """Machine and home folder of the holder, for people."""
    home_inode: Mapped[str | None] = mapped_column(String(24))
    """Inode number of the holder's home folder, which a copy of it does not have."""
    scope: Mapped[str | None] = mapped_column(String(96))
    """Boot and PID namespace in which `pid` means the holder."""
    pid: Mapped[int | None]
    started: Mapped[str | None] = mapped_column(String(24))
    """When the process started, in clock ticks since the boot."""


class Delivery(Base):
    """One object of one result for one destination: a row of the outbox."""

    __tablename__ = "delivery"
    __table_args__ = (
        UniqueConstraint("result_id", "destination", "kind"),
        Index(None, "state"),
        Index(None, "commitment"),
    )

    id: Mapped[int] = mapped_column(primary_key=True)
    result_id: Mapped[int] = mapped_column(ForeignKey("result.id"))
    destination: Mapped[str] = mapped_column(Text)
    """As configured: ``AETITLE@host:port``, with ``+tls`` or without."""
    kind: Mapped[str] = mapped_column(String(8))
    """``sc`` (Secondary Capture) or ``sr`` (Structured Report)."""
    state: Mapped[DeliveryState]
    attempts: Mapped[int]
    """Tries since it was queued."""
    refusals: Mapped[int]
    """Times the destination refused it since it was queued."""
    next_attempt_at: Mapped[datetime | None]
    """Earliest time; None for one that is not queued."""
    error: Mapped[str | None] = mapped_column(Text)
    """Why the last attempt failed; no patient data."""
    sop_instance_uid: Mapped[str | None] = mapped_column(String(64))
    """None until the object was built."""
    created_at: Mapped[datetime]
    sent_at: Mapped[datetime | None]
    sop_class_uid: Mapped[str | None] = mapped_column(String(64))
    """As sent."""
    commitment: Mapped[CommitmentState | None]
    """None where storage commitment is not asked for."""
    commitment_uid: Mapped[str | None] = mapped_column(String(64))
    """Transaction UID of the last request."""
    commitment_at: Mapped[datetime | None]
    """When the commitment came into its state."""
    commitment_due_at: Mapped[datetime | None]
    """When it is asked, or asked again; None at the end."""
    commitment_tries: Mapped[int | None]
    """Requests since it was sent."""
    commitment_failures: Mapped[int | None]
    """Times the destination reported since it was queued that it does not have the object."""
    commitment_error: Mapped[str | None] = mapped_column(Text)


class CommitmentTransaction(Base):
    """A request for storage commitment that was sent; its report may come late."""

    __tablename__ = "commitment_transaction"

    id: Mapped[int] = mapped_column(primary_key=True)
    transaction_uid: Mapped[str] = mapped_column(String(64), unique=True)
    destination: Mapped[str] = mapped_column(Text)
    requested_at: Mapped[datetime]


class CommitmentRequest(Base):
    """A request for storage commitment that was received, until its report is sent and after."""

    __tablename__ = "commitment_request"
    __table_args__ = (UniqueConstraint("ae_title", "transaction_uid"), Index(None, "state"))

    id: Mapped[int] = mapped_column(primary_key=True)
    transaction_uid: Mapped[str] = mapped_column(String(64))
    ae_title: Mapped[str] = mapped_column(String(16))
    """Of the requester."""
    instances: Mapped[list[str]]
    """SOP class and SOP Instance UID of each object, with a space between."""
    state: Mapped[RequestState]
    attempts: Mapped[int]
    next_attempt_at: Mapped[datetime | None]
    """Earliest time of the next report; None for one that is not pending."""
    error: Mapped[str | None] = mapped_column(Text)
    committed: Mapped[int | None]
    """Objects that were reported as committed; None before the report."""
    created_at: Mapped[datetime]
    reported_at: Mapped[datetime | None]


@dataclass(frozen=True, kw_only=True)
class Plausibility:
    """Measurements of the content gate on one image; None where there is no gate.

    Attributes
    ----------
    gate_score
        0..1: that of the check which refused the picture, else the lowest of all.
    lung_area
        Share of the picture that is lung, 0..1.
    lung_share
        Share of the map for COVID that lies inside the lungs, 0..1; None too where that map is
        empty or the picture was not scored.
    """

    gate_score: float | None = None
    lung_area: float | None = None
    lung_share: float | None = None
