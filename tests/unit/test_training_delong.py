"""The test of DeLong is DeLong's, in its fast form."""

import numpy as np
import pytest

from lungwatch.training.evaluation.metrics import (
    Bootstrap,
    delong_covariance,
    delong_test,
    midranks,
    resample,
    roc_auc,
    weighted_areas,
)


def pair(seed, size=160, effects=(1.5, 1.0), shared=0.6):
    rng = np.random.default_rng(seed)
    y = (np.arange(size) % 2).astype(float)
    common = rng.normal(size=size) * shared
    return y, *(effect * y + common + rng.normal(size=size) for effect in effects)


def by_definition(y, scores):
    """The covariance of 1988: placements by comparing every pair of cases."""
    positive = y > 0.5
    v10, v01 = [], []
    for s in scores:
        a, b = s[positive][:, None], s[~positive][None, :]
        wins = (a > b) + 0.5 * (a == b)
        v10.append(wins.mean(axis=1))
        v01.append(wins.mean(axis=0))
    m, n = positive.sum(), (~positive).sum()
    return np.mean(v10, axis=1), np.cov(v10) / m + np.cov(v01) / n


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_the_fast_form_equals_the_definition_also_with_ties(seed, ties):
    y, a, b = pair(seed)
    if ties:
        a, b = np.round(a), np.round(b)
    areas, covariance = delong_covariance(y, np.stack([a, b]))
    expected_areas, expected = by_definition(y, [a, b])
    assert areas == pytest.approx(expected_areas, abs=1e-12)
    assert areas == pytest.approx([roc_auc(y, a), roc_auc(y, b)], abs=1e-12)
    assert covariance == pytest.approx(expected, abs=1e-12)


def test_a_small_case_worked_by_hand():
    """Positives 3 and 2, negatives 1 and 2: placements (1, 0.75) and (1, 0.75)."""
    areas, covariance = delong_covariance([1, 1, 0, 0], np.array([[3.0, 2.0, 1.0, 2.0]]))
    assert areas[0] == 0.875
    assert covariance[0, 0] == pytest.approx(2 * np.var([1.0, 0.75], ddof=1) / 2)


def test_its_standard_error_is_the_bootstraps():
    y, a, b = pair(11, size=300)
    found = delong_test(y, a, b)
    drawn = resample(
        y,
        lambda w: {"difference": weighted_areas(y, a, w)[0] - weighted_areas(y, b, w)[0]},
        Bootstrap(resamples=2000, seed=1),
    )["difference"]
    assert found.standard_error == pytest.approx(drawn.std(), rel=0.1)
    assert found.low == pytest.approx(np.percentile(drawn, 2.5), abs=0.01)
    assert found.high == pytest.approx(np.percentile(drawn, 97.5), abs=0.01)


def test_its_p_value_is_that_of_permuting_the_two_models_case_by_case():
    y, a, b = pair(3, size=200, effects=(1.4, 1.15))
    # Ranks make the two scores exchangeable where their areas are equal.
    a, b = midranks(a), midranks(b)
    found = delong_test(y, a, b)
    rng = np.random.default_rng(0)
    ones = np.ones((1, len(y)))
    differences = []
    for _ in range(1500):
        swap = rng.random(len(y)) < 0.5
        first, second = np.where(swap, b, a), np.where(swap, a, b)
        areas = [weighted_areas(y, s, ones)[0][0] for s in (first, second)]
        differences.append(areas[0] - areas[1])
    permuted = np.mean(np.abs(differences) >= abs(found.difference))
    assert found.p_value == pytest.approx(permuted, abs=0.05)


def test_models_of_equal_worth_seldom_differ():
    p_values = [delong_test(*pair(seed, effects=(1.2, 1.2))).p_value for seed in range(300)]
    assert 0.02 <= np.mean(np.array(p_values) < 0.05) <= 0.09


def test_a_model_against_itself_does_not_differ_and_swapping_turns_the_sign():
    y, a, b = pair(6)
    same = delong_test(y, a, a)
    assert (same.difference, same.p_value, same.z) == (0.0, 1.0, None)
    # A strictly rising function orders the cases alike.
    assert delong_test(y, a, np.exp(a)).p_value == 1.0
    there, back = delong_test(y, a, b), delong_test(y, b, a)
    assert there.difference == -back.difference
    assert there.p_value == pytest.approx(back.p_value)
    assert (there.low, there.high) == pytest.approx((-back.high, -back.low))


def test_a_single_case_of_a_class_is_refused():
    with pytest.raises(ValueError, match="two of either"):
        delong_test([1, 0, 0], [3, 2, 1], [1, 2, 3])
