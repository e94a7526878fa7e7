"""What may become of a delivery, and that nothing else can."""

from itertools import product

import pytest

from lungwatch.db.states import (
    DELIVERY_ORDER,
    DELIVERY_TRANSITIONS,
    UNSENT,
    DeliveryState,
    IllegalTransition,
    check_transition,
)

ALLOWED = {
    ("queued", "sending"),
    ("sending", "sent"),
    ("sending", "queued"),
    ("sending", "failed"),
    ("sending", "invalid"),
    ("sent", "queued"),
    ("failed", "queued"),
    ("invalid", "queued"),
}


@pytest.mark.parametrize(("current", "target"), list(product(DeliveryState, DeliveryState)))
def test_the_table_holds_these_changes_and_no_other(
    current: DeliveryState, target: DeliveryState
) -> None:
    if (current, target) in ALLOWED:
        check_transition(current, target)
        assert target in DELIVERY_TRANSITIONS[current]
        return
    with pytest.raises(IllegalTransition, match=f"from {current} to {target}"):
        check_transition(current, target)


def test_every_state_has_its_row_and_its_rank() -> None:
    assert set(DELIVERY_TRANSITIONS) == set(DeliveryState) == set(DELIVERY_ORDER)
    assert set(UNSENT) < set(DeliveryState)
