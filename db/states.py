"""The states of a result, and the one table that says which may follow which."""

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

TRANSITIONS: Mapping[State, frozenset[State]] = {
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
    if target not in TRANSITIONS[current]:
        raise IllegalTransition(f"a result cannot go from {current} to {target}")
