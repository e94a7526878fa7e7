"""States of results and deliveries, with one transition table each."""

from collections.abc import Mapping
from enum import StrEnum

from lungwatch.errors import DatabaseError


class State(StrEnum):
    """Where one image stands with one model.

    ``queued``: somebody asked for another run. ``claimed``: being worked on. ``recorded``:
    the result is written, the file is not filed yet. ``done``, ``rejected`` and ``failed``
    are ends.
    """

    QUEUED = "queued"
    CLAIMED = "claimed"
    RECORDED = "recorded"
    DONE = "done"
    REJECTED = "rejected"
    FAILED = "failed"


UNFINISHED = (State.QUEUED, State.CLAIMED, State.RECORDED)


RESULT_TRANSITIONS: Mapping[State, frozenset[State]] = {
    State.QUEUED: frozenset({State.CLAIMED}),
    # To itself: another attempt after a crash.
    State.CLAIMED: frozenset({State.CLAIMED, State.RECORDED, State.REJECTED, State.FAILED}),
    # What is recorded is never computed again: only the filing is repeated, and fails if
    # somebody took the file away.
    State.RECORDED: frozenset({State.DONE, State.FAILED}),
    State.DONE: frozenset(),
    State.REJECTED: frozenset({State.QUEUED}),
    # To claimed: the same bytes were dropped again.
    State.FAILED: frozenset({State.QUEUED, State.CLAIMED}),
}


class IllegalTransition(DatabaseError):  # noqa: N818 - named as the table it guards
    """A result cannot go from the state it is in to the one asked for."""


def check_transition(current: State, target: State) -> None:
    """Refuse a change that the table does not hold.

    Raises
    ------
    IllegalTransition
        If `target` may not follow `current`.
    """
    if target not in RESULT_TRANSITIONS[current]:
        raise IllegalTransition(f"a result cannot go from {current} to {target}")


class DeliveryState(StrEnum):
    """State of one delivery: an object kind of a result on its way to one destination."""

    QUEUED = "queued"
    """To be sent when it is due."""
    SENDING = "sending"
    """Being built or in an association, of this process or of one that died."""
    SENT = "sent"
    """The destination answered with success. Never sent again by itself."""
    FAILED = "failed"
    """The destination refused it for good."""
    INVALID = "invalid"
    """The object could not be built as a valid one, and was not sent."""


class IllegalDeliveryTransition(DatabaseError):  # noqa: N818 - named as the table it guards
    """A delivery cannot go from the state it is in to the one asked for."""


DELIVERY_TRANSITIONS: Mapping[DeliveryState, frozenset[DeliveryState]] = {
    DeliveryState.QUEUED: frozenset({DeliveryState.SENDING}),
    DeliveryState.SENDING: frozenset(
        {
            DeliveryState.SENT,
            DeliveryState.QUEUED,  # not reached, a passing refusal, or its process died
            DeliveryState.FAILED,
            DeliveryState.INVALID,
        }
    ),
    # The rest by hand alone: it was asked to be sent again.
    DeliveryState.SENT: frozenset({DeliveryState.QUEUED}),
    DeliveryState.FAILED: frozenset({DeliveryState.QUEUED}),
    DeliveryState.INVALID: frozenset({DeliveryState.QUEUED}),
}


UNSENT = (DeliveryState.QUEUED, DeliveryState.SENDING)


DELIVERY_ORDER = (
    DeliveryState.FAILED,
    DeliveryState.INVALID,
    DeliveryState.QUEUED,
    DeliveryState.SENDING,
    DeliveryState.SENT,
)

"""What most wants looking at first: a result's deliveries in one word."""


def check_delivery_transition(current: DeliveryState, target: DeliveryState) -> None:
    """Refuse a change that the table does not hold.

    Raises
    ------
    IllegalDeliveryTransition
        If `target` may not follow `current`.
    """
    if target not in DELIVERY_TRANSITIONS[current]:
        raise IllegalDeliveryTransition(f"a delivery cannot go from {current} to {target}")
