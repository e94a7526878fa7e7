"""A quantised graph is held against the float one, and one that lost too much is refused."""

import numpy as np
import pytest

from lungwatch.contract import Calibration, Decision
from lungwatch.errors import ModelError
from lungwatch.export.quantise import GraphAnswers, check_loss, check_size, compare_graphs
from lungwatch.preprocess import PreprocessSpec
from lungwatch.training.evaluation.scorers import Judgement

TRUTH = np.array([0, 0, 1, 1], np.float32)
JUDGEMENT = Judgement(
    name="toy",
    preprocess=PreprocessSpec(size_px=32),
    calibration=Calibration(),
    decision=Decision(threshold=0.5, uncertain_low=0.4, uncertain_high=0.6),
)


def answers(logits, maps=None):
    if maps is None:
        maps = np.random.default_rng(0).random((len(logits), 2, 3, 3))
    return GraphAnswers(
        logits=np.asarray(logits, np.float32),
        maps=np.asarray(maps, np.float32),
        judgement=JUDGEMENT,
    )


def test_the_same_answers_lose_nothing():
    same = answers([-2, -1, 1, 2])
    found = compare_graphs(TRUTH, same, same)
    assert (found.loss, found.probability_largest, found.decisions_changed) == (0, 0, 0)
    assert found.map_cosine == pytest.approx(1)
    assert found.map_correlation == pytest.approx(1)


def test_loss_differences_and_changed_labels_are_counted():
    found = compare_graphs(TRUTH, answers([-2, -1, 1, 2]), answers([-2, 1.5, 0, 2]))
    assert found.loss == pytest.approx(0.25)
    # NEGATIVE became COVID, COVID became UNCERTAIN.
    assert found.decisions_changed == 2
    largest = 1 / (1 + np.exp(-1.5)) - 1 / (1 + np.exp(1.0))
    assert found.probability_largest == pytest.approx(largest)
    assert found.to_dict()["loss"] == 0.25


def test_a_map_that_went_flat_is_no_likeness_and_two_flat_maps_are_no_evidence():
    maps = np.random.default_rng(1).random((4, 2, 3, 3))
    lost = maps.copy()
    lost[0] = 0
    found = compare_graphs(TRUTH, answers([-2, -1, 1, 2], maps), answers([-2, -1, 1, 2], lost))
    assert found.map_cosine == pytest.approx(0.75)
    flat = answers([-2, -1, 1, 2], np.zeros((4, 2, 3, 3)))
    assert compare_graphs(TRUTH, flat, flat).map_cosine is None


def test_a_loss_at_the_limit_or_without_a_value_is_refused_with_the_figures():
    bad = compare_graphs(TRUTH, answers([-2, -1, 1, 2]), answers([-2, 1.5, 0, 2]))
    with pytest.raises(ModelError, match=r"0\.2500 ROC-AUC on validation.*1\.0000 to 0\.7500"):
        check_loss({"some/val": bad}, "some/val")
    good = compare_graphs(TRUTH, answers([-2, -1, 1, 2]), answers([-3, -1, 1, 2]))
    check_loss({"some/val": good, "some/test": bad}, "some/val")
    assert good.loss == 0


@pytest.mark.parametrize(("size", "refused"), [(20_000_000, False), (20_000_001, True)])
def test_a_file_above_the_largest_size_is_refused(size, refused):
    if refused:
        with pytest.raises(ModelError, match="more than 20"):
            check_size(size, 20)
    else:
        assert check_size(size, 20) is None
