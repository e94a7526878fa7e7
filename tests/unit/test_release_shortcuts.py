"""Models that learnt a shortcut fail the release gate; one that looks at the lungs does not."""

import pytest

from lungwatch.training.evaluation.metrics import Bootstrap
from lungwatch.training.evaluation.release_data import Criteria, collect_answers
from lungwatch.training.evaluation.release_gate import check_set

pytest.importorskip("sklearn", reason="needs scikit-learn (extra 'train')")
shortcuts = pytest.importorskip("tests.support.shortcuts")

SHORTCUTS = {
    *("auc", "within_source", "within_view", "above_confounds", "lungs_blacked_out"),
    *("lungs_alone", "source_in_embedding", "view_in_embedding"),
}


def verdicts(model, data):
    """The worst verdict of each check."""
    answers = collect_answers(model, data, None, gate=shortcuts.LungFinder())
    found = {}
    for check in check_set(answers, Criteria(), Bootstrap(resamples=200)):
        known = found.setdefault(check.criterion.name, check.verdict)
        if check.verdict == "fail" or known == "not_measured":
            found[check.criterion.name] = check.verdict
    return found


def test_a_model_trained_on_a_letter_in_the_corner_fails(tmp_path):
    data = shortcuts.write_set(tmp_path / "lettered", shortcuts.lettered)
    found = verdicts(shortcuts.train(shortcuts.lettered), data)
    # By its figure alone it would ship.
    assert found["auc"] == "pass"
    assert found["lungs_blacked_out"] == "fail"
    assert found["above_confounds"] == "fail"


def test_a_model_trained_on_the_view_fails(tmp_path):
    data = shortcuts.write_set(tmp_path / "views", shortcuts.mostly_ap, count=110)
    found = verdicts(shortcuts.train(shortcuts.independent, of="view"), data)
    failed = {name for name in SHORTCUTS if found[name] == "fail"}
    assert {"within_view", "view_in_embedding", "above_confounds", "lungs_blacked_out"} <= failed


def test_a_model_that_looks_at_the_lungs_passes_the_checks_on_shortcuts(tmp_path):
    data = shortcuts.write_set(tmp_path / "fair", shortcuts.independent)
    found = verdicts(shortcuts.train(shortcuts.independent, lungs_only=True), data)
    assert {name: found[name] for name in SHORTCUTS} == dict.fromkeys(SHORTCUTS, "pass")
