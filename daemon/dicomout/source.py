"""The patient, study and image that a result belongs to, fit to be copied into new objects."""

import re
from collections.abc import Callable
from pathlib import Path

import pydicom
from pydicom.dataset import Dataset

from lungwatch.errors import LungwatchError
from lungwatch.imaging.attributes import code_of, text_of
from lungwatch.imaging.orientation import UPRIGHT, directions_of, is_known

_UID = re.compile(r"(0|[1-9][0-9]*)(\.(0|[1-9][0-9]*))+")
_DATE = re.compile(r"[0-9]{4}(0[1-9]|1[0-2])(0[1-9]|[12][0-9]|3[01])")
_TIME = re.compile(r"([01][0-9]|2[0-3])([0-5][0-9]([0-5][0-9](\.[0-9]{1,6})?)?)?")
_MAX_UID = 64

# Keyword, longest value (PS3.5 6.2), whether it may be cut: not what tells patients apart.
_TEXTS = (
    ("PatientID", 64, False),
    ("IssuerOfPatientID", 64, False),
    ("PatientName", 64, True),
    ("AccessionNumber", 16, False),
    ("StudyID", 16, True),
    ("StudyDescription", 64, True),
    ("ReferringPhysicianName", 64, True),
)
_UIDS = ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "SOPClassUID")
_DATES = ("PatientBirthDate", "StudyDate")
_NAMES = {"PatientName", "ReferringPhysicianName"}
_ALWAYS = {"PatientID", "PatientName", "AccessionNumber", "StudyID", "ReferringPhysicianName"}


class SourceUnusable(LungwatchError):  # noqa: N818 - a verdict on the file
    """The source cannot be answered in DICOM."""


def read_source(path: Path) -> Dataset:
    """Read what new objects copy from their source: no pixels, valid values alone.

    Parameters
    ----------
    path
        The original.

    Returns
    -------
    Dataset
        Patient and study modules (PS3.3 C.7.1.1, C.7.2.1) in UTF-8, the image's UIDs, modality,
        laterality and orientation. What is damaged and may be empty is empty.

    Raises
    ------
    SourceUnusable
        If it is no DICOM file, has no valid UIDs, or an identifier that does not fit.
    OSError
        If the file cannot be read.
    """
    try:
        source = pydicom.dcmread(path, stop_before_pixels=True, force=True)
    except OSError:
        raise
    # As with the reader: damaged bytes may raise anything at all.
    except Exception as error:
        raise SourceUnusable("the source is no DICOM file") from error
    copy = Dataset()
    copy.SpecificCharacterSet = "ISO_IR 192"
    for keyword in _UIDS:
        uid = text_of(source, keyword) or ""
        if len(uid) > _MAX_UID or not _UID.fullmatch(uid):
            raise SourceUnusable(f"the source has no valid {keyword}")
        setattr(copy, keyword, uid)
    for keyword, longest, may_be_cut in _TEXTS:
        text = _single_line(source, keyword)
        if not may_be_cut and len(text) > longest:
            raise SourceUnusable(f"the source's {keyword} has more than {longest} characters")
        if not may_be_cut and _values_of(source, keyword) > 1:
            raise SourceUnusable(f"the source's {keyword} has several values")
        if text or keyword in _ALWAYS:
            # The limit of a name is that of each of its groups (PS3.5 6.2.1).
            groups = text.split("=")[:3] if keyword in _NAMES else [text]
            setattr(copy, keyword, "=".join(_cut(group, longest) for group in groups))
    for keyword in _DATES:
        setattr(copy, keyword, _if(text_of(source, keyword), _DATE.fullmatch))
    copy.StudyTime = _if(text_of(source, "StudyTime"), _TIME.fullmatch)
    copy.PatientSex = _if(code_of(source, "PatientSex"), {"M", "F", "O"}.__contains__)
    copy.Modality = code_of(source, "Modality") or "OT"
    laterality = code_of(source, "ImageLaterality") or code_of(source, "Laterality")
    copy.Laterality = _if(laterality, {"R", "L", "B"}.__contains__)
    copy.PatientOrientation = _orientation(source)
    return copy


def _single_line(source: Dataset, keyword: str) -> str:
    text = "".join(c for c in text_of(source, keyword) or "" if c.isprintable())
    return text.replace("\\", " ").strip()


def _cut(text: str, longest: int) -> str:
    if len(text) <= longest:
        return text.strip()
    # The limit is of characters; a receiver that counts bytes is obliged as well.
    return text.encode()[:longest].decode(errors="ignore").strip()


def _values_of(source: Dataset, keyword: str) -> int:
    return source[keyword].VM if keyword in source else 0


def _orientation(source: Dataset) -> list[str]:
    """Row's and column's direction, empty where the source doesn't say (PS3.3 C.7.6.1.1.1).

    The reader turns a frontal image upright, and so is what is sent of it.
    """
    directions = directions_of(source)
    if directions is None:
        return []
    return list(UPRIGHT) if is_known(source) else list(directions)


def _if(value: str | None, is_valid: Callable[[str], object]) -> str:
    return value if value and is_valid(value) else ""
