"""Figures of merit are the field's, not our own."""

import numpy as np
import pytest

from lungwatch.training.evaluation.metrics import (
    figures,
    log_loss,
    roc_auc,
    sigmoid,
)

sk = pytest.importorskip("sklearn.metrics", reason="needs scikit-learn (extra 'train')")


def scored(seed, *, ties=False, size=300):
    rng = np.random.default_rng(seed)
    y = (rng.random(size) < 0.35).astype(float)
    p = sigmoid(rng.normal(size=size) + 1.5 * y)
    return y, np.round(p, 1) if ties else p


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_areas_agree_with_scikit_learn_also_with_ties(seed, ties):
    y, p = scored(seed, ties=ties)
    assert roc_auc(y, p) == pytest.approx(sk.roc_auc_score(y, p), abs=1e-12)
    assert figures(y, p, 0.4).pr_auc == pytest.approx(sk.average_precision_score(y, p), abs=1e-12)


def test_figures_at_the_threshold_agree_with_scikit_learn():
    y, p = scored(7)
    found = figures(y, p, 0.4)
    said = p >= 0.4
    tn, fp, fn, tp = sk.confusion_matrix(y, said).ravel()
    assert (found.tn, found.fp, found.fn, found.tp) == (tn, fp, fn, tp)
    assert found.accuracy == pytest.approx(sk.accuracy_score(y, said))
    assert found.sensitivity == pytest.approx(sk.recall_score(y, said))
    assert found.specificity == pytest.approx(sk.recall_score(y, said, pos_label=0))
    assert found.f1 == pytest.approx(sk.f1_score(y, said))
    assert found.brier == pytest.approx(sk.brier_score_loss(y, p))
    assert (found.positives, found.negatives) == (y.sum(), (1 - y).sum())


def test_log_loss_of_logits_agrees_and_survives_extreme_ones():
    y, p = scored(3)
    z = np.log(p) - np.log1p(-p)
    assert log_loss(y, z) == pytest.approx(sk.log_loss(y, p))
    assert log_loss([1.0, 0.0], [-1000.0, 1000.0]) == pytest.approx(1000.0)


def test_calibration_error_is_zero_when_frequencies_are_as_stated_and_counts_the_gap():
    assert figures([0, 1, 1, 1], [0.75] * 4, 0.5).ece == pytest.approx(0.0)
    assert figures([0, 0, 1, 1], [0.9] * 4, 0.5).ece == pytest.approx(0.4)
    assert figures([1, 0], [1.0, 0.0], 0.5).ece == pytest.approx(0.0)
