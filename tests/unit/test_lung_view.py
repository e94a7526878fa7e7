"""A network that sees the lungs' box alone sees all of it, and explains the whole image."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

keras = pytest.importorskip("keras", reason="needs Keras (extra 'train')")
pytest.importorskip("tensorflow", reason="needs TensorFlow (extra 'train')")

from lungwatch.contract import CAM  # noqa: E402
from lungwatch.export.graph import build_graph  # noqa: E402 - of the extra
from lungwatch.training.networks.heads import (  # noqa: E402
    BOX,
    FEATURES,
    VIEW,
    attach_head,
    crop,
    gradcam,
    lay_back,
    view_lungs,
)
from lungwatch.training.networks.lungs import agreement, boxes_around, build_finder, fit_finder  # noqa: E402

SIDE = 64


def box(left, top, right, bottom):
    return np.array([[left, top, right, bottom]], dtype=np.float32)


@pytest.fixture(scope="module")
def pixels():
    return np.random.default_rng(0).uniform(0, 1, (1, SIDE, SIDE, 1)).astype(np.float32)


def test_a_box_of_whole_pixels_is_cut_out_as_it_is(pixels):
    shown = np.asarray(crop(pixels, box(0.25, 0.5, 0.75, 1.0), SIDE // 2))
    assert np.allclose(shown[0], pixels[0, 32:, 16:48], atol=1e-4)


def test_the_whole_image_at_half_the_size_is_the_mean_of_four(pixels):
    shown = np.asarray(crop(pixels, box(0, 0, 1, 1), SIDE // 2))
    means = pixels.reshape(SIDE // 2, 2, SIDE // 2, 2).mean(axis=(1, 3))
    assert np.allclose(shown[0, ..., 0], means, atol=1e-4)


edge = st.floats(0, 0.69)
length = st.floats(0.3, 1)


@settings(deadline=None, max_examples=50)
@given(left=edge, top=edge, width=length, height=length)
def test_nothing_is_added_and_nothing_lost_on_the_way_and_back(left, top, width, height):
    """Of any box: an even image stays even, and a map keeps its sum, all of it in the box."""
    where = box(left, top, min(left + width, 1), min(top + height, 1))
    even = np.full((1, SIDE, SIDE, 1), 0.7, dtype=np.float32)
    assert np.allclose(np.asarray(crop(even, where, 32)), 0.7, atol=1e-3)
    cells = np.random.default_rng(1).uniform(0, 1, (1, 8, 8)).astype(np.float32)
    laid = np.asarray(lay_back(cells, where))[0]
    share = (where[0, 2] - where[0, 0]) * (where[0, 3] - where[0, 1])
    assert laid.shape == (16, 16)
    assert np.isclose(laid.mean(), cells.mean() * share, rtol=1e-2)
    outside = np.ones((16, 16), dtype=bool)
    low, high = np.floor(where[0, :2] * 16 + 1e-4), np.ceil(where[0, 2:] * 16 - 1e-4)
    outside[int(low[1]) : int(high[1]), int(low[0]) : int(high[0])] = False
    assert np.allclose(laid[outside], 0, atol=1e-3)


def network():
    """A network of random weights that sees half of an image, by a finder of random weights."""
    keras.utils.set_random_seed(3)
    given_ = keras.Input((SIDE, SIDE, 1), name="pixels")
    x = view_lungs(given_, build_finder(SIDE), SIDE // 2)
    for _ in range(2):
        x = keras.layers.Conv2D(6, 3, strides=2, padding="same", activation="relu")(x)
    x = keras.layers.Activation("linear", name=FEATURES)(x)
    return keras.Model(given_, attach_head(x, dense_units=5, dropout=0.0))


def test_its_maps_are_those_of_automatic_differentiation_laid_into_the_box(tmp_path):
    model = network()
    model.save(tmp_path / "model.keras")
    model = keras.models.load_model(tmp_path / "model.keras")  # safe mode: no code in it
    pixels = np.random.default_rng(4).uniform(0, 1, (5, SIDE, SIDE, 1)).astype(np.float32)
    graph, _ = build_graph(model)
    maps = np.asarray(graph(pixels)[CAM])
    assert maps.shape == (5, 2, 16, 16)
    assert np.allclose(maps, gradcam(model, pixels), atol=1e-4)
    boxes = np.asarray(keras.Model(model.input, model.get_layer(BOX).output)(pixels))
    assert maps.max() == pytest.approx(1)
    for image, (left, top, right, bottom) in enumerate(boxes):
        rows = np.flatnonzero(maps[image].any(axis=(0, 2)))
        columns = np.flatnonzero(maps[image].any(axis=(0, 1)))
        assert top * 16 - 1 < rows[0] <= rows[-1] < bottom * 16
        assert left * 16 - 1 < columns[0] <= columns[-1] < right * 16


def test_what_lies_outside_the_box_changes_nothing_but_the_box():
    """With the box held, no pixel outside of it reaches the network."""
    model = network()
    shown = keras.Model(model.input, [model.get_layer(BOX).output, model.get_layer(VIEW).output])
    pixels = np.random.default_rng(5).uniform(0, 1, (1, SIDE, SIDE, 1)).astype(np.float32)
    where, seen = (np.asarray(one) for one in shown(pixels))
    altered = pixels.copy()
    low, high = np.floor(where[0, :2] * SIDE), np.ceil(where[0, 2:] * SIDE)
    outside = np.ones((SIDE, SIDE), dtype=bool)
    outside[int(low[1]) : int(high[1]), int(low[0]) : int(high[0])] = False
    assert outside.any()
    altered[0, outside] = 0
    assert np.array_equal(np.asarray(crop(altered, where, SIDE // 2)), seen)


def lungs(count, seed):
    """Bright images with two dark ellipses, and what of them is lung."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:SIDE, 0:SIDE] / SIDE
    masks = np.zeros((count, SIDE, SIDE), dtype=np.float32)
    for mask in masks:
        x, y = rng.uniform(0.4, 0.6, 2)
        height, apart = rng.uniform(0.2, 0.34), rng.uniform(0.14, 0.2)
        for side in (-1, 1):
            inside = ((columns - x - side * apart) / 0.11) ** 2 + ((rows - y) / height) ** 2 < 1
            mask[inside] = 1
    noise = rng.normal(0, 0.05, masks.shape)
    return (0.8 - 0.5 * masks + noise).clip(0, 1)[..., np.newaxis].astype(np.float32), masks


def test_the_finder_learns_where_lungs_are():
    """Its boxes fit better than the best that does not look."""
    known, boxes = boxes_around(lungs(20, 9)[1])
    assert known.all()
    finder = fit_finder(*lungs(96, 7), epochs=25, batch_size=8)
    found = np.asarray(finder(lungs(20, 9)[0], training=False))
    middle = np.tile(np.median(boxes, axis=0), (20, 1))
    assert agreement(found, boxes).mean() > agreement(middle, boxes).mean() + 0.05


def test_the_same_seed_trains_the_same_finder():
    one, other = (fit_finder(*lungs(32, 7), epochs=2).get_weights() for _ in range(2))
    assert all(np.allclose(a, b, atol=1e-5) for a, b in zip(one, other, strict=True))


def test_images_without_lungs_are_no_lesson():
    from lungwatch.errors import DatasetError

    with pytest.raises(DatasetError, match="no lungs"):
        fit_finder(lungs(4, 1)[0], np.zeros((4, SIDE, SIDE), np.float32), epochs=1)
