"""The overlay shows the X-ray, the map where it belongs, and every word beside the image."""

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from lungwatch import RESEARCH_USE_ONLY
from lungwatch.daemon.overlay import (
    OverlayText,
    encode_png,
    make_preview,
    render_overlay,
    shown_class,
)
from lungwatch.daemon.overlay.colormap import blend, colours, opacity
from lungwatch.daemon.overlay.layout import Layout, font, lay_out
from lungwatch.daemon.overlay.render import upsample
from lungwatch.daemon.overlay.text import format_score

SHA256 = "0123456789abcdef" * 4

SHAPES = [
    (1, 1),
    (64, 64),
    (512, 512),
    (1024, 964),
    (1024, 341),  # portrait 1:3
    (341, 1024),  # landscape 3:1
    (1024, 8),
    (8, 1024),
    (2048, 2048),
]


def _text(**changes: object) -> OverlayText:
    values: dict[str, object] = {
        "label": "COVID",
        "probability": 0.973,
        "threshold": 0.5,
        "model": "baseline-1.0.0",
        "sha256": SHA256,
    }
    return OverlayText(**(values | changes))  # type: ignore[arg-type]


def _grey(shape: tuple[int, int]) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def _spot(shape: tuple[int, int], row: int, column: int) -> NDArray[np.float32]:
    cam = np.zeros(shape, dtype=np.float32)
    cam[row, column] = 1.0
    return cam


def _words(plan: Layout) -> str:
    return " ".join(line.text for line in plan.texts)


class TestPreview:
    @pytest.mark.parametrize(
        ("shape", "expected"),
        [
            ((3056, 2544), (1024, 852)),
            ((2544, 3056), (852, 1024)),
            ((3000, 1000), (1024, 341)),
            ((1024, 1024), (1024, 1024)),
            ((600, 700), (600, 700)),
            ((299, 299), (512, 512)),
            ((128, 128), (256, 256)),
            ((64, 64), (128, 128)),
            ((100, 300), (171, 512)),
            ((5000, 2), (1024, 1)),
            ((1, 1), (2, 2)),
        ],
    )
    def test_keeps_the_aspect_ratio_within_the_side_and_a_twofold_enlargement(
        self, shape: tuple[int, int], expected: tuple[int, int]
    ) -> None:
        preview = make_preview(np.full(shape, 0.5, dtype=np.float32))
        assert preview.shape == expected
        assert preview.dtype == np.uint8

    def test_small_sides_bound_the_enlargement_too(self) -> None:
        assert make_preview(np.zeros((100, 100), dtype=np.float32), 128).shape == (128, 128)

    def test_black_is_0_and_white_is_255(self) -> None:
        pixels = np.zeros((600, 600), dtype=np.float32)
        pixels[:, 300:] = 1.0
        preview = make_preview(pixels)
        assert (preview[:, :300] == 0).all()
        assert (preview[:, 300:] == 255).all()

    def test_shrinking_averages_areas_instead_of_skipping_pixels(self) -> None:
        pixels = np.indices((2048, 2048)).sum(axis=0) % 2  # a checkerboard, grey from afar
        preview = make_preview(pixels.astype(np.float32))
        assert np.isin(preview, (127, 128)).all()

    def test_enlarging_does_not_wrap_around_at_edges(self) -> None:
        pixels = np.zeros((256, 256), dtype=np.float32)
        pixels[:, 128:] = 1.0
        preview = make_preview(pixels).astype(int)
        assert preview[:, :240].max() == 0
        assert preview[:, 272:].min() == 255
        assert (np.diff(preview, axis=1) >= 0).all()


class TestColours:
    def test_lightness_rises_with_the_value(self) -> None:
        lab = cv2.cvtColor(colours()[np.newaxis].astype(np.float32) / 255, cv2.COLOR_RGB2LAB)
        lightness = lab[0, :, 0]
        assert (np.diff(lightness) > -0.2).all()
        assert (np.diff(lightness[::8]) > 0).all()

    def test_the_x_ray_keeps_its_grey_wherever_the_map_is_0(self) -> None:
        grey = _grey((40, 40))
        blended = blend(grey, np.zeros((40, 40), dtype=np.float32), 0.4)
        assert (blended == grey[:, :, np.newaxis]).all()

    def test_the_map_lies_at_the_asked_opacity(self) -> None:
        share = opacity(0.4)
        assert share[0] == 0
        assert share[64:].min() == share.max() == pytest.approx(0.4)
        assert (np.diff(share) >= 0).all()
        grey = np.full((1, 1), 100, dtype=np.uint8)
        for value in (0.5, 1.0):
            blended = blend(grey, np.full((1, 1), value, dtype=np.float32), 0.4)[0, 0]
            expected = 0.6 * 100 + 0.4 * colours()[round(value * 255)].astype(float)
            assert blended == pytest.approx(expected, abs=0.51)

    def test_a_brighter_pixel_stays_brighter_under_any_colour(self) -> None:
        """Anatomy remains readable: for a given map value the blend is monotonic in grey."""
        grey = np.tile(np.arange(256, dtype=np.uint8), (256, 1))
        values = np.tile((np.arange(256) / 255).astype(np.float32)[:, np.newaxis], (1, 256))
        blended = blend(grey, values, 0.4).astype(int)
        assert (np.diff(blended, axis=1) >= 0).all()
        assert (blended[:, -1] - blended[:, 0] >= 0.59 * 255).all()


class TestGeometry:
    @pytest.mark.parametrize("cells", [(4, 4), (7, 7), (20, 20), (6, 3), (3, 10)])
    @pytest.mark.parametrize("shape", [(512, 512), (1024, 341), (341, 1024)])
    def test_a_maps_peak_lands_on_its_cell(
        self, cells: tuple[int, int], shape: tuple[int, int]
    ) -> None:
        for row, column in [(1, 1), (cells[0] - 2, 1), (1, cells[1] - 2)]:
            enlarged = upsample(_spot(cells, row, column), *shape).astype(np.float64)
            rows, columns = np.indices(shape)
            total = enlarged.sum()
            # Without clipping at the border, the centre of mass is the cell's centre.
            middle = (
                ((rows + 0.5) * enlarged).sum() / total,
                ((columns + 0.5) * enlarged).sum() / total,
            )
            assert middle[0] == pytest.approx((row + 0.5) * shape[0] / cells[0], abs=0.6)
            assert middle[1] == pytest.approx((column + 0.5) * shape[1] / cells[1], abs=0.6)

    def test_corners_and_orientation_are_not_swapped(self) -> None:
        preview = np.zeros((400, 600), dtype=np.uint8)
        for corner in [(0, 0), (0, -1), (-1, 0), (-1, -1)]:
            picture = render_overlay(preview=preview, cam=_spot((8, 8), *corner), text=_text())
            plan = lay_out(preview.shape, _text(), empty=False)
            coloured = picture[plan.image.slices].sum(axis=2)
            assert coloured[corner] == coloured.max() > 0
            assert coloured[tuple(-1 - c for c in corner)] == 0

    @pytest.mark.parametrize("cells", [(1, 1), (4, 4), (7, 5), (20, 20)])
    def test_upsampling_neither_overshoots_nor_reaches_past_the_next_cell(
        self, cells: tuple[int, int]
    ) -> None:
        cam = np.random.default_rng(1).random(cells, dtype=np.float32)
        enlarged = upsample(cam, 333, 500)
        assert enlarged.shape == (333, 500)
        assert cam.min() - 1e-6 <= enlarged.min()
        assert enlarged.max() <= cam.max() + 1e-6
        spot = upsample(_spot((10, 10), 2, 2), 400, 400)
        assert not spot[140:].any()
        assert not spot[:, 140:].any()


class TestPicture:
    @pytest.mark.parametrize("shape", SHAPES)
    def test_the_image_area_holds_the_x_ray_and_the_map_and_nothing_else(
        self, shape: tuple[int, int]
    ) -> None:
        preview = _grey(shape)
        cam = np.random.default_rng(2).random((7, 7), dtype=np.float32)
        picture = render_overlay(preview=preview, cam=cam, text=_text())
        plan = lay_out(shape, _text(), empty=False)
        assert picture.shape == (plan.height, plan.width, 3)
        assert picture.dtype == np.uint8
        assert (picture[plan.image.slices] == blend(preview, upsample(cam, *shape), 0.4)).all()

    def test_with_an_empty_map_the_image_area_is_the_x_ray_bit_for_bit(self) -> None:
        preview = _grey((300, 200))
        picture = render_overlay(
            preview=preview, cam=np.zeros((7, 7), dtype=np.float32), text=_text()
        )
        plan = lay_out(preview.shape, _text(), empty=True)
        assert (picture[plan.image.slices] == preview[:, :, np.newaxis]).all()

    def test_the_same_input_gives_the_same_bytes(self) -> None:
        def draw() -> bytes:
            return encode_png(
                render_overlay(preview=_grey((200, 300)), cam=_spot((7, 7), 3, 3), text=_text())
            )

        assert draw() == draw()

    def test_a_png_holds_exactly_the_picture(self) -> None:
        picture = render_overlay(preview=_grey((200, 300)), cam=_spot((7, 7), 3, 3), text=_text())
        decoded = cv2.imdecode(np.frombuffer(encode_png(picture), np.uint8), cv2.IMREAD_COLOR)
        assert decoded is not None
        assert (cv2.cvtColor(decoded, cv2.COLOR_BGR2RGB) == picture).all()

    def test_the_map_is_opaque_to_two_fifths_unless_told_otherwise(self) -> None:
        preview, cam = np.full((100, 100), 200, np.uint8), np.ones((4, 4), np.float32)
        plan = lay_out(preview.shape, _text(), empty=False)
        seen = render_overlay(preview=preview, cam=cam, text=_text())[plan.image.slices]
        assert seen[50, 50] == pytest.approx(0.6 * 200 + 0.4 * colours()[255], abs=0.51)
        bare = render_overlay(preview=preview, cam=cam, text=_text(), alpha=0.0)
        assert (bare[plan.image.slices] == 200).all()

    @pytest.mark.parametrize(
        "cam",
        [
            np.full((4, 4), np.nan, np.float32),
            np.array([[0, np.nan], [1, 0]], np.float32),
            np.array([[0, np.inf]], np.float32),
            np.array([[-0.1, 1]], np.float32),
            np.array([[0, 1.1]], np.float32),
            np.zeros((2, 4, 4), np.float32),
            np.zeros((0, 4), np.float32),
        ],
    )
    def test_a_map_that_is_none_is_refused(self, cam: NDArray[np.float32]) -> None:
        with pytest.raises(ValueError, match="the map"):
            render_overlay(preview=_grey((64, 64)), cam=cam, text=_text())

    def test_what_rounding_adds_to_a_map_is_forgiven(self) -> None:
        preview, plan = _grey((64, 64)), lay_out((64, 64), _text(), empty=False)
        exact, rough = (
            render_overlay(preview=preview, cam=np.full((4, 4), value, np.float32), text=_text())
            for value in (1.0, 1.0005)
        )
        assert (exact[plan.image.slices] == rough[plan.image.slices]).all()

    @pytest.mark.parametrize(
        "preview",
        [np.zeros((8, 8, 3), np.uint8), np.zeros((0, 8), np.uint8), np.zeros((8, 8), np.float32)],
    )
    def test_a_preview_of_another_kind_is_refused(self, preview: NDArray[np.uint8]) -> None:
        with pytest.raises(ValueError, match="preview"):
            render_overlay(preview=preview, cam=np.zeros((4, 4), np.float32), text=_text())

    def test_an_opacity_out_of_range_is_refused(self) -> None:
        with pytest.raises(ValueError, match="alpha"):
            render_overlay(
                preview=_grey((8, 8)), cam=np.zeros((4, 4), np.float32), text=_text(), alpha=1.4
            )


class TestMargins:
    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize(
        "model",
        ["baseline-1.0.0", "an-unreasonably-long-name-" * 8 + "2.0.0", "W" * 300, "a b " * 60],
    )
    def test_no_text_leaves_the_picture_or_touches_image_bar_or_other_text(
        self, shape: tuple[int, int], model: str
    ) -> None:
        plan = lay_out(shape, _text(label="UNCERTAIN", model=model), empty=False)
        taken = np.zeros((plan.height, plan.width), dtype=bool)
        assert plan.image.left >= 0
        assert plan.image.left + plan.image.width <= plan.width
        for box in (plan.image, plan.bar):
            assert not taken[box.slices].any()
            taken[box.slices] = True
        for line in plan.texts:
            left, top, right, bottom = font(line.size_px).getbbox(line.text)
            assert line.left + left >= 0
            assert line.left + right <= plan.width
            assert line.top + bottom <= plan.height
            area = taken[
                int(line.top + top) : int(line.top + bottom),
                int(line.left + left) : int(line.left + right),
            ]
            assert not area.any()
            area[:] = True

    def test_the_margins_are_drawn(self) -> None:
        """Every planned line leaves pixels of its own colour in the picture."""
        plan = lay_out((512, 400), _text(), empty=False)
        picture = render_overlay(preview=_grey((512, 400)), cam=_spot((7, 7), 3, 3), text=_text())
        for line in plan.texts:
            left, top, right, bottom = font(line.size_px).getbbox(line.text)
            drawn = picture[
                line.top + int(top) : line.top + int(bottom),
                line.left + int(left) : line.left + int(right),
            ]
            assert np.abs(drawn.astype(int) - line.colour).sum(axis=2).min() < 60, line.text

    def test_they_say_label_score_model_short_hash_and_what_it_is_not(self) -> None:
        words = _words(lay_out((1024, 964), _text(), empty=False))
        assert "P(COVID) = 0.973, threshold 0.500" in words
        assert "Model baseline-1.0.0, image 0123456789ab" in words
        assert SHA256[:13] not in words
        assert RESEARCH_USE_ONLY in words

    @pytest.mark.parametrize("shape", SHAPES)
    def test_the_research_note_is_whole_whatever_the_shape(self, shape: tuple[int, int]) -> None:
        assert RESEARCH_USE_ONLY in _words(lay_out(shape, _text(), empty=False))

    @pytest.mark.parametrize(
        ("label", "index", "caption"),
        [
            ("COVID", 1, "Grad-CAM for COVID, relative"),
            ("NEGATIVE", 0, "Grad-CAM for NEGATIVE, relative"),
            ("UNCERTAIN", 1, "Grad-CAM for COVID, relative"),
        ],
    )
    def test_the_caption_names_the_class_that_the_map_explains(
        self, label: str, index: int, caption: str
    ) -> None:
        text = _text(label=label)
        assert shown_class(text.label) == index
        assert caption in _words(lay_out((1024, 964), text, empty=False))
        assert label in _words(lay_out((1024, 964), text, empty=False))

    def test_an_empty_map_is_said_to_be_empty(self) -> None:
        full, empty = (
            render_overlay(preview=_grey((64, 64)), cam=cam, text=_text())
            for cam in (_spot((4, 4), 1, 1), np.zeros((4, 4), np.float32))
        )
        assert "no positive evidence" in _words(lay_out((64, 64), _text(), empty=True))
        assert "no positive evidence" not in _words(lay_out((64, 64), _text(), empty=False))
        plan = lay_out((64, 64), _text(), empty=True)
        below = plan.image.top + plan.image.height
        assert full.shape != empty.shape or (full[below:] != empty[below:]).any()

    def test_the_colour_bar_runs_from_0_to_1_with_ticks_in_between(self) -> None:
        plan = lay_out((512, 512), _text(), empty=False)
        picture = render_overlay(preview=_grey((512, 512)), cam=_spot((7, 7), 3, 3), text=_text())
        bar = picture[plan.bar.slices].astype(int)
        assert (np.ptp(bar[:, 0], axis=1) == 0).all()  # 0 is grey
        assert bar[-1, -1] == pytest.approx(0.6 * 50 + 0.4 * colours()[255], abs=0.51)
        assert [plan.ticks[0], plan.ticks[-1]] == [
            plan.bar.left,
            plan.bar.left + plan.bar.width - 1,
        ]
        labels = [line.text for line in plan.texts if line.text[0].isdigit()]
        assert labels == ["0", "0.25", "0.5", "0.75", "1"]


class TestScore:
    @pytest.mark.parametrize(
        ("probability", "threshold", "expected"),
        [
            (0.973, 0.5, ("0.973", "0.500")),
            (0.9997, 0.5, ("> 0.999", "0.500")),
            (1.0, 0.5, ("> 0.999", "0.500")),
            (0.0, 0.5, ("< 0.001", "0.500")),
            (0.0003, 0.5, ("< 0.001", "0.500")),
            (0.4999, 0.5, ("0.4999", "0.5000")),
            (0.49999, 0.5, ("0.49999", "0.50000")),
            (0.5, 0.5, ("0.500", "0.500")),
            (0.4972, 0.4973, ("0.4972", "0.4973")),
            (0.9997, 0.9996, ("0.9997", "0.9996")),
            (0.0003, 0.0004, ("0.0003", "0.0004")),
        ],
    )
    def test_rounding_never_misleads(
        self, probability: float, threshold: float, expected: tuple[str, str]
    ) -> None:
        assert format_score(probability, threshold) == expected

    def test_a_bound_is_printed_without_an_equals_sign(self) -> None:
        assert _text(probability=0.9999).score == "P(COVID) > 0.999, threshold 0.500"

    @pytest.mark.parametrize("name", ["probability", "threshold"])
    @pytest.mark.parametrize("value", [float("nan"), -0.1, 1.1])
    def test_a_number_that_is_no_probability_is_refused(self, name: str, value: float) -> None:
        with pytest.raises(ValueError, match=name):
            _text(**{name: value})
