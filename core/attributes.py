"""Attributes of a radiograph: each declared once, with its DICOM source and its outputs.

The reader, the messages of the decoding process, the columns of the database, JSON and CSV derive
from the fields of `RadiographMeta`. A new attribute is one field here and one migration.
"""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from datetime import UTC, datetime
from typing import Any, Literal

Kind = Literal["text", "code", "number", "date", "instant"]


@dataclass(frozen=True, kw_only=True)
class Attribute:
    """Source and outputs of one attribute.

    Attributes
    ----------
    keywords
        DICOM keywords; the first one that is stated counts. Those of group 0002 are read from the
        file meta information. An "instant" has two: a date and a time.
    kind
        "text" as stated; "code" in upper case, empty where there is none; "number", a whole one,
        0 where there is none; "date", YYYYMMDD, of a date or of a date and time; "instant", an
        aware datetime in UTC.
    is_indexed
        Whether results are looked up by it.
    listed_as
        Key in JSON and CSV lists of results; None for what only `results show` tells.
    """

    keywords: tuple[str, ...] = ()
    kind: Kind = "text"
    is_indexed: bool = False
    listed_as: str | None = None


def attribute(
    *keywords: str,
    kind: Kind = "text",
    is_indexed: bool = False,
    listed_as: str | None = None,
    is_required: bool = False,
) -> Any:  # noqa: ANN401 - like `dataclasses.field`, of the field's own type
    """Declare a field of `RadiographMeta`; see `Attribute`. It is None where nothing is stated."""
    declared = Attribute(keywords=keywords, kind=kind, is_indexed=is_indexed, listed_as=listed_as)
    default = MISSING if is_required else None
    return field(default=default, metadata={"attribute": declared})


@dataclass(frozen=True, kw_only=True)
class RadiographMeta:
    """What a file states about its image; None where it is silent.

    Attributes
    ----------
    format
        "DICOM", "PNG" or "JPEG".
    rows, columns
        Size of the stored image, in pixels; that of `Radiograph.pixels` differs where the
        file's pixels are not square, where the image was turned, or where a frame was cut off.
    bits_stored
        Significant bits of a stored sample.
    photometric
        Photometric Interpretation, or "MONOCHROME2" for grey PNG and JPEG.
    """

    format: str = attribute(is_required=True)
    rows: int = attribute("Rows", kind="number", is_required=True)
    columns: int = attribute("Columns", kind="number", is_required=True)
    bits_stored: int = attribute("BitsStored", kind="number", is_required=True)
    photometric: str = attribute("PhotometricInterpretation", kind="code", is_required=True)
    transfer_syntax: str | None = attribute("TransferSyntaxUID")
    patient_id: str | None = attribute("PatientID", is_indexed=True, listed_as="patient_id")
    patient_sex: str | None = attribute("PatientSex", listed_as="patient_sex")
    patient_age: str | None = attribute("PatientAge", listed_as="patient_age")
    accession: str | None = attribute("AccessionNumber", is_indexed=True, listed_as="accession")
    study_uid: str | None = attribute("StudyInstanceUID", is_indexed=True, listed_as="study_uid")
    series_uid: str | None = attribute("SeriesInstanceUID", listed_as="series_uid")
    sop_uid: str | None = attribute("SOPInstanceUID", is_indexed=True, listed_as="sop_uid")
    sop_class: str | None = attribute("SOPClassUID")
    modality: str | None = attribute("Modality")
    body_part: str | None = attribute("BodyPartExamined")
    view_position: str | None = attribute("ViewPosition", listed_as="view")
    study_date: str | None = attribute("StudyDate")
    study_time: datetime | None = attribute(
        "StudyDate", "StudyTime", kind="instant", listed_as="study_time"
    )
    series_date: str | None = attribute("SeriesDate")
    acquisition_date: str | None = attribute("AcquisitionDate", "AcquisitionDateTime", kind="date")
    manufacturer: str | None = attribute("Manufacturer")
    manufacturer_model: str | None = attribute("ManufacturerModelName")
    station: str | None = attribute("StationName", listed_as="station")
    institution: str | None = attribute("InstitutionName")
    sending_ae: str | None = attribute(
        "SendingApplicationEntityTitle", "SourceApplicationEntityTitle", listed_as="sending_ae"
    )


ATTRIBUTES: Mapping[str, Attribute] = {
    one.name: one.metadata["attribute"] for one in fields(RadiographMeta)
}
"""The fields of `RadiographMeta` by name, in their order."""


def meta_to_json(meta: RadiographMeta) -> dict[str, Any]:
    """Return what a file states as plain values for JSON; instants as ISO 8601."""
    values = {name: getattr(meta, name) for name in ATTRIBUTES}
    return {
        name: value.isoformat() if isinstance(value, datetime) else value
        for name, value in values.items()
    }


def meta_from_json(values: Mapping[str, Any]) -> RadiographMeta:
    """Read what `meta_to_json` returned.

    Raises
    ------
    KeyError, TypeError, ValueError
        If a name is not known or missing, or a value is not of its attribute's kind.
    """
    return RadiographMeta(**{name: _checked(name, value) for name, value in values.items()})


def _checked(name: str, value: object) -> Any:  # noqa: ANN401 - of the attribute's kind
    kind = ATTRIBUTES[name].kind
    if not isinstance(value, int if kind == "number" else str | None):
        raise TypeError(f"{name} is of the wrong type")
    if isinstance(value, int) and not is_storable(value):
        raise ValueError(f"{name} is out of range")
    if kind == "instant" and isinstance(value, str):
        return checked_instant(datetime.fromisoformat(value))
    return value


def is_storable(number: int) -> bool:
    """Return whether every database can hold a number: 32 bits with a sign."""
    return -(2**31) <= number < 2**31


def checked_instant(instant: datetime) -> datetime:
    """Return an instant in UTC, as every database and every time zone can represent it.

    Raises
    ------
    ValueError
        If it has no zone, or its year is not within 1800 to 2999.
    """
    if instant.tzinfo is None or not 1800 <= instant.year < 3000:
        raise ValueError("not an instant that can be stored")
    return instant.astimezone(UTC)
