"""Everybody generates the same synthetic chest picture, on every machine and version."""

import hashlib

import numpy as np

from lungwatch.preprocess import PreprocessSpec, golden_digest, golden_input, golden_pixels

# Every shipped model's contract names this digest: a change makes all of them unusable.
DIGEST = "661a2046edc6c825417cccc0e23b4962db10869d7d14dc1732b4038ddf34423a"


def test_the_picture_never_changes() -> None:
    assert golden_digest() == DIGEST
    assert hashlib.sha256(golden_pixels().tobytes()).hexdigest() == DIGEST


def test_it_is_a_radiograph_of_multiples_of_1_255_with_dark_air_and_dark_lungs() -> None:
    pixels = golden_pixels()
    assert (pixels.shape, pixels.dtype) == ((512, 512), np.float32)
    levels = pixels * 255
    assert np.abs(levels - np.rint(levels)).max() < 1e-4
    assert pixels.min() == 0.0
    assert pixels.max() <= 1.0
    assert pixels[0, 0] == 0.0
    lung, spine = pixels[200:280, 140:190].mean(), pixels[200:280, 250:262].mean()
    assert lung < spine - 0.2


def test_a_model_sees_it_through_its_own_preprocessing() -> None:
    spec = PreprocessSpec(size_px=96)
    assert golden_input(spec).shape == (96, 96, 1)
    assert (golden_input(spec) == golden_input(spec)).all()
