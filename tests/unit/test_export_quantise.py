"""Calibration images come evenly from every source and finding."""

from collections import Counter
from pathlib import Path

import pytest

from lungwatch.export.quantise import spread
from lungwatch.training.samples import Sample


def samples(**groups):
    return [
        Sample(path=Path(f"{name}-{index}.png"), finding="COVID", source=name)
        for name, count in groups.items()
        for index in range(count)
    ]


@pytest.mark.parametrize(
    ("groups", "count", "taken"),
    [
        ({"a": 100, "b": 100}, 30, {"a": 15, "b": 15}),
        ({"large": 500, "tiny": 2, "middle": 40}, 60, {"tiny": 2, "middle": 29, "large": 29}),
        ({"a": 3, "b": 4}, 300, {"a": 3, "b": 4}),
    ],
)
def test_small_groups_give_all_and_the_others_share_the_rest(groups, count, taken):
    chosen = spread(samples(**groups), count)
    assert Counter(s.source for s in chosen) == taken
    assert len({s.path for s in chosen}) == len(chosen)


def test_within_a_group_they_are_spread_and_always_the_same():
    chosen = [s.path.name for s in spread(samples(a=101), 3)]
    assert chosen == ["a-0.png", "a-50.png", "a-100.png"]
    assert chosen == [s.path.name for s in spread(samples(a=101), 3)]
