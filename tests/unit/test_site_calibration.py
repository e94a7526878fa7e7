"""A site's calibration: what its error promises, what it refuses, and its record."""

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest

from lungwatch.bundle import (
    SiteCalibration,
    calibration_path,
    other_builds,
    read_calibration,
    remove_calibration,
    write_calibration,
)
from lungwatch.contract import COVID, NEGATIVE, UNCERTAIN, Calibration, Decision
from lungwatch.daemon.pipeline.model import Classifier, find_bundle
from lungwatch.errors import ModelError
from lungwatch.models import SHIPPED_DEFAULT
from lungwatch.training.evaluation.calibration import (
    CannotCalibrateError,
    calibrate_site,
    conformal_band,
    decide,
    least_cases,
)

MADE = datetime(2026, 11, 26, 12, 0, 0, 123456, tzinfo=UTC)
MODEL = "guided-1.1.0"
DIGEST = "ab" * 32


def cases(covid: int, other: int, *, apart: float, seed: int = 0):
    """Targets and logits of a site whose scores lie elsewhere than the model was fitted for."""
    rng = np.random.default_rng(seed)
    logits = np.concatenate([rng.normal(apart, 1, covid), rng.normal(0, 1, other)])
    return np.repeat([1, 0], [covid, other]), 2.5 * logits + 3.0


def make(targets, logits, *, error: float = 0.05) -> SiteCalibration:
    return calibrate_site(
        targets=targets,
        logits=logits,
        error=error,
        model=MODEL,
        model_sha256=DIGEST,
        made_at=MADE,
        made_with="1.2.3",
    )


@pytest.mark.parametrize("error", [0.05, 0.1, 0.2])
@pytest.mark.parametrize("apart", [0.5, 1.5, 4.0])
def test_the_stated_error_holds_over_a_thousand_resamples_in_each_class(error, apart):
    rng = np.random.default_rng(1)
    wrong = np.zeros((1000, 2))
    for number in range(len(wrong)):
        targets, logits = cases(60, 90, apart=apart, seed=number + 10)
        covid_from, other_to = conformal_band(targets, logits, error)
        covid = 2.5 * rng.normal(apart, 1, 200) + 3.0
        other = 2.5 * rng.normal(0, 1, 200) + 3.0
        wrong[number] = (covid < covid_from).mean(), (other > other_to).mean()
    standard_error = wrong.std(axis=0) / np.sqrt(len(wrong))
    assert (wrong.mean(axis=0) <= error + 3 * standard_error).all()


def test_labels_err_no_more_than_the_band_allows():
    targets, logits = cases(80, 120, apart=1.5)
    calibration, decision = decide(targets, logits, 0.05)
    labels = [decision.label(calibration.probability(logit)) for logit in logits]
    missed = sum(label == NEGATIVE for label in labels[:80])
    false = sum(label == COVID for label in labels[80:])
    # floor(0.05 x 81) - 1 and floor(0.05 x 121) - 1 lie beyond the bounds.
    assert (missed, false) == (3, 5)
    assert UNCERTAIN in labels


def test_classes_that_are_apart_need_no_abstention():
    targets, logits = cases(40, 40, apart=20.0)
    record = make(targets, logits)
    assert record.abstention == 0
    assert record.decision.uncertain_low == record.decision.uncertain_high
    labels = [record.decision.label(record.calibration.probability(z)) for z in logits]
    assert labels == [COVID] * 40 + [NEGATIVE] * 40


def test_the_probability_follows_the_site():
    """Scores that the model's own calibration would call COVID, all of them."""
    targets, logits = cases(200, 200, apart=1.5)
    assert np.mean(1 / (1 + np.exp(-logits[200:]))) > 0.8
    record = make(targets, logits)
    assert record.ece < 0.05
    assert record.decision.threshold == pytest.approx(0.5, abs=0.15)
    assert record.abstention == pytest.approx(
        np.mean(
            [record.decision.label(record.calibration.probability(z)) == UNCERTAIN for z in logits]
        )
    )


@pytest.mark.parametrize(
    ("covid", "other", "error", "needed"),
    [(29, 200, 0.05, 30), (200, 29, 0.05, 30), (60, 60, 0.01, 99), (0, 50, 0.2, 30)],
)
def test_too_few_cases_of_a_class_are_refused(covid, other, error, needed):
    targets, logits = cases(covid, other, apart=2.0)
    with pytest.raises(CannotCalibrateError, match=f"needs {needed} of each"):
        make(targets, logits, error=error)


@pytest.mark.parametrize("error", [0.01, 0.02, 0.03, 0.05, 0.1])
def test_the_least_number_is_what_the_quantile_needs(error):
    count = least_cases(error)
    assert np.ceil((count + 1) * (1 - error) - 1e-9) <= count
    if count > 30:
        assert np.ceil(count * (1 - error) - 1e-9) > count - 1


def test_scores_that_fall_with_the_truth_are_refused():
    targets, logits = cases(50, 50, apart=2.0)
    with pytest.raises(CannotCalibrateError, match="do not rise with the truth"):
        make(targets, -logits)


class TestRecord:
    @pytest.fixture
    def record(self):
        return make(*cases(40, 60, apart=1.5))

    def test_it_comes_back_as_it_was_written(self, record, tmp_path):
        path = write_calibration(tmp_path / "calibrations", record)
        assert path == calibration_path(tmp_path / "calibrations", MODEL, DIGEST)
        assert path.name == "guided-1.1.0-abababababab.json"
        assert read_calibration(path.parent, MODEL, DIGEST) == record
        assert json.loads(path.read_text())["id"] == record.id
        assert record.id.startswith("2026-11-26T12:00:00Z-")

    def test_there_is_none(self, tmp_path):
        assert read_calibration(tmp_path / "calibrations", MODEL, DIGEST) is None

    def test_one_that_was_altered_is_refused(self, record, tmp_path):
        path = write_calibration(tmp_path, record)
        values = json.loads(path.read_text())
        values["decision"]["threshold"] = values["decision"]["uncertain_high"]
        path.write_text(json.dumps(values))
        with pytest.raises(ModelError, match="altered since it was made; make it again"):
            read_calibration(tmp_path, MODEL, DIGEST)

    @pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 2}', "\x00", '{"format": 1}'])
    def test_one_that_is_damaged_is_refused(self, record, tmp_path, text):
        path = write_calibration(tmp_path, record)
        path.write_text(text)
        with pytest.raises(ModelError, match="is refused"):
            read_calibration(tmp_path, MODEL, DIGEST)

    def test_one_of_another_model_file_is_refused(self, record, tmp_path):
        foreign = replace(record, model_sha256="ab" * 6 + "cd" * 26)
        assert write_calibration(tmp_path, foreign).name == "guided-1.1.0-abababababab.json"
        with pytest.raises(ModelError, match=r"not to this file of guided-1\.1\.0"):
            read_calibration(tmp_path, MODEL, DIGEST)

    def test_another_build_of_the_model_has_its_own(self, record, tmp_path):
        path = write_calibration(tmp_path, replace(record, model_sha256="cd" * 32))
        assert read_calibration(tmp_path, MODEL, DIGEST) is None
        assert other_builds(tmp_path, MODEL, DIGEST) == [path]

    def test_a_new_one_keeps_the_former_which_rows_name(self, record, tmp_path):
        later = replace(record, made_at=record.made_at + timedelta(days=1))
        write_calibration(tmp_path, record)
        write_calibration(tmp_path, later)
        assert read_calibration(tmp_path, MODEL, DIGEST) == later
        assert remove_calibration(tmp_path, MODEL, DIGEST)
        assert not remove_calibration(tmp_path, MODEL, DIGEST)
        assert read_calibration(tmp_path, MODEL, DIGEST) is None
        kept = {
            SiteCalibration.from_json(path.read_text()) for path in (tmp_path / "former").iterdir()
        }
        assert kept == {record, later}

    def test_it_holds_counts_and_nothing_of_a_case(self, record):
        assert set(json.loads(record.to_json())) == {
            *("format", "id", "model", "model_sha256", "made_at", "made_with", "covid_cases"),
            *("other_cases", "error", "abstention", "covid_abstention", "other_abstention"),
            *("roc_auc", "ece", "method", "calibration", "decision"),
        }


def test_a_calibrated_model_keeps_its_gate_and_its_reference_for_drift():
    """Without the reference a calibrated site would record no components, and see no drift."""
    shipped = Classifier.load(find_bundle(SHIPPED_DEFAULT))
    shipped.drift = object()  # no shipped bundle has one
    record = make(*cases(40, 60, apart=1.5))
    calibrated = shipped.calibrated(record)
    assert (calibrated.gate, calibrated.drift) == (shipped.gate, shipped.drift)
    assert calibrated.contract.calibration == record.calibration
    assert calibrated.contract.decision == record.decision


def test_an_id_tells_what_decides():
    record = make(*cases(40, 60, apart=1.5))
    for changes in (
        {"calibration": Calibration(slope=2.0)},
        {"decision": Decision(threshold=0.5, uncertain_low=0.5, uncertain_high=0.5)},
        {"error": 0.1},
    ):
        assert replace(record, **changes).id != record.id
