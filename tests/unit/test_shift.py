"""The shift from one model's answers to another's."""

import numpy as np
import pytest

from lungwatch.comparison import Flip, measure_shift

LABELS_A = ["COVID", "COVID", "NEGATIVE", "NEGATIVE", "UNCERTAIN"]
LABELS_B = ["COVID", "NEGATIVE", "NEGATIVE", "NEGATIVE", "NEGATIVE"]
SCORES_A = [0.9, 0.8, 0.1, 0.2, 0.45]
SCORES_B = [0.7, 0.3, 0.05, 0.1, 0.2]


def shift(**other):
    return measure_shift(
        **{
            "labels_a": LABELS_A,
            "labels_b": LABELS_B,
            "probabilities_a": SCORES_A,
            "probabilities_b": SCORES_B,
            "thresholds_a": [0.5] * 5,
        }
        | other
    )


def test_agreement_kappa_and_flips():
    found = shift()
    assert (found.images, found.agreement) == (5, 0.6)
    assert found.flipped == pytest.approx(0.4)
    # Chance: 2/5 x 1/5 COVID + 2/5 x 4/5 NEGATIVE + 1/5 x 0 UNCERTAIN = 0.4.
    assert found.kappa == pytest.approx((0.6 - 0.4) / 0.6)
    assert set(found.flips) == {
        Flip(before="COVID", after="NEGATIVE", images=1),
        Flip(before="UNCERTAIN", after="NEGATIVE", images=1),
    }


def test_the_shift_of_the_score():
    found = shift()
    difference = np.subtract(SCORES_B, SCORES_A)
    assert found.mean == pytest.approx(difference.mean())
    assert found.quantiles["0.5"] == pytest.approx(np.median(difference))
    assert list(found.quantiles) == ["0.05", "0.25", "0.5", "0.75", "0.95"]


def test_the_threshold_that_keeps_the_positive_rate():
    found = shift()
    assert found.positive_rate == 0.4
    assert found.threshold_same_rate == 0.3
    assert shift(thresholds_a=[0.95] * 5).threshold_same_rate is None


def test_the_threshold_that_keeps_the_sensitivity():
    found = shift(covid=[True, False, False, True, True])
    assert found.covid_cases == 3
    assert found.sensitivity == pytest.approx(1 / 3)
    assert found.threshold_same_sensitivity == 0.7
    assert shift().sensitivity is None
    assert shift(covid=[False] * 5).sensitivity is None


def test_one_label_alone_has_no_kappa():
    assert shift(labels_a=["COVID"] * 5, labels_b=["COVID"] * 5).kappa is None
