"""Inputs of a DICOM object: the facts of a result, and the attributes of its source image.

Patient ID and UIDs decide where a PACS files an object and are copied as they are, valid or not.
Everything else that is not valid is left empty. Text beyond ASCII keeps its bytes and its
character set: what a receiver makes of the original it makes of the object.
"""

import hashlib
import hmac
import re
import unicodedata
import uuid
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import BinaryIO, Literal

import pydicom
from pydicom.charset import python_encoding
from pydicom.datadict import dictionary_VR
from pydicom.dataelem import DataElement, RawDataElement
from pydicom.dataset import Dataset
from pydicom.filewriter import correct_ambiguous_vr
from pydicom.tag import Tag

from lungwatch.contract import COVID_FINDING, OPACITY, Label, meaning
from lungwatch.daemon.overlay.text import decimal_score
from lungwatch.db.deliveries import SentReport
from lungwatch.errors import Flag, LungwatchError
from lungwatch.imaging.geometry import UPRIGHT, directions_of, is_orientation_known
from lungwatch.imaging.radiograph import code_of, text_of

_ROOT = "2.25."


def stable_uid(*parts: str, key: bytes = b"") -> str:
    """Derive a UID from parts, under the arc of UUIDs (PS3.5 B.2): at most 44 characters.

    Equal parts and keys give equal UIDs; a collision has a chance of 1 in 2**122.

    Parameters
    ----------
    key
        A secret, where the parts must not be found by trying.
    """
    # Lengths keep ("ab", "c") apart from ("a", "bc").
    text = "".join(f"{len(part)}:{part}" for part in ("lungwatch", *parts))
    digest = hmac.new(key, text.encode(), hashlib.sha256).digest()
    return f"{_ROOT}{uuid.UUID(bytes=digest[:16], version=5).int}"


Kind = Literal["sc", "sr"]
ReportClass = Literal["comprehensive-3d", "comprehensive"]


@dataclass(frozen=True, kw_only=True)
class ResultFacts:
    """Facts of one result that the objects state.

    Attributes
    ----------
    sha256
        Of the source file, in hexadecimal.
    label
        The decision.
    probability, threshold
        Calibrated, of COVID, 0..1.
    uncertain_from, uncertain_to
        Probabilities within [from, to) are UNCERTAIN; equal where the model never abstains, None
        in records of older versions.
    flags
        Flag codes (`lungwatch.errors.Flag`).
    findings
        Calibrated probability, 0..1, of each finding by name, COVID's included.
    gate_score, lung_area, lung_share
        Of the content gate, 0..1 (`lungwatch.contract`); None where they are not known.
    model_name, model_version, model_sha256
        The model that answered.
    finished_at
        With a zone; dates the objects.
    overlay
        The PNG that becomes the Secondary Capture.
    overlay_sha256
        Of its bytes as they were recorded; None where that is not known.
    calibration
        The site calibration that decided; None for the bundle's own.
    predecessor
        The report that this one revises, if there is one.
    """

    sha256: str
    label: Label
    probability: float
    threshold: float
    uncertain_from: float | None = None
    uncertain_to: float | None = None
    flags: tuple[str, ...]
    findings: Mapping[str, float] = field(default_factory=dict)
    gate_score: float | None = None
    lung_area: float | None = None
    lung_share: float | None = None
    model_name: str
    model_version: str
    model_sha256: str
    finished_at: datetime
    overlay: Path
    overlay_sha256: str | None = None
    calibration: str | None = None
    predecessor: SentReport | None = None

    @property
    def numbers(self) -> dict[str, str]:
        """Probability and bounds as the report writes them, by field."""
        names = ["threshold"]
        if self.uncertain_from is not None and self.uncertain_from != self.uncertain_to:
            names += ["uncertain_from", "uncertain_to"]
        bounds = [float(getattr(self, name)) for name in names]
        probability, printed = decimal_score(self.probability, bounds)
        return {"probability": probability, **dict(zip(names, printed, strict=True))}

    @property
    def further(self) -> dict[str, str]:
        """Probability of each finding beside COVID, as the report writes it, by name."""
        return {
            name: decimal_score(probability, ())[0]
            for name, probability in self.findings.items()
            if name != COVID_FINDING
        }

    @property
    def other_opacity(self) -> str | None:
        """The probability, as written, of an opacity under a negative answer; None without."""
        return self.further.get(OPACITY) if Flag.OTHER_OPACITY in self.flags else None


def conclusion(label: Label, flags: Collection[str] = ()) -> str:
    """Return the conclusion for a label and its flags, as a sentence."""
    return f"{label}: {meaning(label, flags)}."


_UID = re.compile(r"(0|[1-9][0-9]*)(\.(0|[1-9][0-9]*))+")
# As files have them: a component with a leading zero, or an empty one (PS3.5 9.1 allows neither).
_COPIED_UID = re.compile(r"[0-9][0-9.]*")
_DATE = re.compile(r"[0-9]{4}(0[1-9]|1[0-2])(0[1-9]|[12][0-9]|3[01])")
_TIME = re.compile(r"([01][0-9]|2[0-3])([0-5][0-9]([0-5][0-9](\.[0-9]{1,6})?)?)?")
_MAX_UID = 64
_MOST_BYTES = 1024


# Keyword and longest value (PS3.5 6.2).
_TEXTS = (
    ("PatientID", 64),
    ("IssuerOfPatientID", 64),
    ("PatientName", 64),
    ("AccessionNumber", 16),
    ("StudyID", 16),
    ("StudyDescription", 64),
    ("ReferringPhysicianName", 64),
)

# To cut one of these is to make another one: too long, they are left empty.
_IDENTIFIERS = {"IssuerOfPatientID", "AccessionNumber"}
COPIED_UIDS = ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID")
_DATES = ("PatientBirthDate", "StudyDate")
_NAMES = {"PatientName", "ReferringPhysicianName"}
_ALWAYS = {"PatientID", "PatientName", "AccessionNumber", "StudyID", "ReferringPhysicianName"}
# The default repertoire (PS3.3 C.12.1.1.2): ASCII, until an escape sequence says otherwise.
_DEFAULT_SETS = {"", "ISO_IR 6", "ISO 2022 IR 6"}
_FILLS_G1 = re.compile(rb"\x1b(?:[-)]|\$\))")


class UnusableSourceError(LungwatchError):
    """No DICOM object can be made for this source."""


@dataclass(frozen=True, kw_only=True, eq=False)
class SourceStudy:
    """Attributes that new objects copy from their source.

    Attributes
    ----------
    attributes
        Patient and study modules (PS3.3 C.7.1.1, C.7.2.1), the image's UIDs, modality, laterality
        and orientation: only valid values, in ASCII. Text in `verbatim` is empty here; a UID in
        `verbatim` has a placeholder here.
    verbatim
        Keyword to value, as its bytes are in the source.
    character_sets
        The source's Specific Character Set; none where it has none.
    patient
        Patient ID as text, for a pseudonym.
    """

    attributes: Dataset
    verbatim: Mapping[str, bytes]
    character_sets: tuple[str, ...]
    patient: str


def read_source(source_file: Path | BinaryIO) -> SourceStudy:
    """Read the attributes that new objects copy from their source, without pixels.

    Raises
    ------
    UnusableSourceError
        If it is not a DICOM file, or has no UIDs of digits and dots.
    OSError
        If the file cannot be read.
    """
    try:
        source = pydicom.dcmread(source_file, stop_before_pixels=True, force=True)
    except OSError:
        raise
    # Damaged bytes may raise any exception in pydicom.
    except Exception as error:
        raise UnusableSourceError("the source is not a DICOM file") from error
    copy = Dataset()
    verbatim: dict[str, bytes] = {}
    for keyword in (*COPIED_UIDS, "SOPClassUID"):
        uid = text_of(source, keyword) or ""
        pattern = _COPIED_UID if keyword in COPIED_UIDS else _UID
        if len(uid) > _MAX_UID or not pattern.fullmatch(uid):
            raise UnusableSourceError(f"the source has no usable {keyword}")
        if not _UID.fullmatch(uid):
            verbatim[keyword] = uid.encode()
            uid = stable_uid("stand-in", uid)
        setattr(copy, keyword, uid)
    sets = _character_sets(source)
    for keyword, longest in _TEXTS:
        # First, as any access decodes the value.
        raw = _bytes_of(source, keyword)
        text = _valid_text(keyword, raw, longest)
        if text is None:
            is_valid = _is_valid(raw, sets, text_of(source, keyword) or "", keyword, longest)
            if (is_valid or keyword == "PatientID") and len(raw) <= _MOST_BYTES:
                verbatim[keyword] = raw
        if text or keyword in _ALWAYS:
            setattr(copy, keyword, text or "")
    for keyword in _DATES:
        # ACR-NEMA wrote dots and colons (PS3.5 6.2, notes on DA and TM).
        setattr(copy, keyword, _if(_without(source, keyword, "."), _DATE.fullmatch))
    copy.StudyTime = _if(_without(source, "StudyTime", ":"), _TIME.fullmatch)
    copy.PatientSex = _if(code_of(source, "PatientSex"), {"M", "F", "O"}.__contains__)
    copy.Modality = code_of(source, "Modality") or "OT"
    laterality = code_of(source, "ImageLaterality") or code_of(source, "Laterality")
    copy.Laterality = _if(laterality, {"R", "L", "B"}.__contains__)
    copy.PatientOrientation = _orientation(source)
    return SourceStudy(
        attributes=copy,
        verbatim=verbatim,
        character_sets=sets,
        patient=text_of(source, "PatientID") or "",
    )


def restore(dataset: Dataset, study: SourceStudy) -> None:
    """Set the verbatim values in an object that is encoded next; any access would decode them.

    Parameters
    ----------
    dataset
        In explicit VR little endian, its own text in ASCII.
    """
    stand_ins = {
        str(study.attributes.get(keyword)): value.decode()
        for keyword, value in study.verbatim.items()
        if keyword in COPIED_UIDS
    }
    _replace_uids(dataset, stand_ins)
    texts = {key: raw for key, raw in study.verbatim.items() if key not in COPIED_UIDS}
    if not texts:
        return
    correct_ambiguous_vr(dataset, is_little_endian=True)
    if any(not raw.isascii() or b"\x1b" in raw for raw in texts.values()):
        if study.character_sets:
            dataset.SpecificCharacterSet = list(study.character_sets)
        else:
            del dataset.SpecificCharacterSet
    for keyword, raw in texts.items():
        tag = Tag(keyword)
        value = raw + b" " * (len(raw) % 2)
        dataset[tag] = RawDataElement(
            tag=tag,
            VR=dictionary_VR(tag),
            length=len(value),
            value=value,
            value_tell=0,
            is_implicit_VR=False,
            is_little_endian=True,
        )
    # Else pydicom decodes what is raw to encode it again.
    dataset.set_original_encoding(
        is_implicit_vr=False,
        is_little_endian=True,
        character_encoding=dataset._character_set,  # noqa: SLF001 - what it compares with
    )


def _replace_uids(dataset: Dataset, stand_ins: Mapping[str, str]) -> None:
    for element in dataset if stand_ins else ():
        if element.VR == "SQ":
            for item in element.value:
                _replace_uids(item, stand_ins)
        elif element.VR == "UI" and str(element.value) in stand_ins:
            uid = stand_ins[str(element.value)]
            dataset[element.tag] = DataElement(
                element.tag, "UI", uid, validation_mode=pydicom.config.IGNORE
            )


def _character_sets(source: Dataset) -> tuple[str, ...]:
    try:
        value = source.get("SpecificCharacterSet")
    # As in `text_of`.
    except Exception:
        return ()
    values = [value] if isinstance(value, str) else list(value or ())
    sets = tuple(str(one).strip() for one in values)
    return sets if any(sets) else ()


def _bytes_of(source: Dataset, keyword: str) -> bytes:
    """Return a value as it is in the file, without its padding."""
    element = source.get_item(Tag(keyword)) if keyword in source else None
    value = element.value if isinstance(element, RawDataElement) else None
    return value.strip(b" \0") if isinstance(value, bytes) else b""


def _valid_text(keyword: str, raw: bytes, longest: int) -> str | None:
    """Return a text of ASCII alone that fits, or is cut to fit; None for another one."""
    if not raw.isascii() or b"\x1b" in raw:
        return None
    text = "".join(c for c in raw.decode() if c.isprintable())
    if keyword == "PatientID" or keyword in _IDENTIFIERS:
        return text if len(text) <= longest and "\\" not in text else None
    text = text.replace("\\", " ").strip()
    # The limit of a name is that of each of its groups (PS3.5 6.2.1).
    groups = text.split("=")[:3] if keyword in _NAMES else [text]
    return "=".join(group[:longest].strip() for group in groups)


def _is_valid(raw: bytes, sets: tuple[str, ...], text: str, keyword: str, longest: int) -> bool:
    """Return whether bytes that are not ASCII are a valid value in these character sets.

    Parameters
    ----------
    text
        What pydicom decodes, with U+FFFD for what it cannot.
    """
    first = sets[0] if sets else ""
    groups = text.split("=") if keyword in _NAMES else [text]
    if (
        not set(sets) <= python_encoding.keys()
        or any(unicodedata.category(c) == "Cc" for c in text)
        or (b"\x1b" in raw and not any(one.startswith("ISO 2022") for one in sets))
        or "\ufffd" in text
        or max(map(len, groups)) > longest
        or len(groups) > 3
    ):
        return False
    if first in _DEFAULT_SETS:
        return _FILLS_G1.split(raw, maxsplit=1)[0].isascii()
    if b"\x1b" in raw:
        return True
    try:
        raw.decode(python_encoding[first])
    except (UnicodeDecodeError, LookupError):
        return False
    return True


def _without(source: Dataset, keyword: str, separator: str) -> str:
    return (text_of(source, keyword) or "").replace(separator, "", 2)


def _orientation(source: Dataset) -> list[str]:
    """Row's and column's direction, empty where the source doesn't say (PS3.3 C.7.6.1.1.1).

    The reader turns a frontal image upright, and so is what is sent of it.
    """
    directions = directions_of(source)
    if directions is None:
        return []
    return list(UPRIGHT) if is_orientation_known(source) else list(directions)


def _if(value: str | None, is_valid: Callable[[str], object]) -> str:
    return value if value and is_valid(value) else ""
