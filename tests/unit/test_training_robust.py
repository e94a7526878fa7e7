"""Groups that do badly come to count for more; features unlearn sources; grey levels move."""

import numpy as np
import pytest

from lungwatch.errors import ConfigError
from lungwatch.training.data.dataset import Sample
from lungwatch.training.fitting.augmentation import exchange_histograms, read_histograms
from lungwatch.training.fitting.trainer import load_variables, save_variables
from lungwatch.training.recipes.guided import Guidance, RobustLoss, risk_groups

keras = pytest.importorskip("keras", reason="needs Keras (extra 'train')")
tf = pytest.importorskip("tensorflow", reason="needs TensorFlow (extra 'train')")


def samples_of(tmp_path, *parts) -> list[Sample]:
    return [
        Sample(path=tmp_path / str(index), finding=finding, source=source)
        for source, finding, count in parts
        for index in range(count)
    ]


def test_small_groups_count_with_the_largest_of_their_finding(tmp_path):
    """A handful of images has no weight of its own, unless there are no others."""
    groups = risk_groups(
        samples_of(
            tmp_path, ("a", "COVID", 25), ("b", "COVID", 40), ("c", "COVID", 2), ("a", "NORMAL", 3)
        )
    )
    assert groups.names == ("a/NORMAL", "a/COVID", "b/COVID")
    assert groups.table.tolist() == [[0, -1, -1], [-1, -1, -1], [1, 2, 2]]


def test_the_worst_group_gains_weight_and_an_absent_one_keeps_its_share(tmp_path):
    """Weights follow the losses, sum to one, and the loss is theirs."""
    groups = risk_groups(
        samples_of(tmp_path, ("a", "COVID", 20), ("b", "COVID", 20), ("c", "COVID", 20))
    )
    robust = RobustLoss(groups, 0.5)
    grave, source = tf.constant([2, 2, 2, 2]), tf.constant([0, 0, 1, 1])
    losses, targets = tf.constant([2.0, 2.0, 0.1, 0.1]), tf.ones(4)
    found = [float(robust(losses, targets, grave, source)) for _ in range(10)]
    bad, good, absent = robust.notes().values()
    assert bad + good + absent == pytest.approx(1.0, abs=1e-5)
    assert bad > 0.9 > 0.1 > good
    assert absent / good == pytest.approx(np.exp(-0.5 * 0.1 * 10), rel=0.01)
    assert found == sorted(found)


def test_what_nobody_could_learn_moves_no_weight(tmp_path):
    """The entropy of a soft target is no failure of its group's."""
    groups = risk_groups(samples_of(tmp_path, ("a", "COVID", 20), ("a", "OTHER_PNEUMONIA", 20)))
    robust = RobustLoss(groups, 1.0)
    targets = tf.constant([1.0, 0.3])
    logits = tf.constant([20.0, float(np.log(0.3 / 0.7))])
    losses = tf.nn.sigmoid_cross_entropy_with_logits(targets, logits)
    robust(losses, targets, tf.constant([2, 1]), tf.constant([0, 0]))
    assert list(robust.notes().values()) == pytest.approx([0.5, 0.5], abs=1e-4)


def test_the_adversary_unlearns_the_source_and_not_the_finding():
    """Trained against it, pooled features tell sources apart worse, and findings as well."""
    from lungwatch.training.networks.heads import FEATURES, attach_head
    from lungwatch.training.recipes.guided import (
        Adversary,
        Objective,
        lungs_on_map,
        make_guided_step,
    )

    rng = np.random.default_rng(3)
    source = (np.arange(64) % 2).astype(np.int32)
    # Findings go with sources, three in four.
    targets = ((np.arange(64) // 2 % 4 != 0) == source).astype(np.float32)
    images = rng.uniform(0, 0.2, (64, 8, 8, 1)).astype(np.float32)
    images[:, :, :4] += 0.6 * source[:, None, None, None]
    images[:, :, 4:] += 0.6 * targets[:, None, None, None]
    grave = (2 * targets).astype(np.int32)
    there = np.array([[True, True], [False, False], [True, True]])
    cells = lungs_on_map(np.ones((64, 8, 8), np.float32), 8)

    def spread(weight: float) -> tuple[float, float]:
        keras.utils.set_random_seed(4)
        pixels = keras.Input((8, 8, 1))
        x = keras.layers.Conv2D(6, 3, padding="same", activation="relu", name=FEATURES)(pixels)
        model = keras.Model(pixels, attach_head(x, dense_units=16, dropout=0.0))
        model.compile(optimizer=keras.optimizers.Adam(0.01))
        adversary = Adversary(6, there, weight=weight, steps=200, seed=4)
        step = make_guided_step(model, Objective(), adversary=adversary)
        for _ in range(200):
            step(images, targets, grave, source, cells)
        pooled = keras.Model(model.input, model.get_layer(FEATURES).output)(images)
        pooled = np.asarray(pooled).mean(axis=(1, 2))
        gap = np.abs(pooled[source == 1].mean(0) - pooled[source == 0].mean(0)).max()
        logits = np.asarray(model(images))[:, 0]
        return float(gap / pooled.std()), float(np.mean((logits > 0) == (targets > 0.5)))

    plain, _ = spread(0.0)
    against, accuracy = spread(3.0)
    assert against < plain
    assert accuracy == 1.0


def test_histograms_come_from_other_sources_and_places_stay():
    """Dark images get bright levels and the reverse; which pixel is darker than which stays."""
    rng = np.random.default_rng(5)
    batch = rng.random((6, 16, 16, 1)).astype(np.float32) * 0.3
    batch[3:] += 0.7
    known = read_histograms(batch, np.array([0, 0, 0, 1, 1, 1], np.int32))
    indices = np.arange(6)
    shown = exchange_histograms(batch, indices, known, 1.0, np.random.default_rng(6))
    assert (shown[:3].mean(axis=(1, 2, 3)) > 0.35).all()
    assert (shown[3:].mean(axis=(1, 2, 3)) < 0.65).all()
    for before, after in zip(batch, shown, strict=True):
        assert (np.diff(after.ravel()[np.argsort(before, axis=None)]) >= -1e-6).all()
    same = exchange_histograms(batch, indices, known, 0.0, np.random.default_rng(6))
    assert np.array_equal(same, batch)
    alone = read_histograms(batch, np.zeros(6, np.int32))
    with pytest.raises(ConfigError, match="two sources"):
        exchange_histograms(batch, indices, alone, 1.0, rng)


def test_a_checkpoint_of_another_task_is_refused(tmp_path):
    """What was learnt besides comes back, or training says that it cannot go on."""
    save_variables([tf.Variable([1.0, 2.0])], tmp_path / "memory.npz")
    variable = tf.Variable([0.0, 0.0])
    load_variables([variable], tmp_path / "memory.npz")
    assert variable.numpy().tolist() == [1.0, 2.0]
    for variables, name in (([variable, variable], "memory.npz"), ([variable], "none.npz")):
        with pytest.raises(ConfigError, match="train anew"):
            load_variables(variables, tmp_path / name)


@pytest.mark.parametrize(
    "wrong", [{"group_robust": -1}, {"domain_adversarial": -1}, {"exchange_histograms": 2}]
)
def test_amounts_without_meaning_are_refused(wrong):
    """A negative weight would reward what it shall punish."""
    with pytest.raises(ConfigError, match="must"):
        Guidance(**wrong)
