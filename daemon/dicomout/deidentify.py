"""Taking the patient out of what leaves, where that is configured.

The objects copy little; all of it that PS3.15 table E.1-1 names is emptied or replaced. The
picture is not cleaned: letters burnt into the X-ray stay, which is why it says so.
"""

import hashlib
import hmac
from copy import deepcopy
from dataclasses import replace
from datetime import UTC, datetime

from lungwatch.daemon.dicomout.source import SourceStudy
from lungwatch.daemon.dicomout.uids import stable_uid

METHOD = (
    "lungwatch: identifiers replaced by keyed hashes",
    "names and dates removed or replaced by 1900-01-01",
    "pixels not cleaned",
)
# Stands where a date must be (PS3.15 table E.1-1, action D).
DUMMY_DATE = datetime(1900, 1, 1, tzinfo=UTC)
_EMPTIED = (
    "PatientName",
    "PatientBirthDate",
    "PatientSex",
    "AccessionNumber",
    "StudyID",
    "StudyDate",
    "StudyTime",
    "ReferringPhysicianName",
)
_REMOVED = ("IssuerOfPatientID", "StudyDescription")
_HASHED = ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID")
_ID_DIGITS = 16


def deidentified(study: SourceStudy, key: bytes) -> SourceStudy:
    """Return the source's attributes without the patient.

    Parameters
    ----------
    study
        As `read_source` returns it.
    key
        A secret. Equal keys give one patient and one study the same pseudonyms, so that what
        belongs together stays together; without it nobody finds them by trying.
    """
    copy = deepcopy(study.attributes)
    for keyword in _EMPTIED:
        setattr(copy, keyword, "")
    for keyword in _REMOVED:
        if keyword in copy:
            delattr(copy, keyword)
    for keyword in _HASHED:
        setattr(copy, keyword, stable_uid("pseudonym", str(copy.get(keyword)), key=key))
    digest = hmac.new(key, f"patient:{study.patient}".encode(), hashlib.sha256)
    copy.PatientID = digest.hexdigest()[:_ID_DIGITS]
    copy.PatientIdentityRemoved = "YES"
    copy.DeidentificationMethod = list(METHOD)
    copy.LongitudinalTemporalInformationModified = "REMOVED"
    return replace(study, attributes=copy, verbatim={})
