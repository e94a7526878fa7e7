"""Another frame shows the same lungs in the same place of the body, never mirrored."""

import numpy as np
import pytest

from lungwatch.errors import ConfigError
from lungwatch.training.fitting.augmentation import Framing, reframe

SIDE = 96


def chest() -> tuple[np.ndarray, np.ndarray]:
    """Two lungs that are as bright as they are lung, so that both can be compared."""
    y, x = np.mgrid[0:SIDE, 0:SIDE] / SIDE
    left = np.hypot((x - 0.3) / 0.12, (y - 0.5) / 0.25) < 1
    right = np.hypot((x - 0.7) / 0.1, (y - 0.45) / 0.2) < 1
    lungs = (left | right).astype(np.float32)
    return lungs[np.newaxis, :, :, np.newaxis].copy(), lungs[np.newaxis].copy()


def test_lungs_move_with_the_image():
    """Wherever the frame goes, what was lung in the image is lung in the mask."""
    batch, lungs = (np.repeat(a, 40, axis=0) for a in chest())
    images, masks = reframe(batch, lungs, Framing(), np.random.default_rng(1))
    assert np.abs(images[..., 0] - masks).mean() < 0.02
    assert np.abs(masks[0] - lungs[0]).mean() > 0.02


def test_a_lung_crop_fills_the_frame_with_lungs():
    """The box around the lungs becomes the frame, within the margin."""
    batch, lungs = chest()
    framing = Framing(lung_crop=1.0, rotation_deg=0.0)
    _, masks = reframe(batch, lungs, framing, np.random.default_rng(2))
    rows, columns = np.flatnonzero(masks[0].max(axis=1)), np.flatnonzero(masks[0].max(axis=0))
    assert rows[0] < 0.2 * SIDE
    assert rows[-1] > 0.8 * SIDE
    assert columns[0] < 0.2 * SIDE
    assert columns[-1] > 0.8 * SIDE


def test_without_lungs_there_is_no_crop():
    """An image whose lungs were not found is framed like any other."""
    batch, lungs = chest()
    still = Framing(lung_crop=1.0, rotation_deg=0.0, zoom=0.0, aspect=0.0, shift=0.0)
    images, masks = reframe(batch, np.zeros_like(lungs), still, np.random.default_rng(3))
    assert np.allclose(images, batch, atol=1e-5)
    assert not masks.any()


def test_no_frame_mirrors():
    """The wider lung stays on its side."""
    batch, lungs = (np.repeat(a, 60, axis=0) for a in chest())
    _, masks = reframe(batch, lungs, Framing(), np.random.default_rng(4))
    half = SIDE // 2
    assert (masks[:, :, :half].sum(axis=(1, 2)) > masks[:, :, half:].sum(axis=(1, 2))).all()


def test_the_same_seed_gives_the_same_frames():
    """Chance comes from the generator alone, and the arguments stay as they were."""
    batch, lungs = chest()
    before = batch.copy()
    first, second = (reframe(batch, lungs, Framing(), np.random.default_rng(5)) for _ in range(2))
    assert np.array_equal(first[0], second[0])
    assert np.array_equal(batch, before)


def test_limits_are_kept():
    """A frame turned further than X-rays are is refused."""
    with pytest.raises(ConfigError, match="rotation_deg"):
        Framing(rotation_deg=40.0)
