"""What becomes of one object for one destination, and which changes are possible.

Every change is compare-and-set: it names the state it starts from, and a pair that is not in
the table is refused before the database is asked.
"""

from collections.abc import Mapping
from enum import StrEnum

from lungwatch.errors import DatabaseError


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


TRANSITIONS: Mapping[DeliveryState, frozenset[DeliveryState]] = {
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
    if target not in TRANSITIONS[current]:
        raise IllegalDeliveryTransition(f"a delivery cannot go from {current} to {target}")
