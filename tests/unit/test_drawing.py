"""An overlay shows the map that belongs to its answer, as strong as the evidence is."""

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from lungwatch.attributes import RadiographMeta
from lungwatch.contract import Calibration, Decision, Finding, Golden, ModelContract
from lungwatch.daemon.intake.custody import OwnedFile
from lungwatch.daemon.overlay.layout import lay_out
from lungwatch.daemon.overlay.render import blend, render_overlay, upsample
from lungwatch.daemon.overlay.text import FindingText, OverlayText
from lungwatch.daemon.pipeline.record import Assessment, draw_result
from lungwatch.daemon.pipeline.records import Claimed, Classified, Prepared, Scores
from lungwatch.db.models import Plausibility
from lungwatch.errors import Flag
from lungwatch.preprocess import PreprocessSpec, content_of

REFERENCE = 8.0
CONTRACT = ModelContract(
    name="toy",
    version="1.0.0",
    family="toy",
    preprocess=PreprocessSpec(size_px=32),
    cam_side_px=8,
    embedding_size=1,
    decision=Decision(threshold=0.5, uncertain_low=0.4, uncertain_high=0.6),
    calibration=Calibration(),
    golden=Golden(input_sha256="0" * 64, probability=0.5, cam_mean=0.1),
    map_reference=REFERENCE,
)
JUDGED = Assessment(
    plausibility=Plausibility(gate_score=0.9, lung_area=0.3, lung_share=0.62),
    flags=(Flag.VIEW_UNKNOWN,),
)
PROBABILITIES = {"NEGATIVE": 0.1, "UNCERTAIN": 0.5, "COVID": 0.9}


def spot(row, column):
    cam = np.zeros((8, 8), np.float32)
    cam[row, column] = 1.0
    return cam


COVID_MAP, NEGATIVE_MAP = spot(2, 2), spot(5, 5)


def scored(label, *, peak=None, covid=COVID_MAP, shape=(300, 200), known=False):
    preview = np.random.default_rng(3).integers(0, 256, shape, dtype=np.uint8)
    prepared = Prepared(
        claim=Claimed(
            result_id=1,
            image_id=1,
            sha256="ab" * 32,
            path=Path("x"),
            file=OwnedFile.open(Path("/dev/null")),
            attempt=1,
            received_at=datetime.now(UTC),
            started_s=0.0,
        ),
        meta=RadiographMeta(
            format="PNG",
            rows=shape[0],
            columns=shape[1],
            bits_stored=8,
            photometric="MONOCHROME2",
        ),
        tensor=np.zeros((32, 32, 1), np.float32),
        preview=preview,
        shape=shape,
        orientation_known=known,
    )
    scores = Scores(
        probability=PROBABILITIES[label],
        logit=0.0,
        label=label,
        cam=np.stack([NEGATIVE_MAP, covid]),
        embedding=np.zeros(1, np.float32),
        cam_peak=None if peak is None else np.array([99.0, peak], np.float32),
    )
    return Classified(prepared=prepared, scores=scores)


def text_of(label, **changes):
    values = {
        "label": label,
        "probability": PROBABILITIES[label],
        "decision": CONTRACT.decision,
        "model": "toy-1.0.0",
        "sha256": "ab" * 32,
        "flags": JUDGED.flags,
        "gate_score": 0.9,
        "lung_share": 0.62,
        "common_scale": True,
    }
    return OverlayText(**(values | changes))


def panels_of(picture, classified, state, *, side_by_side):
    """The X-ray's panels as drawn; where they lie does not depend on the scale's caption."""
    shape = classified.prepared.preview.shape
    text = text_of(classified.scores.label, sides_known=classified.prepared.orientation_known)
    plan = lay_out(shape, text, state=state, side_by_side=side_by_side)
    assert picture.shape == (plan.height, plan.width, 3)
    return [picture[box.slices] for box in plan.panels]


@pytest.mark.parametrize("side_by_side", [True, False])
@pytest.mark.parametrize("peak", [None, 1.0, 100.0])
def test_a_negative_answer_has_no_map_however_strong_one_would_be(side_by_side, peak):
    case = scored("NEGATIVE", peak=peak)
    picture = draw_result(case, JUDGED, CONTRACT, side_by_side=side_by_side)
    (panel,) = panels_of(picture, case, "none", side_by_side=side_by_side)
    assert (panel == case.prepared.preview[:, :, np.newaxis]).all()


@pytest.mark.parametrize("label", ["UNCERTAIN", "COVID"])
@pytest.mark.parametrize(
    ("peak", "strength"), [(0.8, 0.1), (2.0, 0.25), (REFERENCE, 1.0), (5 * REFERENCE, 1.0)]
)
def test_every_other_answer_shows_covids_map_as_strong_as_its_evidence(label, peak, strength):
    case = scored(label, peak=peak)
    picture = draw_result(case, JUDGED, CONTRACT, side_by_side=True)
    left, right = panels_of(picture, case, "drawn", side_by_side=True)
    preview = case.prepared.preview
    assert (left == preview[:, :, np.newaxis]).all()
    cam = upsample(COVID_MAP * np.float32(strength), *preview.shape)
    assert (right == blend(preview, cam, 0.4)).all()
    expected = render_overlay(
        preview=preview, cam=COVID_MAP * np.float32(strength), text=text_of(label)
    )
    assert (picture == expected).all()


@pytest.mark.parametrize(
    ("peak", "contract"),
    [(None, CONTRACT), (2.0, replace(CONTRACT, map_reference=None))],
    ids=["older graph", "no reference"],
)
def test_without_a_common_scale_the_map_is_relative_and_says_so(peak, contract):
    case = scored("COVID", peak=peak)
    picture = draw_result(case, JUDGED, contract, side_by_side=True)
    text = text_of("COVID", common_scale=False)
    assert (
        picture == render_overlay(preview=case.prepared.preview, cam=COVID_MAP, text=text)
    ).all()


def test_an_empty_map_shows_the_x_ray_once():
    case = scored("COVID", peak=0.0, covid=np.zeros((8, 8), np.float32))
    picture = draw_result(case, JUDGED, CONTRACT, side_by_side=True)
    (panel,) = panels_of(picture, case, "empty", side_by_side=True)
    assert (panel == case.prepared.preview[:, :, np.newaxis]).all()


def test_side_marks_stand_where_the_orientation_is_known():
    known, unknown = (
        draw_result(scored("COVID", known=known), JUDGED, CONTRACT, side_by_side=True)
        for known in (True, False)
    )
    assert known.shape == unknown.shape
    rows = np.flatnonzero((known != unknown).any(axis=(1, 2)))
    case = scored("COVID", known=True)
    text = text_of("COVID", sides_known=True)
    plan = lay_out(case.prepared.preview.shape, text, state="drawn", side_by_side=True)
    assert rows.size > 0
    assert rows.max() < plan.panels[0].top


def test_the_map_over_padding_is_cut_off():
    """Of a network that pads its input, the map's part over the picture alone is drawn."""
    contract = replace(CONTRACT, preprocess=PreprocessSpec(size_px=32, fit="pad"))
    inside, around = spot(4, 4), spot(4, 4)
    around[:, [0, -1]] = 1.0  # over the padding left and right of a portrait
    one, other = (
        draw_result(
            scored("COVID", peak=REFERENCE, covid=cam, shape=(400, 200)),
            JUDGED,
            contract,
            side_by_side=True,
        )
        for cam in (inside, around)
    )
    assert (one == other).all()


class TestOpacity:
    """A negative answer with an opacity is not to be read as a normal chest."""

    CONTRACT = replace(
        CONTRACT,
        findings=(
            Finding(name="nodule", calibration=Calibration(), threshold=0.5),
            Finding(name="opacity", calibration=Calibration(), threshold=0.5, map_reference=4.0),
        ),
    )
    FLAGGED = replace(JUDGED, flags=(Flag.OTHER_OPACITY,))

    def case(self, *, label="NEGATIVE", maps=True, peak=4.0):
        case = scored(label)
        scores = replace(
            case.scores,
            further={"nodule": 0.25, "opacity": 0.625},
            further_cams=np.stack([NEGATIVE_MAP, spot(6, 1)]) if maps else None,
            further_peaks=np.array([99.0, peak], np.float32) if maps else None,
        )
        return replace(case, scores=scores)

    def words(self, label, flags, **changes):
        text = text_of(label, flags=flags, **changes)
        plan = lay_out((300, 200), text, state="none", side_by_side=True)
        return [line.text for line in plan.texts]

    def test_title_and_sentence_say_it_and_the_list_of_findings_has_its_number(self):
        findings = (FindingText(name="opacity", probability=0.625, threshold=0.5),)
        lines = self.words("NEGATIVE", (Flag.OTHER_OPACITY,), findings=findings)
        assert lines[0] == "NEGATIVE, OTHER OPACITY"
        page = " ".join(lines)
        assert "No COVID-19 pattern found, but an opacity" in page
        assert "does not mean a normal chest X-ray" in page
        assert "P(opacity) = 0.625, threshold 0.500" in lines
        assert "other disease is not assessed" not in page
        plain = self.words("NEGATIVE", (), findings=findings)
        assert plain[0] == "NEGATIVE"
        assert "P(opacity) = 0.625, threshold 0.500" in plain

    @pytest.mark.parametrize("side_by_side", [True, False])
    @pytest.mark.parametrize("peak", [1.0, 100.0])
    def test_the_map_that_is_drawn_is_that_of_the_opacity(self, side_by_side, peak):
        """On its own scale, and captioned as what it is."""
        case = self.case(peak=peak)
        picture = draw_result(case, self.FLAGGED, self.CONTRACT, side_by_side=side_by_side)
        findings = tuple(
            FindingText(name=name, probability=value, threshold=0.5)
            for name, value in case.scores.further.items()
        )
        text = text_of("NEGATIVE", flags=self.FLAGGED.flags, findings=findings, opacity_map=True)
        wanted = render_overlay(
            preview=case.prepared.preview,
            cam=content_of(
                spot(6, 1) * np.float32(min(1.0, peak / 4.0)), (300, 200), CONTRACT.preprocess
            ),
            text=text,
            side_by_side=side_by_side,
        )
        np.testing.assert_array_equal(picture, wanted)
        assert text.caption("drawn").startswith("Grad-CAM for opacity, same scale")
        assert text.lungs("drawn") == "", "the share that is known is that of COVID's map"

    @pytest.mark.parametrize("judged", [JUDGED, FLAGGED])
    def test_there_is_no_map_without_the_flag_or_without_one_in_the_graph(self, judged):
        case = self.case(maps=judged is JUDGED)
        picture = draw_result(case, judged, self.CONTRACT, side_by_side=True)
        grey = case.prepared.preview[:, :, np.newaxis]
        rows, columns = grey.shape[:2]
        assert any(
            (picture[top : top + rows, left : left + columns] == grey).all()
            for top in range(picture.shape[0] - rows + 1)
            for left in [(picture.shape[1] - columns) // 2]
        )

    def test_an_answer_with_covid_keeps_its_map(self):
        case = self.case(label="COVID")
        without = replace(case, scores=replace(case.scores, further_cams=None))
        pictures = [
            draw_result(one, JUDGED, self.CONTRACT, side_by_side=True) for one in (case, without)
        ]
        np.testing.assert_array_equal(*pictures)
