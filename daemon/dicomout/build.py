"""Building of validated DICOM objects from a result."""

import io
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path

import pydicom
from pydicom.dataset import Dataset

from lungwatch.daemon.dicomout.deidentify import DUMMY_DATE, deidentified
from lungwatch.daemon.dicomout.facts import Kind, Predecessor, ReportClass, ResultFacts
from lungwatch.daemon.dicomout.report import CLASS_UIDS, structured_report
from lungwatch.daemon.dicomout.secondary_capture import secondary_capture
from lungwatch.daemon.dicomout.source import SourceUnusable, read_source, restore
from lungwatch.daemon.dicomout.uids import stable_uid
from lungwatch.daemon.dicomout.validate import validate
from lungwatch.errors import MissingExtraError

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

    def encode(self) -> bytes:
        """Return the bytes of the file."""
        return self.data

    @cached_property
    def dataset(self) -> Dataset:
        """What a receiver reads."""
        return pydicom.dcmread(io.BytesIO(self.data))


def build_objects(
    facts: ResultFacts,
    source: Path,
    kinds: Sequence[Kind] = ("sc", "sr"),
    sr: ReportClass = "comprehensive-3d",
    deidentify_key: bytes | None = None,
) -> list[BuiltObject]:
    """Build what is to be sent of a result.

    Parameters
    ----------
    facts
        The result.
    source
        The original file.
    kinds
        Secondary Capture, Structured Report, or both.
    sr
        The report's class.
    deidentify_key
        A secret: the objects are made without the patient. None leaves patient and study as
        they are in the source.

    Raises
    ------
    SourceUnusable
        If the source cannot be answered in DICOM.
    InvalidObject
        If an object would break the standard; it must not be sent.
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
    # highdicom warns of unusual names, quoting them; they are put in afterwards.
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
            raise SourceUnusable(f"no {kind.upper()} can be made of this result") from error
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
    """Return what an object's UIDs are derived from; `answer` is the file's and model's SHA-256."""
    variant = sr if kind == "sr" else ""
    return (kind, variant, study.SOPInstanceUID, *answer, secret)


def _name_predecessor(
    dataset: Dataset, predecessor: Predecessor, study: Dataset, secret: str
) -> None:
    """Reference the report that this one revises (PS3.3 C.17.2, Predecessor Documents Sequence).

    Its series and class are those that its own UID was derived with. A report that was derived
    otherwise, as before de-identification was switched on, is another document, and not named.
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
    """Put in what is alike for both, over the times of now that highdicom writes."""
    is_clean = "PatientIdentityRemoved" in study
    # The day of an answer tells the day of the X-ray.
    at = DUMMY_DATE if is_clean else facts.finished_at.astimezone()
    for keyword in ("InstanceCreation", "Content", "Series"):
        _date(dataset, keyword, at)
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
    # highdicom leaves out what is empty, of which some must be there (type 2).
    for keyword in (
        "PatientID",
        "AccessionNumber",
        "PatientName",
        "PatientBirthDate",
        "PatientSex",
        "ReferringPhysicianName",
        "StudyDate",
        "StudyTime",
        "StudyID",
    ):
        setattr(dataset, keyword, study.get(keyword) or "")
    if kind == "sc":
        # Conditional on a paired structure, which validators cannot rule out (PS3.3 C.7.3.1).
        dataset.Laterality = study.Laterality
        # Nobody has looked whether letters of the X-ray name the patient.
        dataset.BurnedInAnnotation = "YES"
        dataset.DateOfSecondaryCapture = dataset.ContentDate
        dataset.TimeOfSecondaryCapture = dataset.ContentTime


def _date(dataset: Dataset, what: str, at: datetime) -> None:
    setattr(dataset, f"{what}Date", at.strftime("%Y%m%d"))
    setattr(dataset, f"{what}Time", at.strftime("%H%M%S"))
