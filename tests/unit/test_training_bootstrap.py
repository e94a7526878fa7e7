"""Intervals come from the same formulas as the figures, and cover what they should."""

import numpy as np
import pytest

from lungwatch.training.evaluation.metrics import (
    FIGURES,
    Bootstrap,
    area_interval,
    figures,
    interval,
    intervals,
    paired_differences,
    resample,
    roc_auc,
    sigmoid,
    too_few,
    uncomputable,
    weighted_areas,
    weighted_figures,
)


def scored(seed, size=300, *, ties=False, effect=1.5):
    rng = np.random.default_rng(seed)
    y = (rng.random(size) < 0.35).astype(float)
    p = sigmoid(rng.normal(size=size) + effect * y)
    return y, np.round(p, 1) if ties else p


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_every_case_drawn_once_gives_the_figures_themselves(seed, ties):
    y, p = scored(seed, ties=ties)
    found = weighted_figures(y, p, 0.4, np.ones((1, len(y))))
    expected = figures(y, p, 0.4)
    for name in FIGURES:
        assert found[name][0] == pytest.approx(getattr(expected, name), abs=1e-12), name


@pytest.mark.parametrize("ties", [False, True])
def test_weights_are_the_same_as_repeating_the_cases(ties):
    y, p = scored(5, 60, ties=ties)
    weights = np.random.default_rng(0).integers(0, 4, (6, len(y))).astype(float)
    found = weighted_figures(y, p, 0.5, weights)
    roc, pr = weighted_areas(y, p, weights)
    for row, times in enumerate(weights.astype(int)):
        again_y, again_p = np.repeat(y, times), np.repeat(p, times)
        expected = figures(again_y, again_p, 0.5)
        for name in FIGURES:
            assert found[name][row] == pytest.approx(getattr(expected, name), abs=1e-12), name
        assert roc[row] == pytest.approx(roc_auc(again_y, again_p))
        assert pr[row] == pytest.approx(figures(again_y, again_p, 0.5).pr_auc)


def test_resamples_keep_the_number_of_cases_of_either_class():
    y, _ = scored(2, 90)
    found = resample(
        y, lambda w: {"pos": w @ y, "all": w.sum(axis=1)}, Bootstrap(resamples=50, seed=3)
    )
    assert set(found["pos"]) == {y.sum()}
    assert set(found["all"]) == {90.0}


def test_the_same_seed_gives_the_same_intervals_and_another_one_others():
    y, p = scored(1)
    first, again, other = (
        intervals(y, p, 0.5, Bootstrap(resamples=200, seed=seed)) for seed in (4, 4, 5)
    )
    assert first == again
    assert first != other


def test_drawing_in_blocks_gives_every_resample(monkeypatch):
    y, p = scored(1, 50)
    monkeypatch.setattr("lungwatch.training.evaluation.metrics._BLOCK_CELLS", 350)
    found = resample(y, lambda w: weighted_figures(y, p, 0.5, w), Bootstrap(resamples=24, seed=1))
    assert {len(values) for values in found.values()} == {24}
    assert len(np.unique(found["brier"])) == 24


def test_intervals_cover_the_true_area_about_as_often_as_they_say():
    """Two normals 1.5 apart have an area of 0.8556."""
    hits = 0
    for seed in range(100):
        y, p = scored(seed, 200)
        low, high = area_interval(y, p, Bootstrap(resamples=200, seed=seed))
        hits += low <= 0.8556 <= high
    assert 86 <= hits <= 100


def test_paired_intervals_are_narrower_than_the_models_own_and_zero_against_itself():
    y, p = scored(8, 400)
    nearly = np.clip(p + np.random.default_rng(1).normal(0, 0.02, len(p)), 0, 1)
    bootstrap = Bootstrap(resamples=300, seed=1)
    low, high = paired_differences(y, [(p, 0.5), (nearly, 0.5)], bootstrap)["roc_auc"]
    own = intervals(y, p, 0.5, bootstrap)["roc_auc"]
    assert high - low < (own[1] - own[0]) / 3
    itself = paired_differences(y, [(p, 0.5), (p, 0.5)], bootstrap)
    assert all(pair == [0.0, 0.0] for pair in itself.values())


def test_one_class_leaves_out_exactly_the_figures_that_need_the_other():
    p = np.array([0.2, 0.7, 0.9])
    only_covid = weighted_figures(np.ones(3), p, 0.5, np.ones((1, 3)))
    only_others = weighted_figures(np.zeros(3), p, 0.5, np.ones((1, 3)))
    assert {n for n, v in only_covid.items() if np.isnan(v[0])} == set(uncomputable(3, 0))
    assert {n for n, v in only_others.items() if np.isnan(v[0])} == set(uncomputable(0, 3))
    assert only_covid["sensitivity"][0] == pytest.approx(2 / 3)
    assert only_others["specificity"][0] == pytest.approx(1 / 3)
    assert uncomputable(3, 0) == ["specificity", "f1", "roc_auc", "pr_auc"]
    assert uncomputable(0, 3) == ["sensitivity", "f1", "roc_auc", "pr_auc"]
    assert uncomputable(1, 1) == []
    assert interval(np.array([0.1, np.nan])) is None


def test_patients_are_drawn_with_all_their_images():
    rng = np.random.default_rng(8)
    patients = rng.permutation(np.repeat(np.arange(30), 3))
    y = (patients < 12).astype(float)
    seen = []
    resample(
        y,
        lambda w: seen.append(w) or {"n": w.sum(axis=1)},
        Bootstrap(resamples=40, seed=2),
        patients,
    )
    weights = np.concatenate(seen)
    for patient in range(30):
        own = weights[:, patients == patient]
        assert np.array_equal(own, np.repeat(own[:, :1], 3, axis=1))
    assert set(weights @ y) == {36.0}
    assert set(weights.sum(axis=1)) == {90.0}


def test_copies_of_images_widen_no_interval_and_narrow_none():
    y, p = scored(4, 80)
    alone = intervals(y, p, 0.5, Bootstrap(resamples=300, seed=1))
    many = [np.repeat(values, 5) for values in (y, p)]
    patients = np.repeat(np.arange(80), 5)
    assert intervals(*many, 0.5, Bootstrap(resamples=300, seed=1), patients) == alone
    taken_apart = intervals(*many, 0.5, Bootstrap(resamples=300, seed=1))
    assert np.ptp(taken_apart["roc_auc"]) < 0.7 * np.ptp(alone["roc_auc"])
    assert area_interval(many[0], many[1], Bootstrap(resamples=300, seed=1), patients) == (
        pytest.approx(alone["roc_auc"], abs=1e-6)
    )


def test_figures_of_few_patients_are_named():
    y = np.repeat([1.0, 0.0], [12, 30])
    assert too_few(y) == []
    assert too_few(y[3:]) == ["sensitivity", "f1", "roc_auc", "pr_auc"]
    # Twelve images of COVID, but of nine patients.
    patients = np.concatenate([np.arange(12) % 9, np.arange(100, 130)])
    assert too_few(y, patients) == ["sensitivity", "f1", "roc_auc", "pr_auc"]
    assert too_few(y[:5]) == list(FIGURES)
