"""Each flag of a scored picture is set by its rule, on either side of its threshold."""

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from lungwatch.attributes import RadiographMeta
from lungwatch.contract import (
    Calibration,
    Decision,
    Finding,
    GateCheck,
    GateContract,
    Golden,
    ModelContract,
    Verdict,
)
from lungwatch.daemon.intake.custody import OwnedFile
from lungwatch.daemon.pipeline.record import assess
from lungwatch.daemon.pipeline.records import Claimed, Classified, GateAnswer, Prepared, Scores
from lungwatch.db.models import Plausibility
from lungwatch.errors import Flag, Reason, flags_in_order
from lungwatch.preprocess import PreprocessSpec, content_of, has_partial_lungs, lung_mask

GATE = GateContract(
    preprocess=PreprocessSpec(size_px=40, fit="pad"),
    checks=(GateCheck(name="frontal", threshold=0.5, reason=Reason.NOT_FRONTAL_CHEST),),
    lungs_side_px=20,
    lung_area=(0.1, 0.6),
    golden_scores=(0.9,),
    golden_lung_area=0.3,
)
CONTRACT = ModelContract(
    name="toy",
    version="1.0.0",
    family="toy",
    preprocess=PreprocessSpec(size_px=32),
    cam_side_px=20,
    embedding_size=1,
    decision=Decision(threshold=0.5, uncertain_low=0.4, uncertain_high=0.6),
    calibration=Calibration(),
    golden=Golden(input_sha256="0" * 64, probability=0.5, cam_mean=0.1),
    gate=GATE,
)
PASSED = Verdict(score=0.8, check="frontal", reason=None)


def lungs(*boxes):
    """A field of 20 x 20 cells with lungs in boxes of (top, bottom, left, right)."""
    field = np.zeros((20, 20), np.float32)
    for top, bottom, left, right in boxes or ((4, 16, 3, 8), (4, 16, 12, 17)):
        field[top:bottom, left:right] = 1.0
    return field


def classified(
    *,
    label="COVID",
    covid=None,
    negative=None,
    field=None,
    verdict=PASSED,
    flags=(),
    gated=True,
    further=None,
):
    empty = np.zeros((20, 20), np.float32)
    inside = lungs((6, 10, 4, 7))
    maps = [inside if negative is None else negative, inside if covid is None else covid]
    prepared = Prepared(
        claim=Claimed(
            result_id=1,
            image_id=1,
            sha256="0" * 64,
            path=Path("x"),
            file=OwnedFile.open(Path("/dev/null")),
            attempt=1,
            received_at=datetime.now(UTC),
            started_s=0.0,
        ),
        meta=RadiographMeta(
            format="PNG", rows=400, columns=400, bits_stored=8, photometric="MONOCHROME2"
        ),
        tensor=np.zeros((32, 32, 1), np.float32),
        preview=np.zeros((1, 1), np.uint8),
        shape=(400, 400),
        flags=flags,
    )
    return Classified(
        prepared=prepared,
        scores=Scores(
            probability=0.7,
            logit=0.8,
            label=label,
            cam=np.stack([empty if one is None else one for one in maps]),
            embedding=np.zeros(1, np.float32),
            further=further or {},
        ),
        gate=GateAnswer(verdict=verdict, lungs=lungs() if field is None else field)
        if gated
        else None,
    )


def test_a_whole_chest_with_its_map_inside_the_lungs_has_no_flag():
    found = assess(classified(), CONTRACT)
    assert found.flags == ()
    assert found.plausibility == Plausibility(gate_score=0.8, lung_area=0.3, lung_share=1.0)


def test_flags_are_merged_each_once_in_the_lists_order():
    flags = (Flag.TEXT_BURNT_IN, Flag.VIEW_UNKNOWN, Flag.TEXT_BURNT_IN)
    empty = np.zeros((20, 20), np.float32)
    found = assess(classified(flags=flags, covid=empty), CONTRACT)
    assert found.flags == (Flag.VIEW_UNKNOWN, Flag.TEXT_BURNT_IN, Flag.EMPTY_MAP)
    assert flags_in_order(reversed(list(Flag))) == tuple(Flag)


def test_without_a_gate_it_is_said_that_nothing_looked():
    found = assess(classified(gated=False), replace(CONTRACT, gate=None))
    assert found == replace(found, flags=(Flag.NOT_GATED,), plausibility=Plausibility())


def test_what_a_gate_would_have_refused_carries_its_reason():
    verdict = Verdict(score=0.1, check="frontal", reason=Reason.ROTATED)
    found = assess(classified(verdict=verdict), CONTRACT)
    assert found.flags == (Flag.ROTATED,)
    assert found.plausibility.gate_score == 0.1


OPACITY = Finding(name="opacity", calibration=Calibration(), threshold=0.4)
NODULE = Finding(name="nodule", calibration=Calibration(), threshold=0.4)


@pytest.mark.parametrize(
    ("label", "probability", "is_flagged"),
    [
        ("NEGATIVE", 0.3999, False),
        ("NEGATIVE", 0.4, True),
        ("NEGATIVE", 0.99, True),
        ("UNCERTAIN", 0.99, False),
        ("COVID", 0.99, False),
    ],
)
@pytest.mark.parametrize("gated", [True, False])
def test_an_opacity_under_a_negative_answer_is_flagged_from_its_threshold(
    label, probability, is_flagged, gated
):
    """Whatever other finding there is, and with or without a gate."""
    contract = replace(CONTRACT, findings=(NODULE, OPACITY))
    further = {"nodule": 0.0, "opacity": probability}
    found = assess(classified(label=label, further=further, gated=gated), contract)
    assert (Flag.OTHER_OPACITY in found.flags) is is_flagged


def test_another_finding_is_no_opacity():
    contract = replace(CONTRACT, findings=(NODULE,))
    found = assess(classified(label="NEGATIVE", further={"nodule": 0.99}), contract)
    assert found.flags == ()


class TestAttention:
    def split(self, inside: float):
        """A map of which a share lies in the left lung, the rest below the lungs."""
        cam = np.zeros((20, 20), np.float32)
        cam[8, 5], cam[18, 10] = inside, 1 - inside
        return cam

    @pytest.mark.parametrize("label", ["COVID", "UNCERTAIN"])
    @pytest.mark.parametrize(("inside", "is_flagged"), [(0.45, True), (0.55, False)])
    def test_less_than_half_of_the_map_inside_is_flagged(self, label, inside, is_flagged):
        found = assess(classified(label=label, covid=self.split(inside)), CONTRACT)
        assert (Flag.ATTENTION_OUTSIDE_LUNGS in found.flags) is is_flagged
        assert found.plausibility.lung_share == pytest.approx(inside)

    def test_a_negative_answer_is_not_flagged_and_keeps_the_share(self):
        found = assess(classified(label="NEGATIVE", covid=self.split(0.1)), CONTRACT)
        assert found.flags == ()
        assert found.plausibility.lung_share == pytest.approx(0.1)

    def test_an_empty_map_has_no_share_and_its_own_flag(self):
        empty = np.zeros((20, 20), np.float32)
        found = assess(classified(covid=empty), CONTRACT)
        assert (found.flags, found.plausibility.lung_share) == ((Flag.EMPTY_MAP,), None)
        assert assess(classified(label="NEGATIVE", covid=empty), CONTRACT).flags == ()
        negative = assess(classified(label="NEGATIVE", negative=empty), CONTRACT)
        assert negative.flags == (Flag.EMPTY_MAP,)

    def test_map_and_lungs_of_different_preprocessing_meet_on_the_radiograph(self):
        """The gate keeps the aspect ratio of a wide X-ray, the model stretches it."""
        wide = classified(covid=lungs((0, 10, 0, 20)), field=lungs((5, 10, 0, 20)))
        wide = replace(wide, prepared=replace(wide.prepared, shape=(200, 400)))
        # Rows 5 to 15 of the gate's field are the X-ray: its upper half is lung.
        found = assess(wide, CONTRACT)
        assert found.plausibility.lung_area == pytest.approx(0.5, abs=0.03)
        assert found.plausibility.lung_share == pytest.approx(1.0, abs=0.05)


class TestPartialLungs:
    @pytest.mark.parametrize(
        "boxes",
        [
            ((4, 16, 3, 8), (4, 16, 12, 17)),  # both lungs
            ((4, 16, 0, 8), (10, 13, 12, 20)),  # touching the sides along less than a quarter
            ((0, 16, 3, 5), (0, 16, 15, 17)),  # and the top
        ],
    )
    def test_both_lungs_in_sight_are_whole(self, boxes):
        field = lungs(*boxes)
        field[:, 0] = field[:, -1] = 0
        field[3:6, 0] = 1
        assert not has_partial_lungs(field >= 0.5, GATE.lung_area)

    @pytest.mark.parametrize(
        ("boxes", "why"),
        [
            (((4, 5, 3, 8), (4, 5, 12, 17)), "area below the least"),
            (((1, 19, 1, 19),), "area above the most"),
            (((4, 16, 2, 8), (4, 6, 12, 14)), "the right half holds 5 % of it"),
            (((0, 12, 3, 8), (0, 12, 12, 17)), "the tips are cut off along half of the top edge"),
            (((8, 20, 3, 8), (8, 20, 12, 17)), "the bases are cut off"),
            (((4, 16, 0, 7), (4, 16, 12, 17)), "the outer side is cut off"),
        ],
    )
    def test_what_is_missing_is_flagged(self, boxes, why):
        assert has_partial_lungs(lungs(*boxes) >= 0.5, GATE.lung_area), why
        assert Flag.PARTIAL_LUNGS in assess(classified(field=lungs(*boxes)), CONTRACT).flags

    def test_no_lungs_at_all_are_partial_whatever_the_bounds(self):
        assert has_partial_lungs(np.zeros((20, 20), bool), (0.0, 1.0))


def test_padding_is_no_part_of_the_picture():
    spec = PreprocessSpec(size_px=40, fit="pad")
    field = lungs((5, 15, 0, 20))
    assert content_of(field, (200, 400), spec).shape == (20, 40)
    assert lung_mask(field, (200, 400), spec)[2:-2].all()
    assert content_of(field, (400, 400), spec) is field
    assert content_of(field, (200, 400), PreprocessSpec(size_px=40)) is field
