"""The arithmetic of each check of the release gate, on made-up answers."""

import json
from pathlib import Path

import numpy as np
import pytest

from lungwatch.contract import Calibration, Decision
from lungwatch.errors import ConfigError
from lungwatch.preprocess import PreprocessSpec
from lungwatch.training.data.dataset import Sample
from lungwatch.training.data.scan import ScannedImage
from lungwatch.training.evaluation import release_gate as checks
from lungwatch.training.evaluation.metrics import Bootstrap
from lungwatch.training.evaluation.release_data import (
    CHANGES,
    Answers,
    Criteria,
    lung_hull,
    lungs_alone,
    without_lungs,
)
from lungwatch.training.evaluation.release_gate import (
    check_left_out,
    check_lesions,
    read_left_out_run,
)
from lungwatch.training.evaluation.scorers import Judgement

pytest.importorskip("sklearn", reason="needs scikit-learn (extra 'train')")

CRITERIA = Criteria()
QUICK = Bootstrap(resamples=100)
RNG = np.random.default_rng(4)


def answers(findings, logits, *, sources=None, views=None, adults=None, **others):
    """Answers on images that all look alike."""
    samples = [
        Sample(path=Path(f"{number}.png"), finding=finding, source=source)
        for number, (finding, source) in enumerate(
            zip(findings, sources or [""] * len(findings), strict=True)
        )
    ]
    scans = [
        ScannedImage(
            sample=sample,
            sha256="",
            format="PNG",
            rows=64,
            columns=64,
            mean=0.5,
            std=0.2,
            p01=0.0,
            p50=0.5,
            p99=1.0,
            border=0.0,
            text_marks=0,
            histogram=np.full(32, 1 / 32, np.float32),
            thumbnail=np.full((64, 64), 0.5, np.float32),
            patient_id=None,
        )
        for sample in samples
    ]
    return Answers(
        name="set",
        samples=samples,
        scans=scans,
        judgement=Judgement(
            name="model",
            preprocess=PreprocessSpec(size_px=32),
            calibration=Calibration(),
            decision=Decision(threshold=0.5, uncertain_low=0.5, uncertain_high=0.5),
        ),
        views=views or [""] * len(samples),
        adults=adults,
        logits=np.asarray(logits, np.float32),
        **others,
    )


def by_name(found):
    return {(check.criterion.name, check.on): check for check in found}


def test_within_source_and_view_are_measured_apart():
    """The score is the source and the view: perfect over all, chance within each."""
    findings = ["COVID"] * 36 + ["NORMAL"] * 12 + ["COVID"] * 12 + ["NORMAL"] * 36
    first = [*["a"] * 48, *["b"] * 48]
    views = [*["AP"] * 48, *["PA"] * 48]
    logits = [1.0] * 48 + [-1.0] * 48
    found = by_name(
        checks.check_discrimination(
            answers(findings, logits, sources=first, views=views), CRITERIA, QUICK
        )
    )
    assert found["auc", "set"].value == pytest.approx(0.75)
    # The view does as well: the figure proves nothing.
    assert found["auc", "set"].beside["view"] == pytest.approx(0.75)
    assert found["above_confounds", "set"].value == pytest.approx(0.0)
    assert found["above_confounds", "set"].verdict == "fail"
    for name, on in (("within_source", "set, a"), ("within_view", "set, AP")):
        assert (found[name, on].value, found[name, on].verdict) == (0.5, "fail")


def test_children_are_left_out_of_the_shares_of_adults():
    findings = ["COVID"] * 20 + ["NORMAL"] * 40 + ["OTHER_PNEUMONIA"] * 20
    logits = [2.0] * 18 + [-2.0] * 2 + [2.0] + [-2.0] * 19 + [2.0] * 20 + [2.0] * 5 + [-2.0] * 15
    adults = [True] * 40 + [False] * 20 + [True] * 20
    found = by_name(checks.check_calls(answers(findings, logits, adults=adults), CRITERIA, QUICK))
    values = {name: check.value for (name, _), check in found.items()}
    assert values == {"sensitivity": 0.9, "normal_called": 0.05, "other_called": 0.25}
    verdicts = [check.verdict for check in found.values()]
    assert verdicts == ["pass", "pass", "fail"]


def test_a_score_that_is_reliably_wrong_without_lungs_knows_as_much_as_one_that_is_right():
    findings = ["COVID"] * 20 + ["NORMAL"] * 20
    wrong = np.array([-1.0] * 20 + [1.0] * 20, np.float32)
    right = answers(findings, -wrong, black=wrong, alone=-wrong)
    found = by_name(checks.check_lungs(right, CRITERIA, QUICK))
    assert found["lungs_blacked_out", "set"].value == 1.0
    assert found["lungs_blacked_out", "set"].interval == (1.0, 1.0)
    assert found["lungs_blacked_out", "set"].verdict == "fail"
    assert found["lungs_alone", "set"].verdict == "pass"


def test_images_without_lungs_found_are_left_out_and_counted():
    findings = ["COVID"] * 20 + ["NORMAL"] * 20
    black = RNG.normal(size=40).astype(np.float32)
    black[::2] = np.nan
    found = by_name(
        checks.check_lungs(answers(findings, black * 0, black=black, alone=black), CRITERIA, QUICK)
    )
    assert found["lungs_blacked_out", "set"].beside["images with lungs found"] == 0.5
    none = by_name(checks.check_lungs(answers(findings, np.zeros(40)), CRITERIA, QUICK))
    assert none["lungs_alone", "set"].reason == "nothing finds lungs: no content gate"


def test_source_and_view_are_read_off_an_embedding_that_knows_them_and_off_no_other():
    findings = ["NORMAL"] * 80 + ["COVID"] * 80
    sources = [*["a"] * 40, *["b"] * 40] * 2
    views = ["AP", "PA"] * 80
    noise = RNG.normal(size=(160, 4)).astype(np.float32)
    knows = noise.copy()
    knows[:, 0] += 6 * np.array([source == "a" for source in sources])
    found = by_name(
        checks.check_embedding(
            answers(findings, np.zeros(160), sources=sources, views=views, embeddings=knows),
            CRITERIA,
            QUICK,
        )
    )
    assert found["source_in_embedding", "set, NORMAL"].value > 0.95
    assert found["source_in_embedding", "set, COVID"].verdict == "fail"
    assert found["view_in_embedding", "set, NORMAL"].value < 0.7
    few = by_name(
        checks.check_embedding(
            answers(findings[:50], np.zeros(50), sources=["a"] * 50, embeddings=noise[:50]),
            CRITERIA,
            QUICK,
        )
    )
    assert few["source_in_embedding", "set"].verdict == "not_measured"


def test_the_calibration_error_is_measured_within_each_source():
    """Right over all; in one source every probability is too low, in the other too high."""
    findings = (["COVID"] * 40 + ["NORMAL"] * 20) + (["COVID"] * 20 + ["NORMAL"] * 40)
    sources = [*["a"] * 60, *["b"] * 60]
    found = by_name(
        checks.check_calibration(answers(findings, np.zeros(120), sources=sources), CRITERIA, QUICK)
    )
    assert found["calibration", "set"].value == pytest.approx(0.0)
    assert found["calibration", "set, a"].value == pytest.approx(1 / 6, abs=1e-6)
    assert found["calibration", "set, b"].verdict == "fail"
    one_class = answers(["COVID"] * 60, np.zeros(60), sources=["a"] * 60)
    assert all(
        check.reason == "one class only"
        for check in checks.check_calibration(one_class, CRITERIA, QUICK)
    )


def test_decisions_and_scores_are_compared_with_those_of_the_same_images():
    logits = np.array([4.0] * 50 + [-4.0] * 50)
    changed = {"darker": (np.arange(0, 100, 2), np.array([4.0] * 20 + [-4.0] * 30, np.float32))}
    found = by_name(
        checks.check_changes(
            answers(["COVID"] * 50 + ["NORMAL"] * 50, logits, changed=changed), CRITERIA, QUICK
        )
    )
    flips = found["decisions_flipped", "set, darker"]
    assert (flips.value, flips.verdict) == (0.1, "fail")
    shift = found["score_shift", "set, darker"]
    assert shift.value == pytest.approx(0.1 * (1 - 2 / (1 + np.exp(4))), abs=1e-6)
    assert shift.beside["mean change with its sign"] == pytest.approx(-shift.value, abs=1e-6)


def test_wilsons_interval_is_the_textbooks():
    # Newcombe 1998, table I: 15 of 148.
    assert checks.wilson(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert checks.wilson(0, 20)[0] == 0.0


def test_figures_of_sources_left_out_are_taken_from_tables_by_what_they_say():
    tables = {
        "Lungs": {"row": {"mean": 0.9}},
        "x left out of training (ROC-AUC)": {
            "against NORMAL": {"ROC-AUC": 0.95, "low": 0.9, "high": 0.98},
            "against other pneumonias of x itself": {"ROC-AUC": 0.6},
            "against other pneumonias of the others": {"ROC-AUC": 0.8},
        },
        "Content gate with x left out of its training": {"kept": {"pictures": 9}},
    }
    found = by_name(check_left_out(tables, CRITERIA))
    assert set(found) == {("left_out_auc", "x"), ("left_out_within", "x")}
    assert found["left_out_auc", "x"].verdict == "pass"
    assert found["left_out_auc", "x"].interval == (0.9, 0.98)
    assert found["left_out_within", "x"].verdict == "fail"
    assert found["left_out_auc", "x"].beside["against other pneumonias of the others"] == 0.8
    assert [check.verdict for check in check_left_out({}, CRITERIA)] == ["not_measured"] * 2


def test_maps_on_opacities_are_judged_beside_chance():
    found = {
        "data": "drawn",
        "images": 40,
        "without_map": 2,
        "peak_on_lesion": 0.7,
        "peak_above_random_point": 0.3,
        "peak_above_other_map": 0.05,
        "map_on_lesion": 0.4,
        "likeness_of_maps": 0.2,
        "random_point_of_lungs": 0.34,
        "other_map_peak": 0.65,
        "other_map_share": None,
        "intervals": {
            "peak_above_random_point": [0.1, 0.5],
            "peak_above_other_map": [-0.05, 0.15],
        },
    }
    judged = by_name(check_lesions(found, "onnx is missing", CRITERIA))
    verdicts = {name: check.verdict for (name, _), check in judged.items()}
    assert verdicts == {
        "peak_on_lesion": "pass",
        "peak_above_random": "pass",
        "peak_above_other_map": "fail",
        "map_on_lesion": "fail",
        "likeness_of_maps": "pass",
        "map_shuffled_head": "not_measured",
        "map_shuffled_all": "not_measured",
    }
    assert judged["peak_on_lesion", "drawn"].beside["random_point_of_lungs"] == 0.34


def test_the_hull_of_a_lung_fills_what_an_opacity_took_from_it():
    mask = np.zeros((40, 40), bool)
    mask[8:32, 4:16] = mask[8:32, 24:36] = True
    ragged = mask.copy()
    ragged[16:24, 10:16] = False
    assert (lung_hull(ragged, (80, 80)) == lung_hull(mask, (80, 80))).all()
    hull = lung_hull(mask, (80, 80))
    # Both lungs stay apart, so that what lies between them stays to be seen.
    assert not hull[40, 40]
    assert hull[40, 20]
    pixels = np.full((80, 80), 0.5, np.float32)
    both = without_lungs(pixels, hull) + lungs_alone(pixels, hull)
    assert (both == pixels).all()
    assert (without_lungs(pixels, hull)[hull] == 0).all()


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_keeps_range_and_type_and_is_the_same_each_time(name):
    pixels = np.random.default_rng(1).random((60, 50)).astype(np.float32)
    before = pixels.copy()
    first, again = CHANGES[name](pixels), CHANGES[name](pixels)
    assert first.dtype == np.float32
    assert 0 <= first.min() <= first.max() <= 1
    assert (first == again).all()
    assert (pixels == before).all()
    assert first.shape != pixels.shape or not (first == pixels).all()


def test_a_run_trained_without_a_source_gives_such_a_table(tmp_path):
    probes = {
        "COVID vs NORMAL": {"roc_auc": 0.94},
        "COVID vs OTHER_PNEUMONIA": {"roc_auc": 0.8},
        "COVID vs OTHER_PNEUMONIA within x": {"roc_auc": 0.7},
        "COVID vs NORMAL within y": {"roc_auc": 0.5},
    }
    (tmp_path / "config.json").write_text(json.dumps({"data": {"left_out": "x"}}))
    (tmp_path / "metrics.json").write_text(json.dumps({"left_out": {"probes": probes}}))
    found = by_name(check_left_out(read_left_out_run(tmp_path), CRITERIA))
    values = {name: check.value for (name, _), check in found.items()}
    assert values == {"left_out_auc": 0.94, "left_out_within": 0.7}
    (tmp_path / "metrics.json").write_text("{}")
    with pytest.raises(ConfigError, match="not trained without a source"):
        read_left_out_run(tmp_path)
