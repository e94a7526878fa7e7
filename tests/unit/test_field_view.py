"""View of the lungs: equal in NumPy and in the graph, whatever the exposure."""

import numpy as np
import pytest

from lungwatch.training.fitting.augmentation import (
    OUTSIDE,
    LungField,
    batch_counts,
    draw_field_batch,
    draw_view,
    plain_view,
    ready_field,
    soft_lungs,
    view,
)

SIDE = 48


def lungs():
    """Two ellipses, bool (48, 48)."""
    y, x = np.mgrid[0:SIDE, 0:SIDE] / SIDE
    return (
        np.minimum(
            np.hypot((x - 0.25) / 0.2, (y - 0.5) / 0.45),
            np.hypot((x - 0.75) / 0.2, (y - 0.5) / 0.45),
        )
        < 1
    )


@pytest.fixture
def picture():
    """Grey values, float32 (48, 48), 0..1, and the mask of their lungs."""
    rng = np.random.default_rng(0)
    return rng.uniform(0.2, 0.8, (SIDE, SIDE)).astype(np.float32), lungs().astype(np.float32)


@pytest.fixture
def field(picture):
    pixels, mask = picture
    return LungField(pixels=(pixels * 255).astype(np.uint8), lungs=mask.astype(np.uint8))


def test_the_graph_shows_what_training_shows(picture):
    pytest.importorskip("tensorflow", reason="needs TensorFlow (extra 'train')")
    from lungwatch.training.fitting.augmentation import view_tensor

    pixels, mask = picture
    both = np.stack([pixels, pixels[::-1] ** 2]), np.stack([mask, mask[:, ::-1]])
    expected = np.stack([view(*one) for one in zip(*both, strict=True)])
    assert np.allclose(np.asarray(view_tensor(*both)), expected, atol=1e-5)


def test_lungs_are_standardised_and_the_rest_is_their_mean(picture):
    pixels, mask = picture
    shown, soft = view(pixels, mask), soft_lungs(mask)
    inside = soft > 0.999
    assert shown[inside].mean() == pytest.approx(OUTSIDE, abs=0.02)
    assert shown[inside].std() == pytest.approx(0.25, abs=0.02)
    assert np.all(shown[soft == 0] == np.float32(OUTSIDE))


def test_exposure_contrast_and_surround_do_not_reach_the_network(picture):
    pixels, mask = picture
    other = np.where(mask > 0, pixels * 0.4 + 0.1, pixels * 0.4 + 0.1)
    far = soft_lungs(mask) == 0
    other[far] = np.random.default_rng(1).uniform(0, 1, int(far.sum()))
    assert np.allclose(view(other.astype(np.float32), mask), view(pixels, mask), atol=1e-3)


def test_even_lungs_are_even():
    shown = view(np.full((SIDE, SIDE), 0.7, np.float32), lungs().astype(np.float32))
    assert np.allclose(shown, OUTSIDE, atol=1e-3)


def test_a_drawn_picture_depends_on_its_seed_alone(field):
    one, same, other = (draw_view(field, 64, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)
    assert one.shape == (64, 64)
    assert one.dtype == np.float32
    assert one.min() >= 0
    assert one.max() <= 1


def test_augmentation_never_leaves_a_field_without_lungs(field):
    rng = np.random.default_rng(3)
    for _ in range(100):
        assert (np.abs(draw_view(field, 32, rng) - OUTSIDE) > 0.01).mean() > 0.01


def test_a_plain_view_fills_the_square_with_the_box():
    """A field of 20 x 40 is stretched: what is at its edge is at the square's."""
    mask = np.ones((40, 20), np.uint8)
    pixels = np.tile(np.linspace(0, 200, 40).astype(np.uint8)[:, np.newaxis], (1, 20))
    shown = plain_view(LungField(pixels=pixels, lungs=mask), SIDE)
    middle = shown[:, SIDE // 2]
    assert middle[4] < 0.2
    assert middle[-5] > 0.8
    assert np.all(np.diff(middle[4:-4]) > 0)


def test_a_ready_field_has_no_dark_rim():
    """Black is mixed into the outermost pixels of the file; none of it is left, in or outside."""
    mask = lungs()
    pixels = np.where(mask, 120, 0).astype(np.uint8)
    edge = mask & ~np.roll(mask, 1, axis=0)
    pixels[edge] = 40
    field = ready_field(pixels)
    assert field.lungs.any()
    assert not field.lungs[~mask].any()
    assert np.all(field.pixels[field.lungs > 0] == 120)
    assert field.pixels.min() >= 110


def test_a_batch_has_as_many_of_each_source_and_finding(field):
    ready, pairs = [("r", 0), ("r", 1), ("r", 2)], [("a", 0), ("a", 2), ("b", 0), ("b", 2)]
    counts = batch_counts(ready, pairs, 32, 0.25)
    assert counts == {**dict.fromkeys(ready, 8), **dict.fromkeys(pairs, 2)}
    assert sum(batch_counts(ready, [], 32, 0.25).values()) == 32
    groups = {group: [field] for group in counts}
    pixels, targets = draw_field_batch(groups, counts, 32, np.random.default_rng(0))
    assert pixels.shape == (32, 32, 32, 1)
    assert targets.sum(axis=0).tolist() == [12, 8, 12]
