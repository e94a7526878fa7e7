"""Margins and odd exposures are pointed out, plain X-rays are left alone."""

import cv2
import numpy as np
import pytest

from lungwatch.training.data.dataset import Sample
from lungwatch.training.data.scan import border_fraction, find_outliers, reduced, scan


@pytest.fixture
def plain():
    coarse = np.random.default_rng(1).uniform(0.2, 0.6, (20, 18)).astype(np.float32)
    return cv2.resize(coarse, (460, 500), interpolation=cv2.INTER_CUBIC)


def test_a_plain_image_has_no_border(plain):
    assert border_fraction(plain) == 0.0


def test_the_share_of_a_blank_margin_is_measured(plain):
    framed = cv2.copyMakeBorder(plain, 250, 250, 0, 460, cv2.BORDER_CONSTANT, value=0.0)
    assert border_fraction(framed) == pytest.approx(0.75, abs=0.01)


def test_a_reduced_image_keeps_its_shape(plain):
    assert reduced(np.zeros((2000, 1000), np.float32)).shape == (512, 256)
    assert reduced(plain).shape == plain.shape


def test_the_one_overexposed_image_is_the_outlier(tmp_path):
    rng = np.random.default_rng(0)
    samples = []
    for index in range(20):
        level = 220 if index == 7 else 100 + index
        grey = np.clip(rng.normal(level, 20 + index % 5, (80, 80)), 0, 255).astype(np.uint8)
        path = tmp_path / f"{index}.png"
        assert cv2.imwrite(str(path), grey)
        samples.append(Sample(path=path, finding="NORMAL"))
    looks, _ = scan(samples)
    found = find_outliers(looks)
    assert found[0].file.name == "7.png"
    assert abs(found[0].robust_z) > 3.5
