"""DICOM objects of a result: de-identification, Secondary Capture, validation and encoding."""

import hashlib
import hmac
import io
import re
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import cv2
import numpy as np
import pydicom
from pydicom import config
from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage
from pydicom.valuerep import validate_value

from lungwatch import RESEARCH_USE_ONLY
from lungwatch.daemon.pacs.report import CLASS_UIDS, report_problems, structured_report
from lungwatch.daemon.pacs.source import (
    COPIED_UIDS,
    Kind,
    ReportClass,
    ResultFacts,
    SourceStudy,
    UnusableSourceError,
    conclusion,
    read_source,
    restore,
    stable_uid,
)
from lungwatch.db.deliveries import SentReport
from lungwatch.errors import LungwatchError, MissingExtraError

if TYPE_CHECKING:
    from highdicom.sc import SCImage


_UID = re.compile(r"(0|[1-9][0-9]*)(\.(0|[1-9][0-9]*))+")

_CLASSES: dict[Kind, set[str]] = {
    "sc": {str(SecondaryCaptureImageStorage)},
    "sr": set(CLASS_UIDS.values()),
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


class InvalidObjectError(LungwatchError):
    """An object does not conform to the standard; it is not sent."""


def validate(dataset: Dataset, kind: Kind, facts: ResultFacts, source: Dataset) -> None:
    """Check an object against the standard, and against the result and the source it is made of.

    Raises
    ------
    InvalidObjectError
        Naming attributes, never their values.
    """
    problems = [*_attributes(dataset, kind), *_values(dataset)]
    if not problems:
        problems += _same_study(dataset, source)
        problems += (
            _picture(dataset, source) if kind == "sc" else report_problems(dataset, facts, source)
        )
    if problems:
        raise InvalidObjectError(f"invalid {kind.upper()}: {'; '.join(problems[:5])}")


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


METHOD = (
    "lungwatch: identifiers replaced by keyed hashes",
    "names and dates removed or replaced by 1900-01-01",
    "pixels not cleaned",
)

# Stands where a date must be (PS3.15 table E.1-1, action D).
DUMMY_DATE = datetime(1900, 1, 1, tzinfo=UTC)

_EMPTIED = tuple(keyword for keyword in _PRESENT if keyword != "PatientID")

_REMOVED = ("IssuerOfPatientID", "StudyDescription")
_ID_DIGITS = 16


def deidentified(study: SourceStudy, key: bytes) -> SourceStudy:
    """Return the source's attributes without the patient (PS3.15 table E.1-1).

    Pixels are not cleaned: burnt-in letters stay, and the object says so.

    Parameters
    ----------
    key
        A secret. Equal keys give one patient and one study the same pseudonyms; without it
        nobody can find them by trying.
    """
    copy = deepcopy(study.attributes)
    for keyword in _EMPTIED:
        setattr(copy, keyword, "")
    for keyword in _REMOVED:
        if keyword in copy:
            delattr(copy, keyword)
    for keyword in COPIED_UIDS:
        setattr(copy, keyword, stable_uid("pseudonym", str(copy.get(keyword)), key=key))
    digest = hmac.new(key, f"patient:{study.patient}".encode(), hashlib.sha256)
    copy.PatientID = digest.hexdigest()[:_ID_DIGITS]
    copy.PatientIdentityRemoved = "YES"
    copy.DeidentificationMethod = list(METHOD)
    copy.LongitudinalTemporalInformationModified = "REMOVED"
    return replace(study, attributes=copy, verbatim={})


SERIES_NUMBER = 9801
_OTHER_OVERLAY = (
    "the overlay is not the one that was drawn for this result (its SHA-256 differs): see "
    "`lungwatch reconcile`, and restore it from a backup"
)


def secondary_capture(facts: ResultFacts, source: Dataset, names: tuple[str, ...]) -> "SCImage":
    """Make a Secondary Capture Image (PS3.3 A.8.1) of a result's overlay.

    Parameters
    ----------
    source
        Patient, study and image, as `read_source` returns them.
    names
        Parts that the UIDs are derived from.

    Raises
    ------
    InvalidObjectError
        If the overlay's SHA-256 is not the recorded one.
    OSError, ValueError
        If the overlay cannot be read, or is not an image.
    """
    from highdicom.sc import SCImage  # noqa: PLC0415 - of the extra `pacs`

    encoded = facts.overlay.read_bytes()
    if facts.overlay_sha256 not in (None, hashlib.sha256(encoded).hexdigest()):
        raise InvalidObjectError(_OTHER_OVERLAY)
    picture = cv2.imdecode(np.frombuffer(encoded, dtype=np.uint8), cv2.IMREAD_COLOR)
    if picture is None:
        raise ValueError("the overlay is not an image")
    image = SCImage(
        pixel_array=np.ascontiguousarray(cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)),
        photometric_interpretation="RGB",
        bits_allocated=8,
        coordinate_system="PATIENT",
        patient_orientation=("L", "F"),  # required here; replaced by the source's below
        study_instance_uid=source.StudyInstanceUID,
        series_instance_uid=stable_uid("series", *names),
        series_number=SERIES_NUMBER,
        sop_instance_uid=stable_uid("instance", *names),
        instance_number=1,
        manufacturer="lungwatch",
        patient_id=source.PatientID,
        patient_birth_date=source.PatientBirthDate or None,
        patient_sex=source.PatientSex or None,
        accession_number=source.AccessionNumber,
        study_id=source.StudyID,
        study_date=source.StudyDate or None,
        study_time=source.StudyTime or None,
    )
    image.PatientOrientation = source.PatientOrientation
    if len(image.PixelData) % 2:
        image.PixelData += b"\0"  # PS3.5 A.4: every value has an even length
    image.Modality = "OT"
    image.ConversionType = "WSD"
    image.ImageType = ["DERIVED", "SECONDARY"]
    image.DerivationDescription = (
        f"X-ray with the answer of {facts.model_name} {facts.model_version}. "
        f"{conclusion(facts.label, facts.flags)} {RESEARCH_USE_ONLY}"
    )
    image.ImageComments = RESEARCH_USE_ONLY
    reference = Dataset()
    reference.ReferencedSOPClassUID = source.SOPClassUID
    reference.ReferencedSOPInstanceUID = source.SOPInstanceUID
    image.SourceImageSequence = [reference]
    return image


_DESCRIPTIONS = {"sc": "lungwatch overlay", "sr": "lungwatch report"}


@dataclass(frozen=True, kw_only=True, eq=False)
class BuiltObject:
    """A valid object.

    Attributes
    ----------
    data
        A DICOM file (PS3.10) in explicit VR little endian; equal facts and sources give equal ones.
    """

    kind: Kind
    sop_class_uid: str
    sop_instance_uid: str
    data: bytes

    @cached_property
    def dataset(self) -> Dataset:
        """The parsed file."""
        return pydicom.dcmread(io.BytesIO(self.data))


def build_objects(
    facts: ResultFacts,
    source: Path | BinaryIO,
    kinds: Sequence[Kind] = ("sc", "sr"),
    sr: ReportClass = "comprehensive-3d",
    deidentify_key: bytes | None = None,
) -> list[BuiltObject]:
    """Build the DICOM objects of a result.

    Parameters
    ----------
    source
        The original file, or an open one.
    kinds
        Secondary Capture, Structured Report, or both.
    sr
        The report's class.
    deidentify_key
        The secret with which objects are made without the patient; None leaves patient and study
        as they are in the source.

    Raises
    ------
    UnusableSourceError
        If no DICOM object can be made for this source.
    InvalidObjectError
        If an object does not conform to the standard; it must not be sent.
    MissingExtraError
        If highdicom is not installed.
    OSError
        If the source or the overlay cannot be read.
    """
    try:
        import highdicom as _  # noqa: F401, PLC0415
    except ImportError as error:
        raise MissingExtraError("sending results to a PACS", "pacs") from error
    whole = read_source(source)
    secret = ""
    if deidentify_key is not None:
        whole = deidentified(whole, deidentify_key)
        secret = stable_uid("deidentified", key=deidentify_key)
    study = whole.attributes
    # highdicom quotes unusual names in warnings: they are set afterwards.
    nameless = deepcopy(study)
    nameless.PatientName = nameless.ReferringPhysicianName = ""
    built = []
    for kind in kinds:
        names = _names(kind, sr, study, (facts.sha256, facts.model_sha256), secret)
        try:
            dataset: Dataset = (
                secondary_capture(facts, nameless, names)
                if kind == "sc"
                else structured_report(facts, nameless, names, sr)
            )
        except (ValueError, TypeError, AttributeError) as error:
            raise UnusableSourceError(f"no {kind.upper()} can be made of this result") from error
        _complete(dataset, facts, study, kind)
        if kind == "sr" and facts.predecessor is not None:
            _name_predecessor(dataset, facts.predecessor, study, secret)
        validate(dataset, kind, facts, study)
        restore(dataset, whole)
        target = io.BytesIO()
        dataset.save_as(target, enforce_file_format=True)
        built.append(
            BuiltObject(
                kind=kind,
                sop_class_uid=str(dataset.SOPClassUID),
                sop_instance_uid=str(dataset.SOPInstanceUID),
                data=target.getvalue(),
            )
        )
    return built


def _names(
    kind: Kind, sr: ReportClass, study: Dataset, answer: tuple[str, str], secret: str
) -> tuple[str, ...]:
    """Return the parts of an object's UIDs; `answer` is the SHA-256 of the file and the model."""
    variant = sr if kind == "sr" else ""
    return (kind, variant, study.SOPInstanceUID, *answer, secret)


def _name_predecessor(
    dataset: Dataset, predecessor: SentReport, study: Dataset, secret: str
) -> None:
    """Reference the report that this one revises (PS3.3 C.17.2, Predecessor Documents Sequence).

    Its series and class are those that its own UID was derived with. A report derived otherwise,
    for example before de-identification was switched on, is another document and not referenced.
    """
    for report_class, sop_class_uid in CLASS_UIDS.items():
        answer = (predecessor.sha256, predecessor.model_sha256)
        names = _names("sr", report_class, study, answer, secret)
        if stable_uid("instance", *names) != predecessor.sop_instance_uid:
            continue
        instance, series, document = Dataset(), Dataset(), Dataset()
        instance.ReferencedSOPClassUID = sop_class_uid
        instance.ReferencedSOPInstanceUID = predecessor.sop_instance_uid
        series.SeriesInstanceUID = stable_uid("series", *names)
        series.ReferencedSOPSequence = [instance]
        document.StudyInstanceUID = study.StudyInstanceUID
        document.ReferencedSeriesSequence = [series]
        dataset.PredecessorDocumentsSequence = [document]


def _complete(dataset: Dataset, facts: ResultFacts, study: Dataset, kind: Kind) -> None:
    """Set what both kinds share, and the result's time in place of the current one."""
    is_clean = "PatientIdentityRemoved" in study
    # The day of the result reveals the day of the X-ray.
    at = DUMMY_DATE if is_clean else facts.finished_at.astimezone()
    for keyword in ("InstanceCreation", "Content", "Series"):
        setattr(dataset, f"{keyword}Date", at.strftime("%Y%m%d"))
        setattr(dataset, f"{keyword}Time", at.strftime("%H%M%S"))
    for equipment in dataset.get("ContributingEquipmentSequence") or ():
        equipment.ContributionDateTime = at.strftime("%Y%m%d%H%M%S")
    dataset.SpecificCharacterSet = "ISO_IR 192"
    dataset.SeriesDescription = f"{_DESCRIPTIONS[kind]} (research use only)"
    dataset.ManufacturerModelName = facts.model_name[:64]
    dataset.SoftwareVersions = facts.model_version[:64]
    dataset.InstitutionName = ""
    dataset.ContentQualification = "RESEARCH"
    for keyword in (
        "IssuerOfPatientID",
        "StudyDescription",
        "PatientIdentityRemoved",
        "DeidentificationMethod",
        "LongitudinalTemporalInformationModified",
    ):
        if keyword in study:
            setattr(dataset, keyword, study.get(keyword))
    # highdicom omits empty attributes, of which some are required (type 2).
    for keyword in _PRESENT:
        setattr(dataset, keyword, study.get(keyword) or "")
    if kind == "sc":
        # Conditional on a paired structure, which validators cannot rule out (PS3.3 C.7.3.1).
        dataset.Laterality = study.Laterality
        # Letters in the X-ray may name the patient; nothing has checked them.
        dataset.BurnedInAnnotation = "YES"
        dataset.DateOfSecondaryCapture = dataset.ContentDate
        dataset.TimeOfSecondaryCapture = dataset.ContentTime
