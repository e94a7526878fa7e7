"""Burnt-in text and missing detail are told from the pixels, and plain X-rays are left alone."""

from pathlib import Path

import cv2
import numpy as np
import pytest

from lungwatch.daemon.pipeline.decode import decode_file
from lungwatch.errors import Flag
from lungwatch.imaging.radiograph import ReadPolicy
from lungwatch.imaging.reader import read_radiograph
from lungwatch.preprocess import (
    BURNT_IN_LETTERS,
    PreprocessSpec,
    content_of,
    lacks_detail,
    letters_in_line,
    preprocess,
)

SPEC = PreprocessSpec(size_px=160)


@pytest.fixture(scope="module")
def chest(rg1):
    """The real chest radiograph, 700 px high, uint8."""
    pixels = read_radiograph(rg1).pixels
    columns = round(pixels.shape[1] * 700 / pixels.shape[0])
    small = cv2.resize(pixels, (columns, 700), interpolation=cv2.INTER_AREA)
    return (small * 255).astype(np.uint8)


def written(chest, text, place=(30, 40), scale=0.6, grey=255):
    return cv2.putText(chest.copy(), text, place, cv2.FONT_HERSHEY_SIMPLEX, scale, grey, 1)


def flags_of(tmp_path: Path, grey, spec=SPEC):
    path = tmp_path / "x.png"
    assert cv2.imwrite(str(path), grey)
    found = decode_file(path, policy=ReadPolicy(min_side_px=16), spec=spec, overlay_side_px=1024)
    return found.flags


class TestText:
    def test_the_real_x_ray_has_no_text(self, chest):
        assert letters_in_line(chest) < BURNT_IN_LETTERS

    @pytest.mark.parametrize("text", ["PORTABLE", "SUPINO", "Dr. Nobody 1970", "AP 12:30"])
    @pytest.mark.parametrize("place", [(30, 40), (250, 350), (400, 680)])
    def test_a_word_is_found_wherever_it_stands(self, chest, text, place):
        assert letters_in_line(written(chest // 2, text, place)) >= BURNT_IN_LETTERS

    def test_dark_letters_are_found_too(self, chest):
        light = 128 + chest // 2
        assert letters_in_line(light) < BURNT_IN_LETTERS
        assert letters_in_line(written(light, "Figure 1b", grey=0)) >= BURNT_IN_LETTERS

    @pytest.mark.parametrize("text", ["L", "R", "R AB", "PA"])
    def test_a_side_mark_with_initials_is_no_text(self, chest, text):
        assert letters_in_line(written(chest, text, scale=0.8)) < BURNT_IN_LETTERS

    @pytest.mark.parametrize("scale", [0.6, 0.8, 1.0])
    def test_the_flag_is_set_from_the_fourth_letter_on(self, chest, tmp_path, scale):
        dark = chest // 2
        assert Flag.TEXT_BURNT_IN in flags_of(tmp_path, written(dark, "PORT", scale=scale))
        assert Flag.TEXT_BURNT_IN not in flags_of(tmp_path, written(dark, "POR", scale=scale))

    def test_noise_and_nothing_are_no_text_and_take_no_time(self):
        noise = np.random.default_rng(0).integers(0, 256, (1024, 1024), dtype=np.uint8)
        assert letters_in_line(np.zeros((64, 64), np.uint8)) == 0
        assert letters_in_line(noise) >= 0

    def test_a_large_picture_is_looked_at_as_a_small_one(self, chest):
        double = cv2.resize(written(chest // 2, "PORTABLE"), None, fx=2.5, fy=2.5)
        assert letters_in_line(double) >= BURNT_IN_LETTERS


class TestDetail:
    def seen(self, grey, spec=SPEC):
        pixels = grey.astype(np.float32) / 255
        return content_of(preprocess(pixels, spec)[:, :, 0], pixels.shape, spec)

    @pytest.mark.parametrize("spec", [SPEC, PreprocessSpec(size_px=320, fit="pad")], ids=str)
    def test_the_real_x_ray_has_its_detail(self, chest, tmp_path, spec):
        assert not lacks_detail(self.seen(chest, spec), chest.shape)
        assert Flag.LOW_DETAIL not in flags_of(tmp_path, chest, spec)

    @pytest.mark.parametrize("side", [32, 64, 80])
    @pytest.mark.parametrize("how", [cv2.INTER_CUBIC, cv2.INTER_LINEAR])
    def test_one_enlarged_from_few_pixels_has_not(self, chest, tmp_path, side, how):
        small = cv2.resize(chest, (side, side), interpolation=cv2.INTER_AREA)
        large = cv2.resize(small, chest.shape[::-1], interpolation=how)
        assert lacks_detail(self.seen(large), large.shape)
        assert Flag.LOW_DETAIL in flags_of(tmp_path, large)

    def test_a_blurred_one_has_not(self, chest):
        blurred = cv2.GaussianBlur(chest, (0, 0), 8)
        assert lacks_detail(self.seen(blurred), blurred.shape)

    @pytest.mark.parametrize(("side", "is_flagged"), [(159, True), (160, False)])
    def test_one_smaller_than_the_input_has_not(self, chest, tmp_path, side, is_flagged):
        small = cv2.resize(chest, (200, side), interpolation=cv2.INTER_AREA)
        assert (Flag.LOW_DETAIL in flags_of(tmp_path, small)) is is_flagged
