"""The overlay as a Secondary Capture Image (PS3.3 A.8.1)."""

from typing import TYPE_CHECKING

import cv2
import numpy as np
from pydicom.dataset import Dataset

from lungwatch import RESEARCH_USE_ONLY
from lungwatch.daemon.dicomout.facts import ResultFacts, conclusion
from lungwatch.daemon.dicomout.uids import stable_uid

if TYPE_CHECKING:
    from highdicom.sc import SCImage

SERIES_NUMBER = 9801


def secondary_capture(facts: ResultFacts, source: Dataset, names: tuple[str, ...]) -> "SCImage":
    """Make a colour image of the overlay.

    Parameters
    ----------
    facts
        The result; its overlay is read.
    source
        Patient, study and image, as `read_source` returns them.
    names
        What the UIDs are derived from.

    Raises
    ------
    OSError
        If the overlay cannot be read.
    ValueError
        If the overlay is no picture.
    """
    from highdicom.sc import SCImage  # noqa: PLC0415 - of the extra `pacs`

    encoded = np.frombuffer(facts.overlay.read_bytes(), dtype=np.uint8)
    picture = cv2.imdecode(encoded, cv2.IMREAD_COLOR)
    if picture is None:
        raise ValueError("the overlay is no picture")
    image = SCImage(
        pixel_array=np.ascontiguousarray(cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)),
        photometric_interpretation="RGB",
        bits_allocated=8,
        coordinate_system="PATIENT",
        patient_orientation=("L", "F"),  # asked for; the source's takes its place below
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
