"""Scores of the content gate and the rule that chooses its thresholds."""

import numpy as np
import pytest

from lungwatch.errors import ModelError, Reason
from lungwatch.preprocess import PreprocessSpec, preprocess
from lungwatch.training.evaluation.gate_rates import (
    LEAST_DISTANCE,
    Familiarity,
    GateOutput,
    GateThresholds,
    check_losses,
    choose_thresholds,
    exposures,
    first_failures,
    turned_copies,
)

RNG = np.random.default_rng(0)
THRESHOLDS = GateThresholds(
    frontal=0.7, upright=0.8, polarity=0.6, distance=5.0, lung_area=(0.1, 0.6)
)


def look(count: int = 400, *, chance: float = 0.99, spread: float = 1.0, area: int = 100):
    """Alike answers on many pictures, with `area` of 400 cells as lung."""
    lungs = np.zeros((count, 20, 20), np.float32)
    lungs.reshape(count, -1)[:, :area] = 0.9
    return GateOutput(
        chances=np.full((count, 3), chance, np.float32),
        embedding=(spread * RNG.standard_normal((count, 40))).astype(np.float32),
        lungs=lungs,
    )


def test_training_images_have_the_mean_distance_one_and_others_a_larger_one():
    train = look().embedding
    familiarity = Familiarity.of(train)
    assert familiarity.axes.shape == (40, 40)
    assert familiarity.distances(train).mean() == pytest.approx(1.0, abs=1e-3)
    # Ten standard deviations along every axis.
    far = familiarity.mean + 10 * train.std(axis=0)
    assert familiarity.distances(far[np.newaxis])[0] == pytest.approx(100, rel=0.2)


def test_few_or_equal_images_make_no_endless_distances():
    few = Familiarity.of(look(3).embedding)
    assert few.axes.shape == (40, 2)
    equal = Familiarity.of(np.ones((8, 40), np.float32))
    assert np.isfinite(equal.distances(np.full((1, 40), 2, np.float32))).all()


@pytest.mark.parametrize(
    ("chance", "threshold"),
    [(0.99, 0.8), (0.75, 0.75), (0.2, 0.5)],
    ids=["no higher than 0.8", "their quantile", "no lower than 0.5"],
)
def test_a_chance_has_the_quantile_of_chest_xrays_as_its_threshold(chance, threshold):
    train = look()
    found = choose_thresholds(train, look(chance=chance), [], Familiarity.of(train.embedding))
    assert (found.frontal, found.upright, found.polarity) == (threshold,) * 3
    assert found.lung_area == (0.25, 0.26)


def test_the_worst_exposure_counts():
    train = look()
    found = choose_thresholds(
        train, look(), [look(chance=0.6), look()], Familiarity.of(train.embedding)
    )
    assert found.frontal == pytest.approx(0.6)


def test_the_distance_is_a_quarter_beyond_nearly_all_validation_images_and_at_least_five():
    train = look()
    familiarity = Familiarity.of(train.embedding)
    assert choose_thresholds(train, look(), [], familiarity).distance == LEAST_DISTANCE
    wide = look(spread=3.0)
    expected = 1.25 * np.quantile(familiarity.distances(wide.embedding), 0.995)
    assert expected > LEAST_DISTANCE
    found = choose_thresholds(train, wide, [], familiarity)
    assert found.distance == pytest.approx(expected, abs=0.01)


def test_scores_are_half_at_the_limits_and_fall_beyond():
    train = look()
    familiarity = Familiarity.of(train.embedding)
    direction = familiarity.axes[:, 0] / (familiarity.axes[:, 0] @ familiarity.axes[:, 0])
    for times, expected in ((1.0, 0.5), (2.0, 1 / 17), (0.5, 16 / 17)):
        there = familiarity.mean + direction * np.sqrt(THRESHOLDS.distance * times)
        # 20 of 400 cells are the least area of 5 %.
        one = GateOutput(
            chances=np.ones((1, 3), np.float32),
            embedding=there[np.newaxis].astype(np.float32),
            lungs=look(1, area=20).lungs,
        )
        scores = THRESHOLDS.scores(one, familiarity)[0]
        assert scores[3] == pytest.approx(0.5)
        assert scores[4] == pytest.approx(expected, abs=1e-3)


def test_the_first_check_that_fails_gives_the_reason():
    checks = THRESHOLDS.checks()
    assert [check.name for check in checks] == [
        "frontal",
        "upright",
        "polarity",
        "lungs",
        "familiar",
    ]
    assert [check.reason for check in checks] == [
        Reason.NOT_FRONTAL_CHEST,
        Reason.ROTATED,
        Reason.INVERTED,
        Reason.NO_LUNGS,
        Reason.NOT_FRONTAL_CHEST,
    ]
    scores = np.array(
        [
            [0.9, 0.1, 0.1, 0.9, 0.1],  # turned, inverted and far: turned is what helps
            [0.9, 0.9, 0.9, 0.9, 0.1],
            [0.7, 0.8, 0.6, 0.5, 0.5],  # equal to the thresholds: passes
            [0.6, 0.1, 0.9, 0.9, 0.9],
        ],
        np.float32,
    )
    assert first_failures(scores, checks) == {"upright": 1, "familiar": 1, "frontal": 1}


def test_a_gate_that_loses_chest_xrays_is_refused_by_check():
    checks = THRESHOLDS.checks()
    scores = np.full((100, 5), 0.9, np.float32)
    scores[:2, 0] = 0.1
    check_losses(scores, checks)
    scores[2, 1] = 0.1
    with pytest.raises(ModelError, match=r"3 of 100 validation images \(frontal 2, upright 1\)"):
        check_losses(scores, checks)


def test_copies_of_preprocessed_images_are_those_of_turned_and_inverted_ones():
    spec = PreprocessSpec(size_px=32)
    picture = RNG.random((96, 64)).astype(np.float32)
    copies = turned_copies(preprocess(picture, spec)[np.newaxis])
    assert list(copies) == ["turned by 90°", "turned by 180°", "turned by 270°", "inverted"]
    for quarter in (1, 2, 3):
        turned = preprocess(np.rot90(picture, quarter).copy(), spec)
        np.testing.assert_allclose(copies[f"turned by {90 * quarter}°"][0], turned, atol=1e-5)
    np.testing.assert_allclose(copies["inverted"][0], preprocess(1 - picture, spec), atol=1e-5)


def test_exposures_keep_black_and_white_and_move_the_middle():
    pixels = np.array([0.0, 0.5, 1.0], np.float32).reshape(1, 3, 1, 1)
    brighter, darker = exposures(pixels)
    assert brighter[0, [0, 2], 0, 0].tolist() == darker[0, [0, 2], 0, 0].tolist() == [0.0, 1.0]
    assert darker[0, 1, 0, 0] < 0.5 < brighter[0, 1, 0, 0]
