"""A map on the lungs counts as such, one beside them does not, an empty one is left out."""

import numpy as np
import pytest

from lungwatch.training.evaluation.maps import lung_share

MASK = np.zeros((1, 64, 64), np.float32)
MASK[:, 16:48, 8:28] = 1.0


def one_hot(row, column, side=8):
    found = np.zeros((1, side, side), np.float32)
    found[0, row, column] = 1.0
    return found


def test_a_map_within_the_lungs_has_its_point_and_its_sum_there():
    found = lung_share(one_hot(4, 2), MASK)
    assert found.hit[0] == 1.0
    assert found.share[0] > 0.9


def test_a_map_in_a_corner_has_neither():
    found = lung_share(one_hot(0, 7), MASK)
    assert (found.hit[0], found.share[0]) == (0.0, 0.0)


def test_an_even_map_has_the_share_of_the_area():
    found = lung_share(np.full((1, 4, 4), 0.7, np.float32), MASK)
    assert found.share[0] == pytest.approx(32 * 20 / 64**2, abs=1e-6)
    assert found.area[0] == pytest.approx(32 * 20 / 64**2)


def test_an_empty_map_is_neither_a_hit_nor_a_miss():
    found = lung_share(np.zeros((1, 4, 4), np.float32), MASK)
    assert np.isnan(found.share[0])
    assert np.isnan(found.hit[0])


def test_images_do_not_influence_each_other():
    maps = np.concatenate([one_hot(4, 2), one_hot(0, 7)])
    both = lung_share(maps, np.repeat(MASK, 2, axis=0))
    assert both.hit.tolist() == [1.0, 0.0]
