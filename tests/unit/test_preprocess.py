"""The network's input: its shape and range, and what must not reach it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lungwatch.errors import ModelError
from lungwatch.imaging.radiograph import FloatImage
from lungwatch.preprocess import PreprocessSpec, content_box, preprocess


def _picture(shape: tuple[int, int]) -> FloatImage:
    rows, columns = np.indices(shape)
    waves = np.sin(rows / 17.0) * np.cos(columns / 23.0) * 0.3
    return (0.5 + waves + 0.1 * rows / shape[0]).astype(np.float32)


class TestPreprocess:
    @pytest.mark.parametrize("shape", [(64, 64), (299, 299), (1955, 1841), (64, 900), (1, 1)])
    @pytest.mark.parametrize("fit", ["stretch", "pad"])
    @pytest.mark.parametrize("intensity", ["as_is", "percentile"])
    def test_is_a_square_of_float32_within_0_and_1(
        self, shape: tuple[int, int], fit: str, intensity: str
    ) -> None:
        spec = PreprocessSpec(size_px=128, fit=fit, intensity=intensity)  # type: ignore[arg-type]
        tensor = preprocess(_picture(shape), spec)
        assert tensor.shape == (128, 128, 1)
        assert tensor.dtype == np.float32
        assert tensor.flags.c_contiguous
        assert 0.0 <= tensor.min() <= tensor.max() <= 1.0

    def test_leaves_the_radiograph_as_it_was(self) -> None:
        pixels = _picture((300, 200))
        before = pixels.copy()
        preprocess(pixels, PreprocessSpec(size_px=64))
        assert (pixels == before).all()

    @pytest.mark.parametrize(("gain", "offset"), [(0.5, 0.0), (0.3, 0.4), (0.9, 0.05)])
    def test_percentiles_keep_the_exporters_contrast_from_the_network(
        self, gain: float, offset: float
    ) -> None:
        spec = PreprocessSpec(size_px=128, intensity="percentile")
        pixels = _picture((500, 400))
        other = (pixels * gain + offset).astype(np.float32)
        assert np.abs(preprocess(pixels, spec) - preprocess(other, spec)).max() < 1e-5

    def test_as_is_keeps_grey_values(self) -> None:
        flat = np.full((300, 300), 0.25, dtype=np.float32)
        assert preprocess(flat, PreprocessSpec(size_px=64, intensity="as_is")) == pytest.approx(
            0.25
        )

    def test_a_flat_picture_does_not_divide_by_zero(self) -> None:
        tensor = preprocess(np.full((99, 99), 0.7, np.float32), PreprocessSpec(size_px=64))
        assert tensor == pytest.approx(0.7)

    def test_shrinking_averages_areas(self) -> None:
        checkerboard = (np.indices((1280, 1280)).sum(axis=0) % 2).astype(np.float32)
        spec = PreprocessSpec(size_px=128, intensity="as_is")
        assert preprocess(checkerboard, spec) == pytest.approx(0.5, abs=1e-6)

    def test_nothing_is_mirrored_or_turned(self) -> None:
        pixels = np.zeros((300, 200), dtype=np.float32)
        pixels[:150, :100] = 1.0
        tensor = preprocess(pixels, PreprocessSpec(size_px=64, intensity="as_is"))[:, :, 0]
        assert tensor[:31, :31] == pytest.approx(1.0, abs=1e-6)
        assert tensor[33:].max() == 0.0
        assert tensor[:, 33:].max() == 0.0


class TestContentBox:
    def test_stretching_fills_the_square(self) -> None:
        assert content_box((300, 100), PreprocessSpec(size_px=128)) == (0, 0, 128, 128)

    @pytest.mark.parametrize(
        ("shape", "box"),
        [
            ((300, 300), (0, 0, 128, 128)),
            ((300, 150), (0, 32, 128, 64)),
            ((150, 300), (32, 0, 64, 128)),
            ((3000, 3), (0, 63, 128, 1)),
        ],
    )
    def test_padding_centres_the_image(
        self, shape: tuple[int, int], box: tuple[int, int, int, int]
    ) -> None:
        assert content_box(shape, PreprocessSpec(size_px=128, fit="pad")) == box

    @pytest.mark.parametrize("shape", [(300, 100), (100, 300), (777, 500)])
    def test_the_box_holds_the_image_and_black_surrounds_it(self, shape: tuple[int, int]) -> None:
        spec = PreprocessSpec(size_px=96, fit="pad", intensity="as_is")
        tensor = preprocess(np.ones(shape, dtype=np.float32), spec)[:, :, 0]
        top, left, height, width = content_box(shape, spec)
        assert tensor[top : top + height, left : left + width] == pytest.approx(1.0, abs=1e-6)
        assert np.count_nonzero(tensor) == height * width

    @settings(database=None, derandomize=True, deadline=None)
    @given(
        rows=st.integers(1, 20_000), columns=st.integers(1, 20_000), size_px=st.integers(16, 1024)
    )
    def test_the_box_lies_within_the_input_whatever_the_shape(
        self, rows: int, columns: int, size_px: int
    ) -> None:
        spec = PreprocessSpec(size_px=size_px, fit="pad")
        top, left, height, width = content_box((rows, columns), spec)
        assert top >= 0
        assert left >= 0
        assert height >= 1
        assert width >= 1
        assert top + height <= size_px
        assert left + width <= size_px
        assert max(height, width) == size_px


class TestSpec:
    def test_survives_the_way_through_json(self) -> None:
        spec = PreprocessSpec(size_px=160, fit="pad", intensity="as_is", low_percentile=2.0)
        assert PreprocessSpec.from_dict(spec.to_dict()) == spec

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"size_px": 128, "clahe": True}, "clahe"),
            ({"fit": "pad"}, "incomplete"),
            ({"size_px": 8}, "size_px"),
            ({"size_px": 128, "fit": "crop"}, "fit"),
            ({"size_px": 128, "intensity": "zscore"}, "intensity"),
            ({"size_px": 128, "low_percentile": 99.0, "high_percentile": 1.0}, "percentiles"),
            ({"size_px": 128, "high_percentile": float("nan")}, "percentiles"),
        ],
    )
    def test_what_is_not_understood_is_refused(
        self, values: dict[str, object], message: str
    ) -> None:
        with pytest.raises(ModelError, match=message):
            PreprocessSpec.from_dict(values)
