"""Two logits decide as one does, to the last case."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lungwatch.training.evaluation.metrics import sigmoid
from lungwatch.training.networks.heads import decide, join_logits, softmax, split_logit

SMALLEST = np.float32(1e-45)  # a subnormal of one bit: half of it is no float32
EXTREMES = np.array(
    [
        sign * x
        for x in (0.0, SMALLEST, 1e-38, 1e-20, 1e-7, 1, 88.8, 104, 3.4e38, np.inf)
        for sign in (1, -1)
    ],
    dtype=np.float32,
)


def test_the_decision_is_that_of_the_sign_for_extreme_and_subnormal_logits():
    assert (decide(split_logit(EXTREMES)) == (EXTREMES >= 0)).all()


@given(st.floats(width=32, allow_nan=False))
def test_the_decision_is_that_of_the_sign_for_every_float32(z):
    assert bool(decide(split_logit([z]))[0]) == (z >= 0)


@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_no_float32_loses_a_bit_on_the_way_there_and_back(z):
    assert join_logits(split_logit([z]))[0] == z


@given(st.floats(-1e30, 1e30))
def test_softmax_gives_the_sigmoids_probability(z):
    normal, covid = softmax(split_logit([z]))[0]
    assert covid == pytest.approx(float(sigmoid(z)[0]), rel=1e-15, abs=0)
    assert normal + covid == pytest.approx(1.0, abs=1e-15)


def test_argmax_of_the_probabilities_is_the_decision_until_rounding_makes_them_equal():
    z = np.concatenate([np.logspace(-14, 30, 200), -np.logspace(-14, 30, 200)])
    assert (softmax(split_logit(z)).argmax(axis=1) == (z >= 0)).all()
    equal = softmax(split_logit([-1e-20]))[0]
    assert equal[0] == equal[1]
    assert not decide(split_logit([-1e-20]))[0]


def test_tensorflows_two_logits_are_these():
    tf = pytest.importorskip("tensorflow", reason="needs TensorFlow (extra 'train')")
    from lungwatch.training.networks.heads import two_logits

    rng = np.random.default_rng(1)
    # TensorFlow may flush subnormal numbers to zero; networks have no use for them.
    z = np.concatenate([EXTREMES[np.abs(EXTREMES) > 1e-37], rng.normal(0, 20, 500)])
    z = np.append(z, 0.0).astype(np.float32)
    pairs = two_logits(tf.constant(z[:, np.newaxis])).numpy()
    assert (pairs == split_logit(z)).all()
    assert (decide(pairs) == (z >= 0)).all()
    finite = np.isfinite(z)
    assert tf.nn.softmax(pairs).numpy()[finite, 1] == pytest.approx(
        tf.sigmoid(z).numpy()[finite], abs=1e-6
    )
