"""Radiograph: a decoded X-ray, and the attributes that its file states."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileDataset

from lungwatch.errors import Flag

FloatImage = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Box:
    """Rows `top` to `bottom` and columns `left` to `right`, the latter of each excluded."""

    top: int
    bottom: int
    left: int
    right: int

    def of(self, pixels: FloatImage) -> FloatImage:
        """Return this part of an image, a view."""
        return pixels[self.top : self.bottom, self.left : self.right]


@dataclass(frozen=True, kw_only=True)
class RadiographMeta:
    """What the file says about the image; everything optional is None when it is silent.

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
        PhotometricInterpretation (0028,0004), or "MONOCHROME2" for grey PNG and JPEG.
    transfer_syntax
        UID of the transfer syntax (0002,0010); None for PNG and JPEG.
    patient_id, accession, study_uid, series_uid, sop_uid, sop_class
        (0010,0020), (0008,0050), (0020,000D), (0020,000E), (0008,0018), (0008,0016).
    modality, body_part, view_position
        (0008,0060), (0018,0015), (0018,5101).
    study_date, series_date, acquisition_date
        (0008,0020), (0008,0021), and (0008,0022) or the day of (0008,002A), as YYYYMMDD.
    manufacturer, manufacturer_model, station, institution
        (0008,0070), (0008,1090), (0008,1010), (0008,0080).
    """

    format: str
    rows: int
    columns: int
    bits_stored: int
    photometric: str
    transfer_syntax: str | None = None
    patient_id: str | None = None
    accession: str | None = None
    study_uid: str | None = None
    series_uid: str | None = None
    sop_uid: str | None = None
    sop_class: str | None = None
    modality: str | None = None
    body_part: str | None = None
    view_position: str | None = None
    study_date: str | None = None
    series_date: str | None = None
    acquisition_date: str | None = None
    manufacturer: str | None = None
    manufacturer_model: str | None = None
    station: str | None = None
    institution: str | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Radiograph:
    """A decoded X-ray as a reader would see it on a light box: air dark, bone bright.

    Attributes
    ----------
    pixels
        float32, shape (rows, columns), 0 = black to 1 = white.
    meta
        What the file says about it.
    flags
        What reading noticed or had to mend, without repetition.
    orientation_known
        Whether the file says which side is the patient's left; then the patient's right is at the
        left of `pixels`, and the head above.
    kept
        Which part of the upright image `pixels` are; None where no frame was cut off.
    """

    pixels: FloatImage
    meta: RadiographMeta
    flags: tuple[Flag, ...] = ()
    orientation_known: bool = False
    kept: Box | None = None


# A code that is longer than 16 characters, or a URN, has an attribute of its own.
_CODE_VALUES = ("CodeValue", "LongCodeValue", "URNCodeValue")


def text_of(dataset: Dataset, keyword: str) -> str | None:
    """Return an attribute as stripped text, None where it is absent, empty or unreadable."""
    try:
        value = dataset.get(keyword)
    # pydicom decodes here, and may raise anything at all on damaged bytes.
    except Exception:
        return None
    text = "" if value is None else str(value).strip().strip("\0")
    return text or None


def code_of(dataset: Dataset, keyword: str) -> str:
    """Return an attribute as upper-case text, empty where `text_of` has none."""
    return (text_of(dataset, keyword) or "").upper()


def number_of(dataset: Dataset, keyword: str, default: int = 0) -> int:
    """Return a whole number, `default` where there is none."""
    text = text_of(dataset, keyword)
    try:
        return default if text is None else int(text)
    except ValueError:
        return default


def numbers_of(dataset: Dataset, keyword: str) -> tuple[float, ...]:
    """Return all values of a numeric attribute, none where any of them is no number."""
    try:
        value = dataset.get(keyword)
        if value is None or value == "":
            return ()
        if hasattr(value, "__len__") and not isinstance(value, str):
            return tuple(float(part) for part in value)
        return (float(value),)
    # As in `text_of`.
    except Exception:
        return ()


def float_of(dataset: Dataset, keyword: str, default: float) -> float:
    """Return the first value of a numeric attribute, `default` where there is none."""
    values = numbers_of(dataset, keyword)
    return values[0] if values else default


def items_of(dataset: Dataset, keyword: str) -> list[Dataset]:
    """Return the items of a sequence, none where it is absent or cannot be read."""
    try:
        return [item for item in dataset.get(keyword) or () if isinstance(item, Dataset)]
    # As in `text_of`.
    except Exception:
        return []


def codes_of(dataset: Dataset, keyword: str) -> tuple[tuple[str, str], ...]:
    """Return code value and meaning of each item of a code sequence (PS3.3 8.8).

    Either is "" where it is missing; items without both are left out.
    """
    found = []
    for item in items_of(dataset, keyword):
        value = next(filter(None, (text_of(item, k) for k in _CODE_VALUES)), "")
        meaning = text_of(item, "CodeMeaning") or ""
        if value or meaning:
            found.append((value, meaning))
    return tuple(found)


def values_of(dataset: Dataset, keyword: str) -> list[str]:
    """Return an attribute's values as stripped upper-case texts, however many there are."""
    try:
        value = dataset.get(keyword) or ()
        values = [value] if isinstance(value, str) else [str(part) for part in value]
    # As in `text_of`.
    except Exception:
        return []
    return [value.strip().upper() for value in values]


def short(value: str) -> str:
    """Make a value from a file fit for a one-line message: printable, 16 characters (VR CS)."""
    return "".join(c for c in value if c.isprintable())[:16]


def meta_of(dataset: FileDataset) -> RadiographMeta:
    """Return what a file says about its image and where that belongs."""
    return RadiographMeta(
        format="DICOM",
        rows=number_of(dataset, "Rows"),
        columns=number_of(dataset, "Columns"),
        bits_stored=number_of(dataset, "BitsStored"),
        photometric=code_of(dataset, "PhotometricInterpretation"),
        transfer_syntax=str(dataset.file_meta.TransferSyntaxUID),
        patient_id=text_of(dataset, "PatientID"),
        accession=text_of(dataset, "AccessionNumber"),
        study_uid=text_of(dataset, "StudyInstanceUID"),
        series_uid=text_of(dataset, "SeriesInstanceUID"),
        sop_uid=text_of(dataset, "SOPInstanceUID"),
        sop_class=text_of(dataset, "SOPClassUID"),
        modality=text_of(dataset, "Modality"),
        body_part=text_of(dataset, "BodyPartExamined"),
        view_position=text_of(dataset, "ViewPosition"),
        study_date=text_of(dataset, "StudyDate"),
        series_date=text_of(dataset, "SeriesDate"),
        acquisition_date=text_of(dataset, "AcquisitionDate")
        or (text_of(dataset, "AcquisitionDateTime") or "")[:8]
        or None,
        manufacturer=text_of(dataset, "Manufacturer"),
        manufacturer_model=text_of(dataset, "ManufacturerModelName"),
        station=text_of(dataset, "StationName"),
        institution=text_of(dataset, "InstitutionName"),
    )
