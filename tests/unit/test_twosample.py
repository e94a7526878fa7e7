"""The two-sample tests against published values, and what they do at their edges."""

import math
from fractions import Fraction

import numpy as np
import pytest

from lungwatch.comparison import (
    LEAST_VALUES,
    OTHER_CATEGORIES,
    Distribution,
    _fisher,
    _kolmogorov_tail,
    alarms,
    compare_tags,
    compare_values,
)


@pytest.mark.parametrize(
    ("x", "p"), [(1.2238, 0.10), (1.3581, 0.05), (1.6276, 0.01), (1.9495, 0.001), (0.1, 1.0)]
)
def test_the_kolmogorov_distribution_is_that_of_the_tables(x, p):
    assert _kolmogorov_tail(x) == pytest.approx(p, rel=2e-3)


def test_fisher_is_twice_the_smaller_tail():
    """The lady tasting tea (Fisher 1935): 3 of 4 right, and all 4."""
    logs = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, 9)))])
    assert _fisher(3, 4, 1, 4, logs) == pytest.approx(2 * 17 / 70)
    assert _fisher(4, 4, 0, 4, logs) == pytest.approx(2 / 70)
    assert _fisher(2, 4, 2, 4, logs) == 1.0


def exact_p(n, m, distance):
    """Share of the orders of n and m values whose distribution functions differ so far.

    By counting lattice paths (Hodges 1958), in whole numbers.
    """
    ways = [0] * (m + 1)
    for i in range(n + 1):
        for j in range(m + 1):
            before = (ways[j] if i else 0) + (ways[j - 1] if j else 0)
            is_near = abs(i * m - j * n) < round(distance * n * m)
            ways[j] = (before if i or j else 1) if is_near else 0
    return float(1 - Fraction(ways[m], math.comb(n + m, n)))


def test_the_exact_p_is_that_of_a_case_small_enough_to_count():
    """Two and two: of six orders, two keep the samples apart."""
    assert exact_p(2, 2, 1.0) == pytest.approx(2 / 6)


@pytest.mark.parametrize("n", [20, 30, 60, 100])
@pytest.mark.parametrize("m", [20, 100, 142, 300])
def test_p_is_never_below_the_exact_one_where_alarms_are_decided(n, m):
    step = math.gcd(n, m) / (n * m)
    for bound in (1e-3, 3e-5):
        distance = step
        while (p := _kolmogorov_tail(math.sqrt(n * m / (n + m)) * distance)) > bound:
            distance += step
        assert exact_p(n, m, distance) <= p


def test_the_statistic_is_the_largest_distance_of_the_distribution_functions():
    reference = Distribution.of([float(value) for value in range(100)])
    window = Distribution.of([float(value) for value in range(25, 125)])
    found = compare_values(window, reference)
    assert found is not None
    assert found.statistic == pytest.approx(0.25)
    assert exact_p(100, 100, 0.25) <= found.p <= 2 * exact_p(100, 100, 0.25)
    assert (found.reference_count, found.window_count) == (100, 100)
    assert found.told == "median 49.5 -> 74.5"


def test_quantiles_of_a_reference_answer_as_all_of_its_values_do():
    rng = np.random.default_rng(2)
    whole = Distribution.of(list(rng.normal(size=20_000)))
    window = Distribution.of(list(rng.normal(0.4, 1, 100)))
    all_of_it, reduced = (compare_values(window, one) for one in (whole, whole.reduced()))
    assert all_of_it is not None
    assert reduced is not None
    assert len(whole.reduced().values) == 500
    assert reduced.statistic == pytest.approx(all_of_it.statistic, abs=0.003)
    assert reduced.reference_count == 20_000


def test_too_few_are_not_tested():
    few, many = Distribution.of([1.0] * (LEAST_VALUES - 1)), Distribution.of([1.0] * LEAST_VALUES)
    assert compare_values(few, many) is None
    assert compare_values(many, few) is None
    assert compare_values(many, many).p == 1.0
    assert compare_tags({"a": LEAST_VALUES - 1}, {"a": 100}) is None
    assert compare_tags({"a": LEAST_VALUES}, {"a": 100}).p == 1.0


def test_a_value_that_the_reference_never_had_is_found_and_named():
    found = compare_tags({"PA": 90, "LL": 10}, {"PA": 300})
    assert found.told == "LL 0% -> 10%"
    assert found.statistic == pytest.approx(0.1)
    assert found.p < 1e-4
    missing = compare_tags({"": 100}, {"PA": 300})
    assert missing.told in ("(none) 0% -> 100%", "PA 100% -> 0%")


def test_many_rare_values_are_counted_together():
    window = {f"model {i}": 1 for i in range(100)}
    found = compare_tags(window, {"known": 300})
    assert found.told in (
        f"{OTHER_CATEGORIES} 0% -> 81%",
        "known 100% -> 0%",
        f"{OTHER_CATEGORIES} 0% -> 82%",
    )
    assert found.p < 1e-10


def test_holm_steps_down():
    """Holm's own case: each against the rate over what is left, until one passes."""
    assert alarms([0.01, 0.04, 0.03, 0.005], 0.05) == [True, False, False, True]
    assert alarms([0.02, 0.2], 0.05) == [True, False]
    assert alarms([0.03, 0.03], 0.05) == [False, False]
    assert alarms([], 0.05) == []
