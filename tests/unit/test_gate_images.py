"""Training pictures of the content gate carry the labels of what was done to them."""

import cv2
import numpy as np
import pytest

from lungwatch.preprocess import PreprocessSpec
from lungwatch.training.data.gate_images import DRAWINGS, GateXray, draw_batch, no_chest

SPEC = PreprocessSpec(size_px=64)
CELLS = 16


def xray(*, drawn: bool = True) -> GateXray:
    """A grey body with two dark lungs and bright shoulders, which tell the top."""
    y, x = np.mgrid[0:120, 0:100] / (120, 100)[0]
    lungs = np.zeros((120, 100), np.uint8)
    for middle in (0.25, 0.58):
        lungs[np.hypot((x - middle) / 0.13, (y - 0.5) / 0.3) < 1] = 255
    pixels = np.where(lungs > 0, 40, 150).astype(np.uint8)
    pixels[:24] = 235
    return GateXray(pixels=pixels, lungs=lungs if drawn else None)


@pytest.fixture(scope="module")
def batch():
    return draw_batch([xray()], 400, SPEC, CELLS, np.random.default_rng(1))


def upright(batch, index: int) -> np.ndarray:
    """The picture, with what its labels say undone."""
    picture = np.rot90(batch.pixels[index, :, :, 0], -int(batch.turn[index].argmax()))
    return 1 - picture if batch.inverted[index, 0] else picture


def test_pixels_and_labels_have_the_stated_shapes_and_ranges(batch):
    assert batch.pixels.shape == (400, 64, 64, 1)
    assert batch.lungs.shape == (400, CELLS, CELLS, 1)
    for values in (batch.pixels, batch.lungs):
        assert values.dtype == np.float32
        assert values.min() >= 0
        assert values.max() <= 1
    assert (batch.turn.sum(axis=1) == 1).all()


@pytest.mark.parametrize("quarters", [0, 1, 2, 3])
def test_a_turned_picture_turned_back_has_its_shoulders_at_the_top(batch, quarters):
    chosen = np.flatnonzero((batch.is_chest == 1) & (batch.turn[:, quarters] == 1))
    assert len(chosen) > 15
    pictures = [upright(batch, index) for index in chosen]
    right = [picture[4:12].mean() > picture[-12:-4].mean() for picture in pictures]
    # Black borders and marks hide the shoulders of a few.
    assert np.mean(right) > 0.8


def test_an_inverted_picture_inverted_back_has_dark_lungs_where_the_field_says(batch):
    right = []
    for index in np.flatnonzero(batch.is_chest):
        small = cv2.resize(batch.pixels[index, :, :, 0], (CELLS, CELLS))
        small = 1 - small if batch.inverted[index, 0] else small
        lungs = batch.lungs[index, :, :, 0] > 0.9
        right.append(small[lungs].mean() < small[batch.lungs[index, :, :, 0] < 0.1].mean())
    assert np.mean(right) > 0.95
    assert 0.1 < batch.inverted[batch.is_chest == 1].mean() < 0.35


def test_a_third_of_the_pictures_shows_no_chest_and_has_no_lungs(batch):
    others = batch.is_chest == 0
    assert 0.2 < others.mean() < 0.4
    assert (batch.frontal[:, 0] == batch.is_chest).all()
    assert batch.lungs[others].max() == 0
    assert (batch.has_lungs == 1).all()


def test_lungs_that_nobody_drew_are_unknown():
    batch = draw_batch([xray(drawn=False)], 40, SPEC, CELLS, np.random.default_rng(2))
    assert (batch.has_lungs == 1 - batch.is_chest).all()


def test_the_same_seed_draws_the_same_pictures():
    one, other = (
        draw_batch([xray()], 20, SPEC, CELLS, np.random.default_rng([3, 1])) for _ in range(2)
    )
    assert (one.pixels == other.pixels).all()
    assert (one.lungs == other.lungs).all()


@pytest.mark.parametrize("draw", dict.fromkeys(DRAWINGS))
def test_drawings_are_pictures(draw):
    for seed in range(12):
        picture = draw(np.random.default_rng(seed))
        assert picture.dtype == np.float32
        assert picture.ndim == 2
        assert min(picture.shape) >= 160
        assert 0 <= picture.min() < picture.max() <= 1
        assert (picture == draw(np.random.default_rng(seed))).all()


def test_pictures_without_a_chest_are_made_of_any_xray():
    for seed in range(60):
        picture = no_chest([xray()], np.random.default_rng(seed))
        assert picture.dtype == np.float32
        assert min(picture.shape) >= 64
        assert np.isfinite(picture).all()
