"""A model says all a runtime must know, and one that speaks otherwise is not run."""

import json
import math
from dataclasses import replace
from typing import Any, ClassVar

import pytest

from lungwatch.contract import (
    CONTRACT_VERSION,
    Calibration,
    Decision,
    Finding,
    GateContract,
    Golden,
    ModelContract,
)
from lungwatch.errors import Flag, ModelError, Reason
from lungwatch.preprocess import PreprocessSpec


@pytest.fixture
def contract() -> ModelContract:
    return ModelContract(
        name="baseline",
        version="1.0.0",
        family="cnn",
        preprocess=PreprocessSpec(size_px=160, fit="pad"),
        cam_side_px=10,
        embedding_size=256,
        decision=Decision(threshold=0.4, uncertain_low=0.3, uncertain_high=0.5),
        calibration=Calibration(slope=0.7, intercept=-0.1),
        golden=Golden(input_sha256="ab" * 32, probability=0.25, cam_mean=0.5),
        provenance={"seed": 1, "data": ["a", "b"]},
        metrics={"test": {"auc": 0.9}},
    )


def _changed(made: ModelContract, **changes: Any) -> str:
    return json.dumps(json.loads(made.to_json()) | changes)


class TestJson:
    def test_survives_the_way_through_json(self, contract: ModelContract) -> None:
        assert ModelContract.from_json(contract.to_json()) == contract

    def test_the_same_contract_gives_the_same_text(self, contract: ModelContract) -> None:
        assert contract.to_json() == ModelContract.from_json(contract.to_json()).to_json()

    def test_the_identity_is_name_and_version(self, contract: ModelContract) -> None:
        assert contract.id == "baseline-1.0.0"

    @pytest.mark.parametrize("version", [CONTRACT_VERSION + 1, 0, None, "1"])
    def test_another_contract_version_is_refused(
        self, contract: ModelContract, version: object
    ) -> None:
        with pytest.raises(ModelError, match="contract version"):
            ModelContract.from_json(_changed(contract, contract=version))

    @pytest.mark.parametrize(
        "part", [None, "preprocess", "decision", "calibration", "golden"], ids=str
    )
    def test_an_unknown_key_is_refused_by_name(
        self, contract: ModelContract, part: str | None
    ) -> None:
        values = json.loads(contract.to_json())
        (values[part] if part else values)["surprise"] = 1
        with pytest.raises(ModelError, match="surprise"):
            ModelContract.from_json(json.dumps(values))

    @pytest.mark.parametrize(
        "key", ["name", "preprocess", "decision", "calibration", "golden", "cam_side_px"]
    )
    def test_a_missing_key_is_refused_by_name(self, contract: ModelContract, key: str) -> None:
        values = json.loads(contract.to_json())
        del values[key]
        with pytest.raises(ModelError, match=key):
            ModelContract.from_json(json.dumps(values))

    @pytest.mark.parametrize("text", ["", "{", "[]", "null", "17", '"contract"'])
    def test_what_is_no_json_object_is_refused(self, text: str) -> None:
        with pytest.raises(ModelError, match="not"):
            ModelContract.from_json(text)

    @pytest.mark.parametrize("part", ["preprocess", "decision", "calibration", "golden"])
    @pytest.mark.parametrize("value", [None, 1, [1, 2], "text"])
    def test_a_part_that_is_no_object_is_refused(
        self, contract: ModelContract, part: str, value: object
    ) -> None:
        with pytest.raises(ModelError):
            ModelContract.from_json(_changed(contract, **{part: value}))

    def test_a_contract_of_the_first_version_called_the_negative_class_normal(
        self, contract: ModelContract
    ) -> None:
        labels = ["NORMAL", "COVID"]
        old = json.loads(_changed(contract, contract=1, labels=labels))
        del old["gate"], old["map_reference"], old["findings"], old["golden"]["findings"]
        assert ModelContract.from_json(json.dumps(old)) == contract
        with pytest.raises(ModelError, match="labels"):
            ModelContract.from_json(_changed(contract, labels=labels))

    def test_a_contract_of_the_second_version_has_covid_as_its_only_finding(
        self, contract: ModelContract
    ) -> None:
        old = json.loads(_changed(contract, contract=2))
        del old["findings"], old["golden"]["findings"]
        read = ModelContract.from_json(json.dumps(old))
        assert read == contract
        assert read.probabilities([]) == {}

    @pytest.mark.parametrize("labels", [["COVID", "NORMAL"], ["NORMAL", "PNEUMONIA"], []])
    def test_other_labels_or_another_order_are_refused(
        self, contract: ModelContract, labels: list[str]
    ) -> None:
        with pytest.raises(ModelError, match="labels"):
            ModelContract.from_json(_changed(contract, labels=labels))


class TestGate:
    GATE: ClassVar[dict[str, Any]] = {
        "preprocess": {"size_px": 64, "fit": "pad"},
        "checks": [
            {"name": "frontal", "threshold": 0.4, "reason": "not_frontal_chest"},
            {"name": "upright", "threshold": 0.6, "reason": "rotated"},
        ],
        "lungs_side_px": 16,
        "lung_area": [0.1, 0.6],
        "golden_scores": [0.9, 0.8],
        "golden_lung_area": 0.3,
    }

    def read(self, contract: ModelContract, **changes: object) -> GateContract:
        text = _changed(contract, gate=self.GATE | changes)
        gate = ModelContract.from_json(text).gate
        assert gate is not None
        return gate

    def test_survives_the_way_through_json(self, contract: ModelContract) -> None:
        gated = replace(contract, gate=self.read(contract))
        assert ModelContract.from_json(gated.to_json()) == gated

    @pytest.mark.parametrize(
        ("scores", "verdict"),
        [
            ((0.4, 0.6), ("frontal", 0.4, None)),
            ((0.9, 0.7), ("upright", 0.7, None)),
            ((0.3999, 0.9), ("frontal", 0.3999, Reason.NOT_FRONTAL_CHEST)),
            ((0.9, 0.5), ("upright", 0.5, Reason.ROTATED)),
            ((0.3, 0.1), ("frontal", 0.3, Reason.NOT_FRONTAL_CHEST)),
        ],
    )
    def test_the_first_check_below_its_threshold_decides(
        self,
        contract: ModelContract,
        scores: tuple[float, float],
        verdict: tuple[str, float, Reason | None],
    ) -> None:
        found = self.read(contract).verdict(scores)
        assert (found.check, found.score, found.reason) == verdict
        assert found.flag == (verdict[2] and Flag(verdict[2].value))

    @pytest.mark.parametrize("scores", [(0.5,), (0.5, math.nan), (0.5, 0.5, 0.5), (math.inf, 1)])
    def test_scores_that_are_not_what_it_says_are_no_verdict(
        self, contract: ModelContract, scores: tuple[float, ...]
    ) -> None:
        with pytest.raises(ModelError, match="scores"):
            self.read(contract).verdict(scores)

    @pytest.mark.parametrize(
        "changes",
        [
            {"checks": []},
            {"checks": [GATE["checks"][0]] * 2},
            {"checks": [GATE["checks"][0], GATE["checks"][1] | {"name": None}]},
            {"checks": [GATE["checks"][0], GATE["checks"][1] | {"reason": "truncated"}]},
            {"checks": [GATE["checks"][0], GATE["checks"][1] | {"threshold": 1.0}]},
            {"golden_scores": [0.9]},
            {"golden_scores": [0.9, "much"]},
            {"golden_scores": [0.9, math.nan]},
            {"golden_lung_area": None},
            {"lung_area": [0.6, 0.1]},
            {"lungs_side_px": 2},
            {"tolerance": math.inf},
            {"surprise": 1},
            {"preprocess": {"size_px": 64, "surprise": 1}},
        ],
        ids=str,
    )
    def test_a_section_that_makes_no_sense_is_refused(
        self, contract: ModelContract, changes: dict[str, Any]
    ) -> None:
        with pytest.raises(ModelError):
            self.read(contract, **changes)


class TestDecision:
    @pytest.mark.parametrize(
        ("probability", "label"),
        [
            (0.0, "NEGATIVE"),
            (0.2999, "NEGATIVE"),
            (0.3, "UNCERTAIN"),
            (0.4, "UNCERTAIN"),
            (0.4999, "UNCERTAIN"),
            (0.5, "COVID"),
            (1.0, "COVID"),
        ],
    )
    def test_between_the_bounds_the_model_abstains(self, probability: float, label: str) -> None:
        decision = Decision(threshold=0.4, uncertain_low=0.3, uncertain_high=0.5)
        assert decision.label(probability) == label

    @pytest.mark.parametrize(("probability", "label"), [(0.3999, "NEGATIVE"), (0.4, "COVID")])
    def test_equal_bounds_switch_abstention_off(self, probability: float, label: str) -> None:
        decision = Decision(threshold=0.4, uncertain_low=0.4, uncertain_high=0.4)
        assert decision.label(probability) == label

    @pytest.mark.parametrize(
        ("threshold", "low", "high"),
        [
            (0.0, 0.0, 0.0),
            (1.0, 1.0, 1.0),
            (0.4, 0.5, 0.6),
            (0.4, 0.2, 0.3),
            (0.4, -0.1, 0.5),
            (0.4, 0.3, 1.1),
            (float("nan"), 0.1, 0.2),
            (0.4, float("nan"), 0.5),
        ],
    )
    def test_bounds_that_make_no_sense_are_refused(
        self, threshold: float, low: float, high: float
    ) -> None:
        with pytest.raises(ModelError, match="decision"):
            Decision(threshold=threshold, uncertain_low=low, uncertain_high=high)


class TestCalibration:
    def test_the_default_is_the_plain_sigmoid(self) -> None:
        assert Calibration().probability(0.0) == 0.5
        assert Calibration().probability(2.0) == pytest.approx(0.8807970779778823)

    def test_scales_and_shifts_the_logit(self) -> None:
        calibration = Calibration(slope=0.5, intercept=1.0)
        assert calibration.probability(3.0) == pytest.approx(Calibration().probability(2.5))

    @pytest.mark.parametrize("logit", [-1e308, -1e4, -745.0, 745.0, 1e4, 1e308])
    def test_no_logit_overflows(self, logit: float) -> None:
        assert Calibration().probability(logit) == pytest.approx(float(logit > 0), abs=1e-300)

    @pytest.mark.parametrize(
        ("slope", "intercept"),
        [(0.0, 0.0), (-1.0, 0.0), (float("inf"), 0.0), (float("nan"), 0.0), (1.0, float("nan"))],
    )
    def test_a_curve_that_falls_or_is_none_is_refused(self, slope: float, intercept: float) -> None:
        with pytest.raises(ModelError, match="calibration"):
            Calibration(slope=slope, intercept=intercept)


class TestFindings:
    OPACITY = Finding(
        name="opacity", calibration=Calibration(slope=2.0, intercept=1.0), threshold=0.4
    )

    def _contract(self, contract: ModelContract, *findings: Finding) -> ModelContract:
        golden = replace(contract.golden, findings=tuple(0.5 for _ in findings))
        return replace(contract, findings=findings, golden=golden)

    def test_findings_survive_the_way_through_json(self, contract: ModelContract) -> None:
        made = self._contract(contract, self.OPACITY)
        assert ModelContract.from_json(made.to_json()) == made
        assert made.finding("opacity") == self.OPACITY
        assert made.finding("nodule") is None

    def test_every_finding_has_its_own_calibration(self, contract: ModelContract) -> None:
        nodule = replace(self.OPACITY, name="nodule", calibration=Calibration())
        made = self._contract(contract, self.OPACITY, nodule)
        found = made.probabilities([0.5, 0.5])
        assert found == {
            "opacity": pytest.approx(1 / (1 + math.exp(-2.0))),
            "nodule": pytest.approx(1 / (1 + math.exp(-0.5))),
        }

    @pytest.mark.parametrize("logits", [[], [0.0, 1.0], [math.nan], [math.inf]])
    def test_other_answers_than_the_contract_promises_are_refused(
        self, contract: ModelContract, logits: list[float]
    ) -> None:
        with pytest.raises(ModelError, match="findings"):
            self._contract(contract, self.OPACITY).probabilities(logits)

    def test_the_threshold_itself_is_present(self) -> None:
        assert self.OPACITY.is_present(0.4)
        assert not self.OPACITY.is_present(math.nextafter(0.4, 0))

    @pytest.mark.parametrize("name", ["covid", "", "Opacity", "two words", "1st", "a" * 15, None])
    def test_names_that_no_report_could_hold_are_refused(self, name: Any) -> None:
        with pytest.raises(ModelError, match="finding"):
            Finding(name=name, calibration=Calibration(), threshold=0.5)

    @pytest.mark.parametrize("values", [{"threshold": 0.0}, {"threshold": 1.0}])
    def test_a_threshold_that_decides_nothing_is_refused(self, values: dict[str, float]) -> None:
        with pytest.raises(ModelError, match="threshold"):
            replace(self.OPACITY, **values)

    def test_two_findings_of_one_name_are_refused(self, contract: ModelContract) -> None:
        made = self._contract(contract, self.OPACITY, self.OPACITY)
        with pytest.raises(ModelError, match="one name"):
            ModelContract.from_json(made.to_json())

    def test_a_finding_without_its_golden_answer_is_refused(self, contract: ModelContract) -> None:
        made = replace(contract, findings=(self.OPACITY,))
        with pytest.raises(ModelError, match="golden"):
            ModelContract.from_json(made.to_json())

    @pytest.mark.parametrize("findings", [None, 1, "text", [1], [{"name": "opacity"}]])
    def test_a_list_that_is_not_understood_is_refused(
        self, contract: ModelContract, findings: object
    ) -> None:
        with pytest.raises(ModelError):
            ModelContract.from_json(_changed(contract, findings=findings))
