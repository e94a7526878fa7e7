"""The last look at a report's content: TID 1500 (PS3.16) and what it is to say."""

import math
from collections.abc import Iterator, Sequence

from pydicom.dataset import Dataset

from lungwatch import RESEARCH_USE_ONLY
from lungwatch.contract import COVID, OPACITY
from lungwatch.daemon.dicomout.facts import ResultFacts, conclusion
from lungwatch.daemon.dicomout.report import (
    COVID_19,
    DECISION,
    OPACITY_FOUND,
    PATTERN,
    PRESENCE,
    SCORES,
    finding_probability,
)

_REPORT, _TEMPLATE = "126000", "1500"
_COMMENT, _CONCLUSION, _FINDING = "121106", "121077", "121071"
_ROUNDING = 0.0005 + 1e-9
_ALGORITHM_NAME, _ALGORITHM_VERSION = "111001", "111003"
# Concept and value type of what TID 1500, 1002, 1501 and 4019 ask for, and of the answer.
MANDATORY_ITEMS = {
    ("121005", "CODE"): "observer type",
    ("121012", "UIDREF"): "device observer UID",
    ("121058", "CODE"): "procedure reported",
    ("126010", "CONTAINER"): "imaging measurements",
    ("125007", "CONTAINER"): "measurement group",
    ("112039", "TEXT"): "tracking identifier",
    ("112040", "UIDREF"): "tracking unique identifier",
    ("COVIDPATTERN", "CODE"): "presence of the pattern",
    ("111000", "CODE"): "algorithm family",
}


def report_problems(dataset: Dataset, facts: ResultFacts, source: Dataset) -> Iterator[str]:
    """Yield what is wrong with a report's tree, without any value of it."""
    if dataset.ConceptNameCodeSequence[0].get("CodeValue") != _REPORT:
        yield "the root is no imaging measurement report"
    if dataset.ContentTemplateSequence[0].get("TemplateIdentifier") != _TEMPLATE:
        yield "the template is not TID 1500"
    items = list(_items(dataset))
    there = {(code, str(item.get("ValueType"))) for code, item in items}
    for wanted_item, name in MANDATORY_ITEMS.items():
        if wanted_item not in there:
            yield f"the {name} is missing"
    if not all(item.get("RelationshipType") for _, item in items):
        yield "an item has no relationship to its parent"
    yield from _answer_problems(items, facts)
    yield from _number_problems(items, facts)
    yield from _text_problems(items, facts)
    images = {
        reference.get("ReferencedSOPInstanceUID")
        for _, item in items
        for reference in item.get("ReferencedSOPSequence") or ()
    }
    if images != {source.SOPInstanceUID}:
        yield "the source image is not referenced"
    if list(_evidence(dataset)) != [(source.StudyInstanceUID, source.SOPInstanceUID)]:
        yield "the evidence is not the source image"


def _answer_problems(items: Sequence[tuple[str, Dataset]], facts: ResultFacts) -> Iterator[str]:
    # A receiver takes what is headed as a finding for one, whatever stands below.
    found = [_value_of(item) for code, item in items if code == _FINDING]
    headed = [COVID_19.value] if facts.label == COVID else []
    if facts.other_opacity is not None:
        headed.append(OPACITY_FOUND.value)
    if found != headed:
        yield "there is a finding that was not made, or none that was"
    presence = [_value_of(item) for code, item in items if code == PATTERN.value]
    if presence != [PRESENCE[facts.label].value]:
        yield "the presence is missing or another"
    if [_value_of(item) for code, item in items if code == DECISION.value] != [facts.label]:
        yield "the decision is missing or another"


def _number_problems(items: Sequence[tuple[str, Dataset]], facts: ResultFacts) -> Iterator[str]:
    # The first group's: that of an opacity has a probability too.
    numbers = {code: item for code, item in reversed(items) if item.get("ValueType") == "NUM"}
    for field, text in facts.numbers.items():
        code = SCORES[field].value
        measured = numbers.get(code, Dataset()).get("MeasuredValueSequence") or [Dataset()]
        said = measured[0].get("NumericValue")
        off = math.inf if said is None else abs(float(said) - float(getattr(facts, field)))
        if not (off <= _ROUNDING and 0.0 <= float(said or 0) <= 1.0 and str(said) == text):
            yield f"measurement {code} is missing or another"
    told = [(code, _written(item)) for code, item in items if item.get("ValueType") == "NUM"]
    for name, text in facts.further.items():
        code = finding_probability(name).value
        if name == OPACITY and facts.other_opacity is not None:
            code = SCORES["probability"].value
        if (code, text) not in told:
            yield f"the probability of {name} is missing or another"


def _text_problems(items: Sequence[tuple[str, Dataset]], facts: ResultFacts) -> Iterator[str]:
    texts = {(code, str(item.get("TextValue"))) for code, item in items if "TextValue" in item}
    for wanted in (
        (_COMMENT, RESEARCH_USE_ONLY),
        (_CONCLUSION, conclusion(facts.label, facts.flags)),
        (_ALGORITHM_NAME, facts.model_name),
        (_ALGORITHM_VERSION, facts.model_version),
    ):
        if wanted not in texts:
            yield f"text {wanted[0]} is missing or another"
    groups = 1 + (facts.other_opacity is not None)
    if sum(code == _ALGORITHM_NAME for code, _ in items) != groups:
        yield "the algorithm is not named once a group"


def _written(item: Dataset) -> str:
    measured = item.get("MeasuredValueSequence") or [Dataset()]
    return str(measured[0].get("NumericValue"))


def _value_of(item: Dataset) -> str:
    value = item.get("ConceptCodeSequence") or [Dataset()]
    return str(value[0].get("CodeValue", ""))


def _evidence(dataset: Dataset) -> Iterator[tuple[str, str]]:
    for study in dataset.CurrentRequestedProcedureEvidenceSequence:
        for series in study.get("ReferencedSeriesSequence") or ():
            for reference in series.get("ReferencedSOPSequence") or ():
                yield (
                    str(study.get("StudyInstanceUID")),
                    str(reference.get("ReferencedSOPInstanceUID")),
                )


def _items(dataset: Dataset) -> Iterator[tuple[str, Dataset]]:
    for item in dataset.get("ContentSequence") or ():
        name = item.get("ConceptNameCodeSequence") or [Dataset()]
        yield str(name[0].get("CodeValue", "")), item
        yield from _items(item)
