"""A map on a drawn opacity counts as such, beside chance and beside other patients' maps."""

import cv2
import numpy as np
import pytest

from lungwatch.errors import DatasetError
from lungwatch.preprocess import PreprocessSpec
from lungwatch.training.data.pixels import LesionImage, read_lesions
from lungwatch.training.evaluation.maps import (
    compare_maps,
    correlations,
    lesion_share,
    mean_likeness,
    similarity,
    summarise_lesions,
)
from lungwatch.training.evaluation.metrics import Bootstrap

SPEC = PreprocessSpec(size_px=32)
PADDED = PreprocessSpec(size_px=32, fit="pad")
LUNG = np.zeros((64, 64), bool)
LUNG[:, 16:48] = True


def image(rows, columns, *, shape=(64, 64), lung=LUNG):
    opacity = np.zeros((64, 64), bool)
    opacity[rows, columns] = True
    pixels = np.zeros((32, 32, 1), np.float32)
    return LesionImage(name="x", pixels=pixels, shape=shape, opacity=opacity, lung=lung)


def one_hot(row, column, side=8):
    found = np.zeros((side, side), np.float32)
    found[row, column] = 1.0
    return found


UPPER, LOWER = image(slice(0, 32), slice(16, 32)), image(slice(32, 64), slice(32, 48))
AT_UPPER, AT_LOWER = one_hot(2, 3), one_hot(5, 4)


def test_maps_on_their_own_opacities_hit_and_those_of_the_other_patient_miss():
    found = lesion_share(np.stack([AT_UPPER, AT_LOWER]), [UPPER, LOWER], SPEC)
    assert found.peak.tolist() == [1, 1]
    assert found.other_peak.tolist() == [0, 0]
    assert (found.share > 0.85).all()
    assert (found.other_share < 0.1).all()
    assert found.random_point.tolist() == [0.25, 0.25]
    assert found.random_pixel.tolist() == [0.125, 0.125]


def test_only_the_lungs_share_of_an_opacity_counts_for_a_random_point_of_them():
    beyond = image(slice(0, 32), slice(0, 32))
    found = lesion_share(AT_UPPER[None], [beyond], SPEC)
    assert found.random_point[0] == 0.25
    assert found.random_pixel[0] == 0.25
    assert np.isnan(found.other_peak[0])
    without = image(slice(0, 32), slice(0, 32), lung=None)
    assert np.isnan(lesion_share(AT_UPPER[None], [without], SPEC).random_point[0])


def test_the_padding_of_a_map_is_cut_off_before_it_is_laid_on_the_image():
    """An image twice as wide as high lies in the middle rows of a padded input."""
    wide = image(slice(0, 20), slice(0, 64), shape=(64, 128))
    top_of_image = one_hot(2, 4)
    assert lesion_share(top_of_image[None], [wide], PADDED).peak[0] == 1
    assert lesion_share(one_hot(5, 4)[None], [wide], PADDED).peak[0] == 0


def test_an_empty_map_is_left_out_and_counted():
    maps = np.stack([AT_UPPER, np.zeros((8, 8), np.float32), AT_UPPER])
    found = summarise_lesions(
        lesion_share(maps, [UPPER, UPPER, LOWER], SPEC), Bootstrap(resamples=50)
    )
    assert (found["images"], found["without_map"]) == (3, 1)
    assert found["peak_on_lesion"] == 0.5
    assert found["likeness_of_maps"] == pytest.approx(1.0)
    low, high = found["intervals"]["peak_on_lesion"]
    assert 0 <= low <= 0.5 <= high <= 1


def test_likeness_is_the_mean_over_pairs_of_different_images():
    maps = np.random.default_rng(0).random((5, 4, 4)).astype(np.float32)
    expected = np.corrcoef(maps.reshape(5, -1))
    assert correlations(maps) == pytest.approx(expected, abs=1e-6)
    upper = expected[np.triu_indices(5, 1)]
    assert mean_likeness(expected)[0] == pytest.approx(upper.mean())
    # Drawn twice, an image is no pair with itself.
    weights = np.array([[2.0, 1, 0, 0, 0]])
    assert mean_likeness(expected, weights)[0] == pytest.approx(expected[0, 1])
    assert np.isnan(mean_likeness(expected, np.array([[5.0, 0, 0, 0, 0]])))[0]


def test_a_map_is_alike_to_itself_and_not_to_another():
    assert similarity(AT_UPPER, AT_UPPER) == pytest.approx(1.0)
    assert similarity(AT_UPPER, AT_LOWER) < 0.9
    same = compare_maps(AT_UPPER[None], [AT_UPPER[None]], Bootstrap(resamples=10))
    assert same["correlation"] == pytest.approx(1.0)
    nothing = compare_maps(AT_UPPER[None], [np.zeros((1, 8, 8), np.float32)], Bootstrap())
    assert (nothing["images"], nothing["correlation"]) == (0, None)


def write(path, values):
    path.parent.mkdir(exist_ok=True, parents=True)
    assert cv2.imwrite(str(path), values)


def test_masks_are_read_with_the_frame_cut_off_and_images_without_opacity_counted(tmp_path):
    rng = np.random.default_rng(2)
    picture = np.clip(rng.normal(130, 30, (100, 120)), 60, 250).astype(np.uint8)
    framed = np.zeros((100, 220), np.uint8)
    framed[:, 50:170] = picture
    drawn = np.zeros((100, 220), np.uint8)
    drawn[:50, 50:170] = 255
    write(tmp_path / "images" / "a.png", framed)
    write(tmp_path / "opacity" / "a.png", drawn)
    write(tmp_path / "images" / "b.png", framed)
    write(tmp_path / "opacity" / "b.png", drawn * 0)
    write(tmp_path / "images" / "c.png", framed)
    (found,), without = read_lesions(tmp_path, SPEC)
    assert (found.name, without, found.lung) == ("a", 2, None)
    # The black frame at both sides is no part of the radiograph, nor of its mask.
    assert found.shape == (100, 120)
    assert found.opacity.shape == (100, 120)
    assert found.opacity[:49].all()
    assert not found.opacity[51:].any()


def test_a_folder_without_drawn_opacities_is_refused(tmp_path):
    with pytest.raises(DatasetError, match="no drawn opacities"):
        read_lesions(tmp_path, SPEC)
