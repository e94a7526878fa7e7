"""States of results and deliveries, with one transition table each.

Every change of state is a compare-and-set: it names the state it starts from, and a pair that its
table does not hold is an error before the database is asked.
"""

from collections.abc import Mapping
from enum import StrEnum

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
    # The others on request only: somebody asked to send it again.
    DeliveryState.SENT: frozenset({DeliveryState.QUEUED}),
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
