"""Probability, threshold and abstention as they are fixed on validation data."""

import numpy as np
import pytest

from lungwatch.training.evaluation.calibration import choose_decision, fit_calibration
from lungwatch.training.evaluation.metrics import figures, roc_curve, sigmoid


def sample(size=4000, seed=0):
    rng = np.random.default_rng(seed)
    true_logit = rng.normal(0, 2, size)
    return (rng.random(size) < sigmoid(true_logit)).astype(float), true_logit


def test_calibration_finds_the_scale_and_offset_that_an_overconfident_score_needs():
    y, z = sample()
    found = fit_calibration(y, 3.0 * z + 2.0)
    assert found.slope == pytest.approx(1 / 3, rel=0.1)
    assert found.intercept == pytest.approx(-2 / 3, abs=0.15)
    probabilities = sigmoid(found.slope * (3.0 * z + 2.0) + found.intercept)
    assert figures(y, probabilities, 0.5).ece < 0.03


def test_a_perfectly_separated_set_gives_finite_numbers():
    found = fit_calibration([0, 0, 1, 1], [-3.0, -1.0, 1.0, 3.0])
    assert 0 < found.slope < 100
    assert abs(found.intercept) < 100


def test_a_score_that_ranks_the_wrong_way_is_not_turned_round():
    y, z = sample(400)
    assert fit_calibration(y, -z).slope == 1.0


def test_the_threshold_maximises_youdens_index():
    y, z = sample(500)
    p = sigmoid(z)
    threshold = choose_decision(y, p).threshold
    fpr, tpr, _ = roc_curve(y, p)
    reached = np.mean(p[y > 0.5] >= threshold) - np.mean(p[y < 0.5] >= threshold)
    assert reached == pytest.approx((tpr - fpr).max())


@pytest.mark.parametrize("abstain", [0.02, 0.05, 0.2])
def test_the_stated_share_abstains_on_both_sides_of_the_threshold(abstain):
    y, z = sample(1000)
    p = sigmoid(z)
    found = choose_decision(y, p, abstain)
    labels = [found.label(value) for value in p]
    assert labels.count("UNCERTAIN") / len(p) == pytest.approx(abstain, abs=0.003)
    assert found.uncertain_low < found.threshold < found.uncertain_high


def test_abstention_can_be_switched_off():
    y, z = sample(300)
    found = choose_decision(y, sigmoid(z), 0.0)
    assert found.uncertain_low == found.threshold == found.uncertain_high


def test_certain_scores_still_give_a_threshold_that_a_contract_accepts():
    found = choose_decision([0, 0, 1, 1], [0.0, 0.0, 1.0, 1.0])
    assert 0 < found.threshold < 1
