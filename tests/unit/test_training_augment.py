"""Augmentation leaves an X-ray the same X-ray."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lungwatch.errors import ConfigError
from lungwatch.training.fitting.augmentation import NO_AUGMENTATION, Augmentation, affine, augment

WIDEST = Augmentation(width_shift=0.1, rotation_deg=15, zoom=0.2, contrast=0.3, brightness=0.2)


@given(st.floats(-13, 13), st.floats(-15, 15), st.floats(0.8, 1.2))
def test_no_admissible_change_mirrors(shift_px, rotation_deg, scale):
    matrix = affine(64, shift_px=shift_px, rotation_deg=rotation_deg, scale=scale)
    assert np.linalg.det(matrix[:, :2]) == pytest.approx(scale**2)


def test_a_marker_on_one_side_stays_on_that_side():
    image = np.zeros((64, 64, 1), np.float32)
    image[28:36, 12:18] = 1.0
    exposure_kept = Augmentation(width_shift=0.1, contrast=0.0, brightness=0.0)
    found = augment(np.stack([image] * 200), exposure_kept, np.random.default_rng(0))
    columns = np.arange(64)
    centres = (found[..., 0].sum(axis=1) * columns).sum(axis=1) / found.sum(axis=(1, 2, 3))
    assert centres.max() < 31
    assert np.ptp(centres) > 1


def test_values_shape_and_type_stay_and_the_input_is_untouched():
    batch = np.random.default_rng(1).random((8, 32, 32, 1), dtype=np.float32)
    before = batch.copy()
    found = augment(batch, WIDEST, np.random.default_rng(2))
    assert found.shape == batch.shape
    assert found.dtype == np.float32
    assert found.min() >= 0.0
    assert found.max() <= 1.0
    np.testing.assert_array_equal(batch, before)


def test_the_same_chance_gives_the_same_images():
    batch = np.random.default_rng(1).random((4, 32, 32, 1), dtype=np.float32)
    first, second = (augment(batch, WIDEST, np.random.default_rng(5)) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert not np.array_equal(first, augment(batch, WIDEST, np.random.default_rng(6)))


def test_no_augmentation_changes_nothing():
    batch = np.random.default_rng(1).random((4, 32, 32, 1), dtype=np.float32)
    found = augment(batch, NO_AUGMENTATION, np.random.default_rng(5))
    np.testing.assert_allclose(found, batch, atol=1e-6)


@pytest.mark.parametrize(
    "wrong", [{"rotation_deg": 16}, {"zoom": 0.21}, {"width_shift": -0.1}, {"contrast": 2}]
)
def test_more_than_the_admissible_change_is_refused_by_name(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Augmentation(**wrong)
