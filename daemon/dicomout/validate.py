"""The last look at an object before it leaves; what fails it is never sent."""

import re
from collections.abc import Iterator
from math import prod

from pydicom import config
from pydicom.dataset import Dataset
from pydicom.uid import (
    Comprehensive3DSRStorage,
    ComprehensiveSRStorage,
    ExplicitVRLittleEndian,
    SecondaryCaptureImageStorage,
)
from pydicom.valuerep import validate_value

from lungwatch import RESEARCH_USE_ONLY
from lungwatch.daemon.dicomout.facts import Kind, ResultFacts
from lungwatch.daemon.dicomout.validate_report import report_problems
from lungwatch.errors import LungwatchError

_UID = re.compile(r"(0|[1-9][0-9]*)(\.(0|[1-9][0-9]*))+")
_CLASSES: dict[Kind, set[str]] = {
    "sc": {SecondaryCaptureImageStorage},
    "sr": {Comprehensive3DSRStorage, ComprehensiveSRStorage},
}
# PS3.3: patient, study, series, equipment and SOP common modules; type 1, then type 2.
_NOT_EMPTY = (
    "SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "Modality",
    "SeriesNumber", "InstanceNumber", "Manufacturer",
)  # fmt: skip
_PRESENT = (
    "PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime",
    "ReferringPhysicianName", "StudyID", "AccessionNumber",
)  # fmt: skip
_PRESENT_IN_KIND: dict[Kind, tuple[str, ...]] = {
    "sc": ("PatientOrientation", "Laterality"),
    "sr": ("PerformedProcedureCodeSequence", "ReferencedPerformedProcedureStepSequence"),
}
_OF_KIND: dict[Kind, tuple[str, ...]] = {
    "sc": (
        "ConversionType", "ImageType", "Rows", "Columns", "SamplesPerPixel", "BitsAllocated",
        "BitsStored", "HighBit", "PixelRepresentation", "PhotometricInterpretation",
        "PlanarConfiguration", "PixelData", "SourceImageSequence", "ImageComments",
        "BurnedInAnnotation",
    ),
    "sr": (
        "ContentDate", "ContentTime", "CompletionFlag", "VerificationFlag", "ValueType",
        "ContinuityOfContent", "ConceptNameCodeSequence", "ContentTemplateSequence",
        "ContentSequence", "CurrentRequestedProcedureEvidenceSequence",
    ),
}  # fmt: skip


class InvalidObject(LungwatchError):  # noqa: N818 - a verdict on the object
    """An object does not conform to the standard; it is not sent."""


def validate(dataset: Dataset, kind: Kind, facts: ResultFacts, source: Dataset) -> None:
    """Check an object against the standard and against what it is to say.

    Parameters
    ----------
    dataset
        The object.
    kind
        What it is meant to be.
    facts, source
        What it is made of.

    Raises
    ------
    InvalidObject
        Naming attributes, never their values.
    """
    problems = [*_attributes(dataset, kind), *_values(dataset)]
    if not problems:
        problems += _same_study(dataset, source)
        problems += (
            _picture(dataset, source) if kind == "sc" else report_problems(dataset, facts, source)
        )
    if problems:
        raise InvalidObject(f"invalid {kind.upper()}: {'; '.join(problems[:5])}")


def _attributes(dataset: Dataset, kind: Kind) -> Iterator[str]:
    for keyword in (*_NOT_EMPTY, *_OF_KIND[kind]):
        if keyword not in dataset or dataset[keyword].is_empty:
            yield f"{keyword} is missing or empty"
    for keyword in (*_PRESENT, *_PRESENT_IN_KIND[kind]):
        if keyword not in dataset:
            yield f"{keyword} is missing"
    if dataset.get("SOPClassUID") not in _CLASSES[kind]:
        yield "SOPClassUID is another one"
    meta = getattr(dataset, "file_meta", Dataset())
    for keyword in ("SOPClassUID", "SOPInstanceUID"):
        if meta.get(f"MediaStorage{keyword}") != dataset.get(keyword):
            yield f"MediaStorage{keyword} is not {keyword}"
    if meta.get("TransferSyntaxUID") != ExplicitVRLittleEndian:
        yield "TransferSyntaxUID is not explicit VR little endian"


def _values(dataset: Dataset) -> Iterator[str]:
    """Every value within its representation's limits (PS3.5 6.2), at every depth."""
    for element in dataset.iterall():
        name = element.keyword or str(element.tag)
        values = element.value if element.VM > 1 else [element.value]
        for value in values if element.VR != "SQ" else ():
            if element.VR == "UI" and not (len(str(value)) <= 64 and _UID.fullmatch(str(value))):
                yield f"{name} is no UID"
            elif element.VR in {"CS", "SH", "LO", "DA", "TM", "PN", "IS", "DS", "AE", "AS"}:
                try:
                    validate_value(element.VR, str(value), config.RAISE, None)
                except ValueError:
                    yield f"{name} is no valid {element.VR}"


def _same_study(dataset: Dataset, source: Dataset) -> Iterator[str]:
    for keyword in ("StudyInstanceUID", "PatientID", "PatientName", "AccessionNumber"):
        if str(dataset.get(keyword)) != str(source.get(keyword)):
            yield f"{keyword} is not the source's"
    for keyword in ("SeriesInstanceUID", "SOPInstanceUID"):
        if dataset.get(keyword) == source.get(keyword):
            yield f"{keyword} is the source's"


def _picture(dataset: Dataset, source: Dataset) -> Iterator[str]:
    size = prod(
        (dataset.Rows, dataset.Columns, dataset.SamplesPerPixel, dataset.BitsAllocated // 8)
    )
    if len(dataset.PixelData) != size + size % 2:
        yield "PixelData is not as long as the image"
    if (dataset.PhotometricInterpretation, dataset.SamplesPerPixel) != ("RGB", 3):
        yield "PhotometricInterpretation is not RGB"
    if dataset.BitsAllocated != 8 or dataset.BitsStored != 8 or dataset.HighBit != 7:
        yield "the bits of a sample are not 8"
    referenced = [
        (reference.get("ReferencedSOPClassUID"), reference.get("ReferencedSOPInstanceUID"))
        for reference in dataset.SourceImageSequence
    ]
    if referenced != [(source.SOPClassUID, source.SOPInstanceUID)]:
        yield "SourceImageSequence names another image"
    if RESEARCH_USE_ONLY not in dataset.ImageComments:
        yield "ImageComments do not say that this is for research"
