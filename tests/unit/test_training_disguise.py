"""A disguise changes where an image seems to come from, and leaves its lungs to be seen."""

import numpy as np
import pytest

from lungwatch.errors import ConfigError
from lungwatch.training.fitting.augmentation import DomainRandomisation, randomise_domain

SIDE = 64
NOTHING = DomainRandomisation(exposure=0.0, marks=0.0, surroundings=0.0)


def batch_and_lungs(count: int = 16) -> tuple[np.ndarray, np.ndarray]:
    """Images of one grey level each, with a square of lung in the middle."""
    levels = np.linspace(0.2, 0.8, count, dtype=np.float32)
    batch = np.broadcast_to(levels[:, None, None, None], (count, SIDE, SIDE, 1)).copy()
    lungs = np.zeros((count, SIDE, SIDE), np.float32)
    lungs[:, 16:48, 16:48] = 1.0
    return batch, lungs


def test_no_disguise_is_none():
    """With every probability at 0 the images come back as they were."""
    batch, lungs = batch_and_lungs()
    assert np.array_equal(randomise_domain(batch, lungs, NOTHING, np.random.default_rng(1)), batch)


def test_surroundings_come_from_elsewhere_and_lungs_stay():
    """The centre of the lungs keeps its grey level, the corners mostly do not."""
    batch, lungs = batch_and_lungs()
    amount = DomainRandomisation(exposure=0.0, marks=0.0, surroundings=1.0)
    found = randomise_domain(batch, lungs, amount, np.random.default_rng(2))
    assert np.allclose(found[:, 28:36, 28:36], batch[:, 28:36, 28:36], atol=0.01)
    assert (np.abs(found[:, 0, 0, 0] - batch[:, 0, 0, 0]) > 0.01).mean() > 0.5


def test_images_without_found_lungs_keep_their_surroundings():
    """Nothing is exchanged where it is not known what must stay."""
    batch, lungs = batch_and_lungs()
    amount = DomainRandomisation(exposure=0.0, marks=0.0, surroundings=1.0)
    found = randomise_domain(batch, np.zeros_like(lungs), amount, np.random.default_rng(3))
    assert np.array_equal(found, batch)


@pytest.mark.parametrize("part", ["exposure", "tone", "texture", "marks"])
def test_each_disguise_changes_images_on_its_own(part):
    """Every kind does something, within 0..1, and leaves its argument alone."""
    rng = np.random.default_rng(4)
    batch = rng.uniform(0.0, 1.0, (32, SIDE, SIDE, 1)).astype(np.float32)
    before = batch.copy()
    amount = DomainRandomisation(**{"exposure": 0.0, "marks": 0.0, "surroundings": 0.0, part: 1.0})
    found = randomise_domain(batch, None, amount, rng)
    assert (np.abs(found - batch).max(axis=(1, 2, 3)) > 0.05).mean() > 0.3
    assert found.shape == batch.shape
    assert found.dtype == np.float32
    assert found.min() >= 0.0
    assert found.max() <= 1.0
    assert np.array_equal(batch, before)


def test_the_same_seed_gives_the_same_disguise():
    """Chance comes from the generator alone."""
    batch, lungs = batch_and_lungs()
    first, second = (
        randomise_domain(batch, lungs, DomainRandomisation(), np.random.default_rng(5))
        for _ in range(2)
    )
    assert np.array_equal(first, second)


def test_a_probability_is_one():
    """Values outside 0..1 are refused by name."""
    with pytest.raises(ConfigError, match="marks"):
        DomainRandomisation(marks=1.5)
