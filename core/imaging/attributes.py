"""Values of DICOM attributes, as files really hold them: absent, empty, padded, damaged."""

from pydicom.dataset import Dataset, FileDataset

from lungwatch.imaging.radiograph import RadiographMeta

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
