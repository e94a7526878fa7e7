"""The table of transitions is what the code goes by, whole and literal."""

import itertools

import pytest

from lungwatch.db.states import (
    RESULT_TRANSITIONS,
    UNFINISHED,
    IllegalTransition,
    State,
    check_transition,
)
from lungwatch.errors import DatabaseError

ALLOWED = {
    ("queued", "claimed"),
    ("claimed", "claimed"),
    ("claimed", "recorded"),
    ("claimed", "rejected"),
    ("claimed", "failed"),
    ("recorded", "done"),
    ("recorded", "failed"),
    ("failed", "queued"),
    ("failed", "claimed"),
    ("rejected", "queued"),
}


@pytest.mark.parametrize(("current", "target"), list(itertools.product(State, State)))
def test_exactly_the_allowed_pairs_pass(current: State, target: State) -> None:
    if (current.value, target.value) in ALLOWED:
        assert check_transition(current, target) is None
    else:
        with pytest.raises(IllegalTransition, match=f"from {current} to {target}"):
            check_transition(current, target)


def test_every_state_has_a_row_in_the_table() -> None:
    assert set(RESULT_TRANSITIONS) == set(State)


def test_every_state_can_be_left_or_is_an_end() -> None:
    assert {state for state in State if not RESULT_TRANSITIONS[state]} == {State.DONE}
    assert {*UNFINISHED, State.DONE, State.REJECTED, State.FAILED} == set(State)


def test_an_illegal_transition_is_a_database_error() -> None:
    assert issubclass(IllegalTransition, DatabaseError)
