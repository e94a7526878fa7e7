"""The tables of transitions of results and deliveries: whole, literal, and nothing beside them."""

from itertools import product

import pytest

from lungwatch.db.models import (
    DELIVERY_ORDER,
    DELIVERY_TRANSITIONS,
    RESULT_TRANSITIONS,
    UNFINISHED,
    UNSENT,
    DeliveryState,
    IllegalTransition,
    State,
    check_transition,
)
from lungwatch.errors import DatabaseError

OF_RESULTS = {
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
OF_DELIVERIES = {
    ("queued", "sending"),
    ("sending", "sent"),
    ("sending", "queued"),
    ("sending", "failed"),
    ("sending", "invalid"),
    ("sent", "queued"),
    ("sent", "failed"),
    ("failed", "queued"),
    ("invalid", "queued"),
}


@pytest.mark.parametrize(
    ("allowed", "current", "target"),
    [
        *((OF_RESULTS, *pair) for pair in product(State, State)),
        *((OF_DELIVERIES, *pair) for pair in product(DeliveryState, DeliveryState)),
    ],
)
def test_exactly_the_allowed_pairs_pass(allowed, current, target) -> None:
    if (current.value, target.value) in allowed:
        assert check_transition(current, target) is None
    else:
        with pytest.raises(IllegalTransition, match=f"from {current} to {target}"):
            check_transition(current, target)


def test_a_state_of_a_result_is_none_of_a_delivery_though_their_texts_are_equal() -> None:
    with pytest.raises(IllegalTransition, match="a result cannot go from failed to queued"):
        check_transition(State.FAILED, DeliveryState.QUEUED)


def test_every_state_has_a_row_in_its_table() -> None:
    assert set(RESULT_TRANSITIONS) == set(State)
    assert set(DELIVERY_TRANSITIONS) == set(DeliveryState) == set(DELIVERY_ORDER)
    assert set(UNSENT) < set(DeliveryState)


def test_every_state_of_a_result_can_be_left_or_is_an_end() -> None:
    assert {state for state in State if not RESULT_TRANSITIONS[state]} == {State.DONE}
    assert {*UNFINISHED, State.DONE, State.REJECTED, State.FAILED} == set(State)


def test_an_illegal_transition_is_a_database_error() -> None:
    assert issubclass(IllegalTransition, DatabaseError)
