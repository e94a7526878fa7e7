"""Each value is held to its bound in the right direction, and what is too few is not judged."""

import json
from pathlib import Path

import pytest

from lungwatch.errors import ConfigError
from lungwatch.training.evaluation.release_data import (
    CRITERIA,
    Criteria,
    overall,
    read_criteria,
)


def judged(name, value, interval=None, **others):
    return Criteria().judge(name, "here", value, interval, **others)


def test_every_criterion_has_a_name_of_its_own_and_a_reason():
    assert len({criterion.name for criterion in CRITERIA}) == len(CRITERIA)
    assert all(criterion.why and criterion.title for criterion in CRITERIA)


@pytest.mark.parametrize(
    ("name", "value", "verdict"),
    [
        ("auc", 0.90, "pass"),
        ("auc", 0.8999, "fail"),
        ("lungs_blacked_out", 0.60, "pass"),
        ("lungs_blacked_out", 0.61, "fail"),
        ("calibration", 0.05, "pass"),
        ("calibration", 0.06, "fail"),
    ],
)
def test_a_value_at_the_bound_passes_and_one_beyond_it_fails(name, value, verdict):
    assert judged(name, value).verdict == verdict


def test_the_lower_end_is_held_to_the_bound_where_the_criterion_says_so():
    assert judged("above_confounds", 0.1, (0.02, 0.2)).verdict == "pass"
    assert judged("above_confounds", 0.1, (-0.02, 0.2)).verdict == "fail"
    without = judged("above_confounds", 0.1)
    assert (without.verdict, without.reason) == ("not_measured", "no interval: --bootstrap is 0")


def test_too_few_cases_are_not_judged_and_the_reason_says_how_many():
    found = judged("auc", 0.99, (0.9, 1.0), cases=9)
    assert (found.verdict, found.value) == ("not_measured", None)
    assert found.reason == "too few: 9, at least 10 are needed"
    assert judged("auc", 0.99, (0.9, 1.0), cases=10).verdict == "pass"


def test_what_is_no_number_is_not_judged():
    assert judged("auc", float("nan")).verdict == "not_measured"
    assert judged("auc", None).reason == "cannot be computed"


def test_one_failure_fails_all_and_a_criterion_measured_nowhere_leaves_it_open():
    criteria = Criteria()
    passed, failed = judged("auc", 0.95), judged("auc", 0.5)
    skipped = criteria.skip("calibration", "here", "one class only")
    assert overall([passed]) == "pass"
    assert overall([passed, skipped, failed]) == "fail"
    assert overall([passed, skipped]) == "not_measured"
    # Too few in one source is no gap where another source has enough.
    assert overall([passed, skipped, judged("calibration", 0.01)]) == "pass"
    assert overall([]) == "not_measured"


def test_other_bounds_come_from_a_file_and_are_written_beside_the_value(tmp_path):
    file = tmp_path / "bounds.json"
    file.write_text(json.dumps({"auc": 0.8}))
    check = read_criteria(file).judge("auc", "here", 0.85)
    assert (check.verdict, check.to_dict()["bound"]) == ("pass", 0.8)
    assert read_criteria(None)["auc"].bound == 0.9


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("{", "not JSON"),
        ("[]", "not of the form"),
        ('{"aucs": 0.8}', "no criterion 'aucs'; nearest is 'auc'"),
        ('{"auc": "high"}', "auc is 'high', not a number"),
        ('{"auc": true}', "not a number"),
        ('{"auc": NaN}', "not a finite number"),
    ],
)
def test_bounds_that_are_none_are_refused(tmp_path, text, complaint):
    file = tmp_path / "bounds.json"
    file.write_text(text)
    with pytest.raises(ConfigError, match=complaint):
        read_criteria(file)


def test_the_document_has_the_table_of_the_code():
    document = (Path(__file__).parents[2] / "docs" / "release-gate.md").read_text(encoding="utf-8")
    for one in CRITERIA:
        end = ", lower end of the interval" if one.judged == "low" else ""
        bound = f"{'≥' if one.at_least else '≤'} {one.bound:g}{end}"
        line = f"| `{one.name}` | {one.title} | {bound} | {one.fewest} | {one.why} |"
        assert line in document
