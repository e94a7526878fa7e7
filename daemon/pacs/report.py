"""Structured Report of a result after TID 1500 (PS3.16), coded in SNOMED CT, and its validation."""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code
from pydicom.uid import Comprehensive3DSRStorage, ComprehensiveSRStorage

from lungwatch import RESEARCH_USE_ONLY
from lungwatch.contract import COVID, NEGATIVE, OPACITY, UNCERTAIN, Label
from lungwatch.daemon.pacs.source import ReportClass, ResultFacts, conclusion, stable_uid
from lungwatch.errors import FLAGS, Flag

if TYPE_CHECKING:
    from highdicom.sr import Comprehensive3DSR, ComprehensiveSR, Measurement


SERIES_NUMBER = 9802
SCHEME = "99LUNGWATCH"
# 840539006 is of SNOMED CT's set for global patient use, newer than DICOM's dictionary of it.
COVID_19 = Code("840539006", "SCT", "COVID-19")
CHEST_X_RAY = Code("399208008", "SCT", "Plain chest X-ray")
# The model sees a pattern, not a disease: the disease's code heads only a finding, and an absent
# pattern is not written as an absent disease.
PATTERN = Code("COVIDPATTERN", SCHEME, "COVID-19 pattern")
# The RadLex term is not of the lungs alone: the finding's site is.
OPACITY_FOUND = Code("RID28530", "RADLEX", "opacity")
DECISION = Code("DECISION", SCHEME, "Decision of the algorithm")
TRUST_FLAG = Code("TRUSTFLAG", SCHEME, "Trust flag")

PRESENCE: dict[Label, Code] = {
    COVID: codes.SCT.Present,
    NEGATIVE: codes.SCT.Absent,
    UNCERTAIN: codes.SCT.Indeterminate,
}

SCORES = {
    "probability": Code("122157", "DCM", "Probability"),
    "threshold": Code("122411", "DCM", "Threshold Value"),
    "uncertain_from": Code("UNCERTAINFROM", SCHEME, "Lower bound of the uncertain band"),
    "uncertain_to": Code("UNCERTAINTO", SCHEME, "Upper bound of the uncertain band"),
}
"""Concepts of what is 0..1, by the field of `ResultFacts`."""
GATE_SCORE = Code("GATESCORE", SCHEME, "Content gate score")
LUNG_AREA = Code("LUNGAREA", SCHEME, "Share of the image that is lung")
LUNG_SHARE = Code("LUNGSHARE", SCHEME, "Share of the map inside the lungs")
_MEANING_LENGTH = 64  # of a code, PS3.5 6.2: LO

CLASS_UIDS: dict[ReportClass, str] = {
    "comprehensive-3d": str(Comprehensive3DSRStorage),
    "comprehensive": str(ComprehensiveSRStorage),
}

_CLASSES = {"comprehensive-3d": "Comprehensive3DSR", "comprehensive": "ComprehensiveSR"}


def structured_report(
    facts: ResultFacts, source: Dataset, names: tuple[str, ...], report_class: ReportClass
) -> "Comprehensive3DSR | ComprehensiveSR":
    """Make the report.

    Parameters
    ----------
    facts
        The result.
    source
        Patient, study and image, as `read_source` returns them.
    names
        What the UIDs are derived from.
    report_class
        Comprehensive 3D SR, or the older Comprehensive SR for a PACS that takes no other.
    """
    from highdicom import sr  # noqa: PLC0415 - of the extra `pacs`

    document = getattr(sr, _CLASSES[report_class])(
        evidence=[source],
        content=_content(facts, source, names),
        series_instance_uid=stable_uid("series", *names),
        series_number=SERIES_NUMBER,
        sop_instance_uid=stable_uid("instance", *names),
        instance_number=1,
        manufacturer="lungwatch",
        manufacturer_model_name=facts.model_name,
        software_versions=facts.model_version,
        is_complete=True,
        is_final=False,
        is_verified=False,
    )
    assert isinstance(document, sr.Comprehensive3DSR | sr.ComprehensiveSR)
    return document


def _content(facts: ResultFacts, source: Dataset, names: tuple[str, ...]) -> Dataset:
    from highdicom import sr  # noqa: PLC0415

    parameters = [f"model SHA-256 {facts.model_sha256}"]
    if facts.calibration is not None:
        parameters.append(f"site calibration {facts.calibration}")
    algorithm = sr.AlgorithmIdentification(
        name=facts.model_name,
        version=facts.model_version,
        family=codes.DCM.ArtificialIntelligence,
        manufacturer="lungwatch",
        parameters=[*parameters, RESEARCH_USE_ONLY],
    )

    def group(
        finding: Code | None,
        site: Code | None,
        measurements: Iterable["Measurement"],
        evaluations: Iterable[tuple[Code, Code]],
        of: tuple[str, ...] = (),
    ) -> sr.MeasurementsAndQualitativeEvaluations:
        return sr.MeasurementsAndQualitativeEvaluations(
            tracking_identifier=sr.TrackingIdentifier(
                uid=stable_uid("tracking", *of, *names),
                identifier=" ".join(("lungwatch", facts.sha256[:12], *of)),
            ),
            finding_type=finding,
            algorithm_id=algorithm,
            finding_sites=None if site is None else [sr.FindingSite(site)],
            measurements=list(measurements),
            qualitative_evaluations=[
                sr.QualitativeEvaluation(name=name, value=value) for name, value in evaluations
            ],
            source_images=[
                sr.SourceImageForMeasurementGroup(source.SOPClassUID, source.SOPInstanceUID)
            ],
        )

    # A negative or uncertain result has no finding, and nothing may be headed as one.
    finding = (COVID_19, codes.SCT.Chest) if facts.label == COVID else (None, None)
    groups = [group(finding[0], finding[1], _measurements(facts), _evaluations(facts))]
    if facts.other_opacity is not None:
        probability = _number(SCORES["probability"], facts.other_opacity, codes.UCUM.NoUnits)
        present = (OPACITY_FOUND, codes.SCT.Present)
        groups.append(
            group(OPACITY_FOUND, codes.SCT.Lung, [probability], [present], of=("opacity",))
        )
    report = sr.MeasurementReport(
        observation_context=sr.ObservationContext(
            observer_device_context=sr.ObserverContext(
                observer_type=codes.DCM.Device,
                observer_identifying_attributes=sr.DeviceObserverIdentifyingAttributes(
                    uid=stable_uid("device", facts.model_sha256),
                    name="lungwatch",
                    manufacturer_name="lungwatch",
                    model_name=f"{facts.model_name} {facts.model_version}",
                ),
            )
        ),
        procedure_reported=CHEST_X_RAY,
        title=codes.DCM.ImagingMeasurementReport,
        imaging_measurements=groups,
    )
    root: Dataset = report[0]
    for name, text in (
        (codes.DCM.Conclusion, conclusion(facts.label, facts.flags)),
        (codes.DCM.Comment, RESEARCH_USE_ONLY),
    ):
        root.ContentSequence.append(
            sr.TextContentItem(
                name=name, value=text, relationship_type=sr.RelationshipTypeValues.CONTAINS
            )
        )
    _separate(root)
    return root


def _separate(item: Dataset) -> None:
    """Have a container's items rendered one by one, each with its name.

    highdicom calls containers continuous text (PS3.3 C.18.8), of which viewers show the values
    alone: "0.031", "Absent", and not of what.
    """
    if item.ValueType == "CONTAINER":
        item.ContinuityOfContent = "SEPARATE"
    for child in item.get("ContentSequence") or ():
        _separate(child)


def _measurements(facts: ResultFacts) -> Iterator["Measurement"]:
    for field, text in facts.numbers.items():
        yield _number(SCORES[field], text, codes.UCUM.NoUnits)
    for name, text in facts.further.items():
        # A finding with a group of its own has its probability there.
        if name != OPACITY or facts.other_opacity is None:
            yield _number(finding_probability(name), text, codes.UCUM.NoUnits)
    if facts.gate_score is not None:
        yield _number(GATE_SCORE, f"{facts.gate_score:.3f}", codes.UCUM.NoUnits)
    if facts.lung_area is not None:
        yield _number(LUNG_AREA, f"{100 * facts.lung_area:.1f}", codes.UCUM.Percent)
    # A negative answer shows no map.
    if facts.lung_share is not None and facts.label != NEGATIVE:
        yield _number(LUNG_SHARE, f"{100 * facts.lung_share:.1f}", codes.UCUM.Percent)


def finding_probability(name: str) -> Code:
    """Return the concept of the probability of a finding beside COVID."""
    return Code(f"P_{name.upper()}", SCHEME, f"Probability of {name}")


def _number(name: Code, text: str, unit: Code) -> "Measurement":
    """Return a measurement whose value is written as given."""
    from highdicom import sr  # noqa: PLC0415

    measurement = sr.Measurement(name=name, value=float(text), unit=unit)
    (measured,) = measurement[0].MeasuredValueSequence
    measured.NumericValue = text
    # The floating point value (PS3.3 C.18.1) adds meaningless digits.
    del measured.FloatingPointValue
    return measurement


def _evaluations(facts: ResultFacts) -> Iterator[tuple[Code, Code]]:
    yield PATTERN, PRESENCE[facts.label]
    yield DECISION, Code(facts.label, SCHEME, facts.label)
    for flag in facts.flags:
        words = FLAGS[Flag(flag)] if flag in set(Flag) else flag
        yield TRUST_FLAG, Code(flag, SCHEME, words[:_MEANING_LENGTH])


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
    """Yield the problems of a report's tree, without any of its values."""
    if dataset.ConceptNameCodeSequence[0].get("CodeValue") != _REPORT:
        yield "the root is not an imaging measurement report"
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
    # A receiver takes anything headed as a finding for one, whatever it contains.
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
    # Of the first group: the group of an opacity has a probability too.
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
