"""Guided training rewards order within sources and evidence in lungs, and nothing else besides."""

import numpy as np
import pytest

from lungwatch.errors import ConfigError
from lungwatch.training.data.dataset import Sample
from lungwatch.training.networks.heads import FEATURES, attach_head, gradcam
from lungwatch.training.recipes.guided import (
    Objective,
    lungs_loss,
    lungs_on_map,
    make_guided_step,
    ranking_loss,
    source_numbers,
)

keras = pytest.importorskip("keras", reason="needs Keras (extra 'train')")
tf = pytest.importorskip("tensorflow", reason="needs TensorFlow (extra 'train')")


def test_ranking_does_not_see_what_a_source_has_in_common():
    """Adding any amount to all scores of one source changes nothing."""
    rng = np.random.default_rng(1)
    logits = rng.normal(size=12).astype(np.float32)
    grave = np.array([0, 1, 2] * 4, np.int32)
    source = np.repeat([0, 1], 6).astype(np.int32)
    moved = logits + np.where(source == 1, 7.0, -3.0).astype(np.float32)
    first, second = (float(ranking_loss(z, grave, source)) for z in (logits, moved))
    assert second == pytest.approx(first, rel=1e-5)


def test_ranking_rewards_the_right_order():
    """Graver findings scoring higher costs less; without pairs there is nothing to pay."""
    grave, source = np.array([0, 1, 2], np.int32), np.zeros(3, np.int32)
    right = float(ranking_loss(np.array([-2.0, 0.0, 2.0], np.float32), grave, source))
    wrong = float(ranking_loss(np.array([2.0, 0.0, -2.0], np.float32), grave, source))
    assert right < np.log(2) < wrong
    alone = np.arange(3, dtype=np.int32)
    assert float(ranking_loss(np.array([2.0, 0.0, -2.0], np.float32), grave, alone)) == 0.0


def test_evidence_outside_the_lungs_is_what_costs():
    """The loss is the share of either sign that lies outside, averaged over images."""
    cells = np.zeros((2, 4, 4), np.float32)
    cells[:, :, :2] = 1.0
    evidence = np.zeros((2, 4, 4), np.float32)
    evidence[0, :, 0] = 3.0
    evidence[1, :, 0], evidence[1, :, 3] = 1.0, -3.0
    assert float(lungs_loss(evidence, cells)) == pytest.approx((0.0 + 0.75) / 2, abs=1e-5)


def test_images_without_lungs_are_not_judged_by_them():
    """Where no lungs were found, nothing can lie outside them."""
    evidence = np.ones((1, 4, 4), np.float32)
    assert float(lungs_loss(evidence, np.zeros((1, 4, 4), np.float32))) == 0.0


def test_masks_keep_their_place_on_the_map():
    """A lung in the upper left quarter lands in the upper left cells."""
    lungs = np.zeros((1, 64, 64), np.float32)
    lungs[0, :28, :28] = 1.0
    cells = lungs_on_map(lungs, 4)
    assert cells.shape == (1, 4, 4)
    assert cells[0, 0, 0] == 1.0
    assert cells[0, 3, 3] == 0.0


def share_in_lungs(model, images) -> float:
    """How much of the maps of both classes lies in the left half."""
    maps = gradcam(model, images)
    return float(maps[..., :2].sum() / maps.sum())


def test_a_guided_step_learns_and_moves_the_evidence_into_the_lungs():
    """After some steps the classes are told apart by the half of the image that is lung."""
    keras.utils.set_random_seed(5)
    pixels = keras.Input((16, 16, 1))
    x = keras.layers.Conv2D(8, 3, strides=2, padding="same", activation="relu")(pixels)
    x = keras.layers.Conv2D(8, 3, strides=2, padding="same", activation="relu", name=FEATURES)(x)
    model = keras.Model(pixels, attach_head(x, dense_units=32, dropout=0.0))
    model.compile(optimizer=keras.optimizers.Adam(0.005))
    # Both halves show the class.
    rng = np.random.default_rng(6)
    targets = (np.arange(32) % 2).astype(np.float32)
    images = rng.uniform(0, 0.3, (32, 16, 16, 1)).astype(np.float32)
    images += 0.5 * targets[:, None, None, None]
    grave, source = (2 * targets).astype(np.int32), np.zeros(32, np.int32)
    lungs = np.zeros((32, 16, 16), np.float32)
    lungs[:, :, :8] = 1.0
    step = make_guided_step(model, Objective(ranking=0.5, lungs=2.0))
    batch = (images, targets, grave, source, lungs_on_map(lungs, 4))
    before = share_in_lungs(model, images)
    for _ in range(150):
        _, logits = step(*batch)
    assert ((np.asarray(logits) > 0) == (targets > 0.5)).all()
    assert share_in_lungs(model, images) > before + 0.1


def test_soft_targets_put_other_pneumonias_between(tmp_path):
    """The target is what the objective says; sources are numbered by name."""
    samples = [
        Sample(path=tmp_path / "a", finding=finding, source=source)
        for finding, source in (("COVID", "b"), ("NORMAL", "a"), ("OTHER_PNEUMONIA", "b"))
    ]
    assert Objective(other_target=0.35).targets(samples).tolist() == pytest.approx([1, 0, 0.35])
    assert source_numbers(samples).tolist() == [1, 0, 1]
    with pytest.raises(ConfigError, match="other pneumonias"):
        Objective(other_target=1.0)
