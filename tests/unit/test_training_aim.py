"""A threshold reaches its aim on the cases that choose it, and no more than it must."""

import numpy as np
import pytest

from lungwatch.errors import ConfigError
from lungwatch.training.evaluation.calibration import Aim, choose_decision, choose_threshold
from lungwatch.training.evaluation.metrics import figures, sigmoid


def scored(seed, size=240, *, ties=False):
    rng = np.random.default_rng(seed)
    y = (rng.random(size) < 0.4).astype(float)
    z = rng.normal(size=size) + 1.6 * y
    return y, np.round(z, 1) if ties else z


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("least", [0.5, 0.8, 0.95, 1.0])
@pytest.mark.parametrize("kind", ["sensitivity", "specificity"])
def test_the_aim_is_reached_with_the_other_figure_as_large_as_it_can_be(kind, least, seed, ties):
    y, z = scored(seed, ties=ties)
    p = sigmoid(z)
    decision = choose_threshold(y, z, Aim(kind=kind, least=least))
    found = figures(y, p, decision.threshold)
    assert getattr(found, kind) >= least
    other = "specificity" if kind == "sensitivity" else "sensitivity"
    everywhere = [figures(y, p, t) for t in [*np.unique(p), p.max() + 1e-6]]
    best = max(getattr(f, other) for f in everywhere if getattr(f, kind) >= least)
    assert getattr(found, other) == pytest.approx(best)


def test_youden_is_the_threshold_that_training_fixes():
    y, z = scored(3)
    expected = choose_decision(y, sigmoid(z), abstain=0.0)
    assert choose_threshold(y, z, Aim(kind="youden")) == expected


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_balanced_makes_the_smaller_of_both_as_large_as_it_can_be(seed, ties):
    y, z = scored(seed, ties=ties)
    p = sigmoid(z)

    def smaller(threshold: float) -> float:
        found = figures(y, p, threshold)
        return min(found.sensitivity, found.specificity)

    chosen = choose_threshold(y, z, Aim(kind="balanced")).threshold
    assert smaller(chosen) == pytest.approx(max(map(smaller, np.unique(p))))


def test_abstention_is_off_since_its_band_belonged_to_the_old_threshold():
    y, z = scored(3)
    for text in ("youden", "balanced", "sensitivity=0.9"):
        decision = choose_threshold(y, z, Aim.parse(text))
        assert decision.uncertain_low == decision.threshold == decision.uncertain_high


def test_huge_logits_leave_a_threshold_between_0_and_1():
    y, z = np.array([0.0, 0.0, 1.0, 1.0]), np.array([-900.0, 800.0, 700.0, 900.0])
    for kind in ("sensitivity", "specificity"):
        assert 0 < choose_threshold(y, z, Aim(kind=kind, least=1.0)).threshold < 1


@pytest.mark.parametrize("text", ["youden", "balanced", "sensitivity=0.95", "specificity=1"])
def test_an_aim_is_read_and_written_alike(text):
    assert str(Aim.parse(text)) == text


@pytest.mark.parametrize(
    "text", ["", "f1", "sensitivity", "sensitivity=0", "specificity=95", "x=1"]
)
def test_what_is_no_aim_is_refused_with_what_may_be_written(text):
    with pytest.raises(ConfigError, match=r"youden, sensitivity=0\.95"):
        Aim.parse(text)
