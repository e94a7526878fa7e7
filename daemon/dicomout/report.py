"""The result as a Structured Report after TID 1500 (PS3.16), coded in SNOMED CT."""

from typing import TYPE_CHECKING

from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code

from lungwatch import RESEARCH_USE_ONLY
from lungwatch.daemon.dicomout.facts import ReportClass, ResultFacts
from lungwatch.daemon.dicomout.uids import stable_uid

if TYPE_CHECKING:
    from highdicom.sr import Comprehensive3DSR, ComprehensiveSR

SERIES_NUMBER = 9802
SCHEME = "99LUNGWATCH"
# 840539006 is of SNOMED CT's set for global patient use, newer than DICOM's dictionary of it.
COVID_19 = Code("840539006", "SCT", "COVID-19")
CHEST_X_RAY = Code("399208008", "SCT", "Plain chest X-ray")
DECISION = Code("DECISION", SCHEME, "Decision of the algorithm")
TRUST_FLAG = Code("TRUSTFLAG", SCHEME, "Trust flag")
# NEGATIVE says that the model found no COVID-19, nothing of other diseases.
PRESENCE = {
    "COVID": codes.SCT.Present,
    "NEGATIVE": codes.SCT.Absent,
    "UNCERTAIN": codes.SCT.Indeterminate,
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

    algorithm = sr.AlgorithmIdentification(
        name=facts.model_name,
        version=facts.model_version,
        family=codes.DCM.ArtificialIntelligence,
        manufacturer="lungwatch",
        parameters=[f"model SHA-256 {facts.model_sha256}", RESEARCH_USE_ONLY],
    )
    image = (source.SOPClassUID, source.SOPInstanceUID)
    measurements = [
        sr.Measurement(
            name=name,
            value=value,
            unit=codes.UCUM.NoUnits,
            algorithm_id=algorithm,
            referenced_images=[sr.SourceImageForMeasurement(*image)],
        )
        for name, value in (
            (codes.DCM.Probability, facts.probability),
            (codes.DCM.ThresholdValue, facts.threshold),
        )
    ]
    decision = Code(facts.label, SCHEME, facts.label)
    evaluations = [
        sr.QualitativeEvaluation(name=COVID_19, value=PRESENCE[facts.label]),
        sr.QualitativeEvaluation(name=DECISION, value=decision),
        *(
            sr.QualitativeEvaluation(name=TRUST_FLAG, value=Code(flag, SCHEME, flag[:64]))
            for flag in facts.flags
        ),
    ]
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
        imaging_measurements=[
            sr.MeasurementsAndQualitativeEvaluations(
                tracking_identifier=sr.TrackingIdentifier(
                    uid=stable_uid("tracking", *names), identifier=f"lungwatch {facts.sha256[:12]}"
                ),
                finding_type=COVID_19,
                algorithm_id=algorithm,
                finding_sites=[sr.FindingSite(codes.SCT.Chest)],
                measurements=measurements,
                qualitative_evaluations=evaluations,
                source_images=[sr.SourceImageForMeasurementGroup(*image)],
            )
        ],
    )
    root: Dataset = report[0]
    root.ContentSequence.append(
        sr.TextContentItem(
            name=codes.DCM.Comment,
            value=RESEARCH_USE_ONLY,
            relationship_type=sr.RelationshipTypeValues.CONTAINS,
        )
    )
    return root
