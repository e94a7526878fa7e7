"""The last look at a report's content: TID 1500 (PS3.16) and what it is to say."""

from collections.abc import Iterator

from pydicom.dataset import Dataset

from lungwatch import RESEARCH_USE_ONLY
from lungwatch.daemon.dicomout.facts import ResultFacts

_REPORT, _TEMPLATE = "126000", "1500"
_PROBABILITY, _THRESHOLD, _COMMENT = "122157", "122411", "121106"
_ALGORITHM_NAME, _ALGORITHM_VERSION = "111001", "111003"
# Concept and value type of what TID 1500, 1002, 1501 and 4019 ask for, and of the finding.
MANDATORY_ITEMS = {
    ("121005", "CODE"): "observer type",
    ("121012", "UIDREF"): "device observer UID",
    ("121058", "CODE"): "procedure reported",
    ("126010", "CONTAINER"): "imaging measurements",
    ("125007", "CONTAINER"): "measurement group",
    ("112039", "TEXT"): "tracking identifier",
    ("112040", "UIDREF"): "tracking unique identifier",
    ("121071", "CODE"): "finding",
    ("840539006", "CODE"): "presence of the finding",
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
    numbers = {code: item for code, item in items if item.get("ValueType") == "NUM"}
    for code, value in ((_PROBABILITY, facts.probability), (_THRESHOLD, facts.threshold)):
        measured = numbers.get(code, Dataset()).get("MeasuredValueSequence") or [Dataset()]
        said = measured[0].get("NumericValue")
        if said is None or not 0.0 <= float(said) <= 1.0 or abs(float(said) - value) > 1e-6:
            yield f"measurement {code} is missing or another"
    texts = {(code, str(item.get("TextValue"))) for code, item in items if "TextValue" in item}
    for wanted in (
        (_COMMENT, RESEARCH_USE_ONLY),
        (_ALGORITHM_NAME, facts.model_name),
        (_ALGORITHM_VERSION, facts.model_version),
    ):
        if wanted not in texts:
            yield f"text {wanted[0]} is missing or another"
    concepts = {
        item.ConceptCodeSequence[0].get("CodeValue")
        for _, item in items
        if "ConceptCodeSequence" in item
    }
    if facts.label not in concepts:
        yield "the decision is missing"
    images = {
        reference.get("ReferencedSOPInstanceUID")
        for _, item in items
        for reference in item.get("ReferencedSOPSequence") or ()
    }
    if images != {source.SOPInstanceUID}:
        yield "the source image is not referenced"
    if list(_evidence(dataset)) != [(source.StudyInstanceUID, source.SOPInstanceUID)]:
        yield "the evidence is not the source image"


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
