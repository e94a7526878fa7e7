"""The overlay shows the X-ray, the map where it belongs, and every word beside the image."""

from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from lungwatch import RESEARCH_USE_ONLY
from lungwatch.contract import Decision
from lungwatch.daemon.overlay.layout import OverlayLayout, Rectangle, font, lay_out
from lungwatch.daemon.overlay.render import (
    blend,
    colours,
    encode_png,
    make_preview,
    on_common_scale,
    opacity,
    render_overlay,
    upsample,
)
from lungwatch.daemon.overlay.text import MapState, OverlayText, decimal_score, format_score
from lungwatch.errors import FLAGS, FileRejected, Flag, Reason
from lungwatch.imaging.reader import read_radiograph

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
BAND = Decision(threshold=0.5, uncertain_low=0.44, uncertain_high=0.61)
SIX_FLAGS = (
    Flag.VIEW_UNKNOWN,
    Flag.BODY_PART_UNKNOWN,
    Flag.TEXT_BURNT_IN,
    Flag.PARTIAL_LUNGS,
    Flag.NOT_GATED,
    Flag.ATTENTION_OUTSIDE_LUNGS,
)


def _text(**changes: object) -> OverlayText:
    values: dict[str, object] = {
        "label": "COVID",
        "probability": 0.973,
        "decision": BAND,
        "model": "baseline-1.1.0",
        "sha256": SHA256,
    }
    return OverlayText(**(values | changes))  # type: ignore[arg-type]


def _grey(shape: tuple[int, int]) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def _spot(shape: tuple[int, int], row: int, column: int) -> NDArray[np.float32]:
    cam = np.zeros(shape, dtype=np.float32)
    cam[row, column] = 1.0
    return cam


def _plan(
    shape: tuple[int, int],
    text: OverlayText | None = None,
    state: MapState = "drawn",
    *,
    pair: bool = False,
) -> OverlayLayout:
    return lay_out(shape, text or _text(), state=state, side_by_side=pair)


def _render(
    preview: NDArray[np.uint8],
    cam: NDArray[np.float32] | None,
    text: OverlayText | None = None,
    *,
    pair: bool = False,
) -> NDArray[np.uint8]:
    return render_overlay(preview=preview, cam=cam, text=text or _text(), side_by_side=pair)


def _words(plan: OverlayLayout) -> str:
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
            picture = _render(preview, _spot((8, 8), *corner))
            (box,) = _plan((400, 600)).panels
            coloured = picture[box.slices].sum(axis=2)
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
        picture, plan = _render(preview, cam), _plan(shape)
        assert picture.shape == (plan.height, plan.width, 3)
        assert picture.dtype == np.uint8
        (box,) = plan.panels
        assert (picture[box.slices] == blend(preview, upsample(cam, *shape), 0.4)).all()

    @pytest.mark.parametrize("shape", SHAPES)
    def test_beside_the_map_lies_the_same_x_ray_untouched(self, shape: tuple[int, int]) -> None:
        preview = _grey(shape)
        cam = np.random.default_rng(2).random((7, 7), dtype=np.float32)
        picture, plan = _render(preview, cam, pair=True), _plan(shape, pair=True)
        left, right = plan.panels
        assert left.right < right.left
        assert (left.top, left.height, left.width) == (right.top, right.height, right.width)
        size = left.width, left.height
        panel = preview
        if size != (shape[1], shape[0]):
            panel = cv2.resize(preview, size, interpolation=cv2.INTER_AREA).astype(np.uint8)
        assert (picture[left.slices] == panel[:, :, np.newaxis]).all()
        covered = blend(panel, upsample(cam, left.height, left.width), 0.4)
        assert (picture[right.slices] == covered).all()

    @pytest.mark.parametrize(
        ("shape", "expected"),
        [
            ((1024, 964), (768, 723)),
            ((964, 1024), (723, 768)),
            ((600, 300), (512, 256)),
            ((512, 482), (512, 482)),
            ((64, 64), (64, 64)),
            ((1024, 1), (768, 1)),
            ((2048, 2048), (1536, 1536)),
        ],
    )
    def test_two_panels_have_three_quarters_of_the_side_but_not_below_512(
        self, shape: tuple[int, int], expected: tuple[int, int]
    ) -> None:
        for box in _plan(shape, pair=True).panels:
            assert (box.height, box.width) == expected

    def test_a_negative_answer_shows_the_x_ray_alone_bit_for_bit(self) -> None:
        """No colour that could be taken for a lesion, in the whole of the X-ray."""
        preview, text = _grey((1024, 700)), _text(label="NEGATIVE", probability=0.03)
        for pair in (False, True):
            plan = _plan((1024, 700), text, "none", pair=pair)
            (box,) = plan.panels
            picture = _render(preview, None, text, pair=pair)
            assert (picture[box.slices] == preview[:, :, np.newaxis]).all()
            assert plan.bar is None
            assert "No map is drawn for a negative answer." in _words(plan)

    def test_a_negative_answer_with_a_map_and_another_without_are_refused(self) -> None:
        cam = _spot((4, 4), 1, 1)
        for label, given in (("NEGATIVE", cam), ("COVID", None), ("UNCERTAIN", None)):
            with pytest.raises(ValueError, match="a map is given where the text has none"):
                _render(_grey((64, 64)), given, _text(label=label))

    def test_with_an_empty_map_the_image_area_is_the_x_ray_bit_for_bit(self) -> None:
        preview = _grey((300, 200))
        picture = _render(preview, np.zeros((7, 7), dtype=np.float32), pair=True)
        (box,) = _plan((300, 200), state="empty", pair=True).panels
        assert (picture[box.slices] == preview[:, :, np.newaxis]).all()

    def test_the_same_input_gives_the_same_bytes(self) -> None:
        def draw() -> bytes:
            return encode_png(_render(_grey((200, 300)), _spot((7, 7), 3, 3), pair=True))

        assert draw() == draw()

    def test_a_png_holds_exactly_the_picture(self) -> None:
        picture = _render(_grey((200, 300)), _spot((7, 7), 3, 3))
        decoded = cv2.imdecode(np.frombuffer(encode_png(picture), np.uint8), cv2.IMREAD_COLOR)
        assert decoded is not None
        assert (cv2.cvtColor(decoded, cv2.COLOR_BGR2RGB) == picture).all()

    @pytest.mark.parametrize("state", ["negative", "covid"])
    @pytest.mark.parametrize("kind", ["as it is", "without its chunk", "JPEG"])
    def test_an_overlay_that_is_dropped_is_refused_as_one(
        self, tmp_path: Path, kind: str, state: str
    ) -> None:
        cam = _spot((7, 7), 3, 3) if state == "covid" else None
        text = _text(label="COVID" if state == "covid" else "NEGATIVE")
        data = encode_png(_render(_grey((400, 300)), cam, text, pair=state == "covid"))
        drawn = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
        if kind != "as it is":
            suffix = ".jpg" if kind == "JPEG" else ".png"
            data = cv2.imencode(suffix, drawn)[1].tobytes()
        dropped = tmp_path / "overlay"
        dropped.write_bytes(data)
        with pytest.raises(FileRejected, match="an overlay that lungwatch drew") as caught:
            read_radiograph(dropped)
        assert caught.value.reason is Reason.NOT_A_RADIOGRAPH

    def test_the_map_is_opaque_to_two_fifths_unless_told_otherwise(self) -> None:
        preview, cam = np.full((100, 100), 200, np.uint8), np.ones((4, 4), np.float32)
        (box,) = _plan((100, 100)).panels
        seen = _render(preview, cam)[box.slices]
        assert seen[50, 50] == pytest.approx(0.6 * 200 + 0.4 * colours()[255], abs=0.51)
        bare = render_overlay(preview=preview, cam=cam, text=_text(), alpha=0.0, side_by_side=False)
        assert (bare[box.slices] == 200).all()

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
            _render(_grey((64, 64)), cam)

    def test_what_rounding_adds_to_a_map_is_forgiven(self) -> None:
        preview, (box,) = _grey((64, 64)), _plan((64, 64)).panels
        exact, rough = (
            _render(preview, np.full((4, 4), value, np.float32)) for value in (1.0, 1.0005)
        )
        assert (exact[box.slices] == rough[box.slices]).all()

    @pytest.mark.parametrize(
        "preview",
        [np.zeros((8, 8, 3), np.uint8), np.zeros((0, 8), np.uint8), np.zeros((8, 8), np.float32)],
    )
    def test_a_preview_of_another_kind_is_refused(self, preview: NDArray[np.uint8]) -> None:
        with pytest.raises(ValueError, match="preview"):
            _render(preview, np.zeros((4, 4), np.float32))

    def test_an_opacity_out_of_range_is_refused(self) -> None:
        with pytest.raises(ValueError, match="alpha"):
            render_overlay(
                preview=_grey((8, 8)), cam=np.zeros((4, 4), np.float32), text=_text(), alpha=1.4
            )


class TestScale:
    def test_weak_evidence_is_drawn_weak_and_the_same_in_every_image(self) -> None:
        cam = np.array([[0.0, 0.5, 1.0]], np.float32)
        assert on_common_scale(cam, 1.0, 4.0).tolist() == [[0.0, 0.125, 0.25]]
        assert on_common_scale(cam, 4.0, 4.0).tolist() == [[0.0, 0.5, 1.0]]
        # One raw value has one colour, whatever the strongest value of its image is.
        weak, strong = on_common_scale(cam, 1.0, 4.0), on_common_scale(cam, 2.0, 4.0)
        assert weak[0, 2] == strong[0, 1]

    def test_more_than_the_reference_has_the_full_colour_and_nothing_beyond(self) -> None:
        cam = np.array([[0.25, 1.0]], np.float32)
        assert on_common_scale(cam, 9.0, 4.0).tolist() == [[0.25, 1.0]]
        assert on_common_scale(cam, 0.0, 4.0).tolist() == [[0.0, 0.0]]
        assert on_common_scale(cam, 9.0, 4.0).dtype == np.float32

    def test_the_caption_says_which_scale_it_is(self) -> None:
        common, own = (_words(_plan((512, 512), _text(common_scale=c))) for c in (True, False))
        assert "Grad-CAM for COVID, same scale for all images of this model" in common
        assert "Grad-CAM for COVID, relative to the strongest evidence in this image" in own


def _all_boxes(plan: OverlayLayout) -> list[Rectangle]:
    bars = [plan.bar] if plan.bar else []
    return [*plan.panels, *bars, plan.gauge.box, *(key.box for key in plan.keys)]


class TestMargins:
    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("pair", [False, True])
    @pytest.mark.parametrize(
        ("label", "state"), [("UNCERTAIN", "drawn"), ("COVID", "empty"), ("NEGATIVE", "none")]
    )
    @pytest.mark.parametrize(
        "changes",
        [
            {},
            {"model": "an-unreasonably-long-name-" * 8 + "2.0.0", "flags": SIX_FLAGS},
            {"model": "W" * 300, "flags": tuple(Flag), "sides_known": True},
            {"model": "a b " * 60, "sides_known": True, "lung_share": 0.62, "gate_score": 0.9},
            {"probability": 1.0, "decision": Decision(threshold=0.999, uncertain_low=0.998,
                                                      uncertain_high=1.0)},
            {"probability": 0.0, "decision": Decision(threshold=0.001, uncertain_low=0.0,
                                                      uncertain_high=0.001)},
        ],
    )  # fmt: skip
    def test_no_text_leaves_the_picture_or_touches_image_scales_or_other_text(
        self,
        shape: tuple[int, int],
        pair: bool,
        label: str,
        state: MapState,
        changes: dict[str, object],
    ) -> None:
        plan = _plan(shape, _text(label=label, **changes), state, pair=pair)
        taken = np.zeros((plan.height, plan.width), dtype=bool)
        for box in _all_boxes(plan):
            assert box.left >= 0
            assert box.right <= plan.width
            assert box.bottom <= plan.height
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
            assert not area.any(), line.text
            area[:] = True

    @pytest.mark.parametrize("pair", [False, True])
    def test_the_margins_are_drawn(self, pair: bool) -> None:
        """Every planned line leaves pixels of its own colour in the picture."""
        text = _text(flags=SIX_FLAGS, lung_share=0.62, gate_score=0.9, sides_known=True)
        plan = _plan((512, 400), text, pair=pair)
        picture = _render(_grey((512, 400)), _spot((7, 7), 3, 3), text, pair=pair)
        for line in plan.texts:
            left, top, right, bottom = font(line.size_px).getbbox(line.text)
            drawn = picture[
                line.top + int(top) : line.top + int(bottom),
                line.left + int(left) : line.left + int(right),
            ]
            assert np.abs(drawn.astype(int) - line.colour).sum(axis=2).min() < 60, line.text

    def test_they_say_label_score_model_short_hash_and_what_it_is_not(self) -> None:
        words = _words(_plan((1024, 964), _text(gate_score=0.98765)))
        assert "P(COVID) = 0.973" in words
        assert "threshold 0.500" in words
        assert "Model baseline-1.1.0, content gate 0.988, image 0123456789ab" in words
        assert SHA256[:13] not in words
        assert RESEARCH_USE_ONLY in words
        assert "content gate" not in _words(_plan((1024, 964)))

    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("pair", [False, True])
    def test_the_research_note_is_whole_whatever_the_shape(
        self, shape: tuple[int, int], pair: bool
    ) -> None:
        assert RESEARCH_USE_ONLY in _words(_plan(shape, pair=pair))

    @pytest.mark.parametrize(
        ("label", "meaning"),
        [
            ("COVID", "COVID COVID-19 pattern found."),
            ("NEGATIVE", "NEGATIVE No COVID-19 pattern found; other disease is not assessed."),
            ("UNCERTAIN", "UNCERTAIN The model abstains; COVID-19 pattern indeterminate."),
        ],
    )
    def test_the_label_stands_with_what_it_means(self, label: str, meaning: str) -> None:
        state: MapState = "none" if label == "NEGATIVE" else "drawn"
        for shape in ((1024, 964), (64, 64)):
            words = _words(_plan(shape, _text(label=label), state))
            assert meaning in words
            assert "NORMAL" not in words

    def test_an_empty_map_is_said_to_be_empty_and_has_no_colour_bar(self) -> None:
        plan = _plan((64, 64), state="empty")
        assert "Grad-CAM for COVID: no positive evidence in this image" in _words(plan)
        assert plan.bar is None
        assert plan.ticks == ()
        assert "no positive evidence" not in _words(_plan((64, 64)))

    def test_the_colour_bar_runs_from_0_to_1_with_ticks_in_between(self) -> None:
        plan = _plan((512, 512))
        picture = _render(_grey((512, 512)), _spot((7, 7), 3, 3))
        assert plan.bar is not None
        bar = picture[plan.bar.slices].astype(int)
        assert (np.ptp(bar[:, 0], axis=1) == 0).all()  # 0 is grey
        assert bar[-1, -1] == pytest.approx(0.6 * 50 + 0.4 * colours()[255], abs=0.51)
        assert [plan.ticks[0], plan.ticks[-1]] == [
            plan.bar.left,
            plan.bar.left + plan.bar.width - 1,
        ]
        labels = [
            line.text for line in plan.texts if line.text[0].isdigit() and line.top > plan.bar.top
        ]
        assert labels == ["0", "0.25", "0.5", "0.75", "1"]


class TestGauge:
    def test_its_zones_meet_at_the_bounds_of_the_uncertain_band(self) -> None:
        gauge = _plan((1024, 964)).gauge
        box = gauge.box
        negative, uncertain, covid = (zone.box for zone in gauge.zones)
        assert negative.left == box.left
        assert negative.right == uncertain.left == box.left + round(0.44 * box.width)
        assert uncertain.right == covid.left == box.left + round(0.61 * box.width)
        assert covid.right == box.right
        assert gauge.marker == box.left + round(0.973 * (box.width - 1))
        assert gauge.threshold == box.left + round(0.5 * (box.width - 1))

    def test_the_band_is_told_in_numbers_beside_the_threshold(self) -> None:
        words = _words(_plan((1024, 964)))
        for part in ("negative below 0.440", "uncertain 0.440 to 0.610", "COVID from 0.610"):
            assert part in words

    def test_a_model_that_never_abstains_has_two_zones_that_meet_at_the_threshold(self) -> None:
        never = Decision(threshold=0.3, uncertain_low=0.3, uncertain_high=0.3)
        plan = _plan((1024, 964), _text(decision=never))
        negative, covid = (zone.box for zone in plan.gauge.zones)
        assert negative.right == covid.left
        assert "uncertain" not in _words(plan)
        assert "negative below 0.300 COVID from 0.300" in _words(plan)

    @pytest.mark.parametrize(
        ("probability", "label"), [(0.02, "NEGATIVE"), (0.5, "UNCERTAIN"), (0.99, "COVID")]
    )
    def test_the_marker_lies_in_the_zone_that_stands_out(
        self, probability: float, label: str
    ) -> None:
        text = _text(label=label, probability=probability)
        gauge = _plan((1024, 964), text).gauge
        brightest = max(gauge.zones, key=lambda zone: sum(zone.colour) / len(zone.colour))
        assert brightest.box.left <= gauge.marker < brightest.box.right

    @pytest.mark.parametrize("matrix", [
        ((0.152, 1.053, -0.205), (0.115, 0.786, 0.099), (-0.004, -0.048, 1.052)),
        ((0.367, 0.861, -0.228), (0.280, 0.673, 0.047), (-0.012, 0.043, 0.969)),
        ((1.256, -0.077, -0.179), (-0.078, 0.931, 0.148), (0.005, 0.691, 0.304)),
    ], ids=["protanopia", "deuteranopia", "tritanopia"])  # fmt: skip
    def test_zones_are_told_apart_by_the_colour_blind(
        self, matrix: tuple[tuple[float, ...], ...]
    ) -> None:
        """Simulated after Machado, Oliveira & Fernandes 2009, severity 1."""
        plans = [
            _plan((512, 512), _text(label=label, probability=p), "none" if p < 0.4 else "drawn")
            for label, p in (("NEGATIVE", 0.1), ("UNCERTAIN", 0.5), ("COVID", 0.9))
        ]
        lit = [max((zone.colour for zone in plan.gauge.zones), key=sum) for plan in plans]
        assert len(set(lit)) == 3
        linear = (np.array(lit, np.float32) / 255) ** 2.2
        seen = np.clip(linear @ np.array(matrix, np.float32).T, 0, 1) ** (1 / 2.2)
        lab = cv2.cvtColor(seen[np.newaxis].astype(np.float32), cv2.COLOR_RGB2LAB)[0]
        for one, other in ((0, 1), (1, 2), (0, 2)):
            assert np.linalg.norm(lab[one] - lab[other]) > 15

    def test_the_marker_is_drawn_white_on_the_scale(self) -> None:
        plan = _plan((512, 512))
        picture = _render(_grey((512, 512)), _spot((7, 7), 3, 3))
        middle = plan.gauge.box.top + plan.gauge.box.height // 2
        assert (picture[middle, plan.gauge.marker] == 255).all()
        assert (picture[middle, plan.gauge.threshold] == 255).all()


class TestRemarks:
    def test_flags_are_written_in_words(self) -> None:
        words = _words(_plan((1024, 964), _text(flags=SIX_FLAGS)))
        for flag in SIX_FLAGS:
            assert FLAGS[flag] in words
            assert flag.value not in words
        assert "+ " not in words

    def test_what_does_not_fit_is_counted(self) -> None:
        words = _words(_plan((1024, 964), _text(flags=tuple(Flag))))
        shown = [flag for flag in Flag if FLAGS[flag] in words]
        assert len(shown) == 5
        assert f"+ {len(Flag) - 5} more" in words
        narrow = _words(_plan((64, 64), _text(flags=SIX_FLAGS), pair=True))
        assert "+ 3 more" in narrow

    def test_without_flags_there_are_none(self) -> None:
        assert "Remarks" not in _words(_plan((1024, 964)))

    def test_the_lungs_share_of_the_map_is_told_where_there_is_a_map(self) -> None:
        text = _text(lung_share=0.624)
        assert "62 % of the map lies in the lungs" in _words(_plan((1024, 964), text))
        assert "in the lungs" not in _words(_plan((1024, 964)))
        assert "in the lungs" not in _words(_plan((1024, 964), text, "empty"))

    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("pair", [False, True])
    def test_sides_are_marked_where_they_are_known(
        self, shape: tuple[int, int], pair: bool
    ) -> None:
        """R at the viewer's left, above each panel and so on no pixel of the X-ray."""
        plan = _plan(shape, _text(sides_known=True), pair=pair)
        marks = [line for line in plan.texts if line.text in ("R", "L")]
        assert [line.text for line in marks] == ["R", "L"] * len(plan.panels)
        for panel, right, left in zip(plan.panels, marks[::2], marks[1::2], strict=True):
            assert right.left < panel.left + panel.width / 2 < left.left + left.size_px
            assert max(right.top, left.top) + right.size_px <= panel.top
        assert not [t for t in _plan(shape, pair=pair).texts if t.text in ("R", "L")]


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
        assert format_score(probability, (threshold,)) == (expected[0], (expected[1],))

    @pytest.mark.parametrize(
        ("probability", "expected"),
        [
            (0.2, ("0.200", ("0.500", "0.440", "0.610"))),
            (0.43996, ("0.43996", ("0.50000", "0.44000", "0.61000"))),
            (0.44, ("0.440", ("0.500", "0.440", "0.610"))),
            (0.6099, ("0.6099", ("0.5000", "0.4400", "0.6100"))),
        ],
    )
    def test_nor_does_it_between_the_bounds_of_the_band(
        self, probability: float, expected: tuple[str, tuple[str, ...]]
    ) -> None:
        assert format_score(probability, (0.5, 0.44, 0.61)) == expected

    def test_a_band_to_the_end_of_the_scale_is_printed_as_it_is(self) -> None:
        assert format_score(0.9996, (0.5, 0.0, 1.0)) == ("> 0.999", ("0.500", "0.000", "1.000"))

    def test_a_bound_is_printed_without_an_equals_sign(self) -> None:
        assert _text(probability=0.9999).score == "P(COVID) > 0.999"

    @pytest.mark.parametrize("name", ["probability", "gate_score", "lung_share"])
    @pytest.mark.parametrize("value", [float("nan"), -0.1, 1.1])
    def test_a_number_that_is_no_probability_is_refused(self, name: str, value: float) -> None:
        with pytest.raises(ValueError, match=name):
            _text(**{name: value})

    @pytest.mark.parametrize(
        ("probability", "expected"),
        [
            (0.8123456, ("0.812", ("0.500", "0.440", "0.610"))),
            (0.0, ("0.000", ("0.500", "0.440", "0.610"))),
            (1.0, ("1.000", ("0.500", "0.440", "0.610"))),
            (0.43996, ("0.43996", ("0.50000", "0.44000", "0.61000"))),
            (0.99971, ("0.9997", ("0.5000", "0.4400", "0.6100"))),
            (1e-20, ("0.00000000", ("0.50000000", "0.44000000", "0.61000000"))),
        ],
    )
    def test_a_plain_number_lies_on_the_side_that_the_real_one_does(
        self, probability: float, expected: tuple[str, tuple[str, ...]]
    ) -> None:
        assert decimal_score(probability, (0.5, 0.44, 0.61)) == expected
