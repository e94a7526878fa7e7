"""Radiograph: a decoded X-ray; what is accepted as one; values of DICOM attributes.

Values are read as files hold them: absent, empty, padded, damaged.
"""

from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.datadict import tag_for_keyword
from pydicom.dataset import Dataset, FileDataset
from pydicom.valuerep import DA, TM

from lungwatch.attributes import ATTRIBUTES, Attribute, RadiographMeta, checked_instant, is_storable
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
class ReadPolicy:
    """Rules for what is accepted as a chest radiograph, and limits of size.

    Attributes
    ----------
    modalities
        Values of Modality (0008,0060) that are projection radiographs.
    body_parts
        Values of Body Part Examined (0018,0015), in capitals, that are taken for the chest beside
        those that `vocabulary.toml` knows.
    view_positions
        Values of View Position (0018,5101), in capitals, that are taken for a frontal view beside
        those that `vocabulary.toml` knows.
    reject_lateral
        Refuse files whose View Position, View Code Sequence or Patient Orientation is not that of
        a frontal view.
    min_side_px, max_pixels
        Smallest side and largest area that are read.
    """

    modalities: frozenset[str] = frozenset({"CR", "DX", "RG"})
    body_parts: frozenset[str] = frozenset()
    view_positions: frozenset[str] = frozenset()
    reject_lateral: bool = True
    min_side_px: int = 64
    max_pixels: int = 120_000_000


@dataclass(frozen=True, kw_only=True, eq=False)
class Radiograph:
    """A decoded X-ray as on a light box: air dark, bone bright.

    Attributes
    ----------
    pixels
        float32, shape (rows, columns), 0 = black to 1 = white.
    flags
        Remarks and corrections, without repetition.
    orientation_known
        Whether the file states the patient's left; then the patient's right is at the left of
        `pixels`, and the head above.
    kept
        The part of the upright image that `pixels` are; None where no frame was cut off.
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
    # pydicom decodes here, and may raise anything on damaged bytes.
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
    """Return all values of a numeric attribute, none if any of them is invalid."""
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
    """Return what a file states about its image, as `RadiographMeta` declares it."""
    values = {
        name: _stated(dataset, declared)
        for name, declared in ATTRIBUTES.items()
        if declared.keywords
    }
    return RadiographMeta(format="DICOM", **values)


def _stated(dataset: FileDataset, declared: Attribute) -> Any:  # noqa: ANN401 - of its kind
    if declared.kind == "number":
        number = number_of(dataset, declared.keywords[0])
        return number if is_storable(number) else 0
    if declared.kind == "code":
        return code_of(dataset, declared.keywords[0])
    if declared.kind == "instant":
        return _instant(dataset, *declared.keywords)
    for keyword in declared.keywords:
        is_meta = (tag_for_keyword(keyword) or 0) >> 16 == 0x0002
        text = text_of(dataset.file_meta if is_meta else dataset, keyword)
        if text is not None:
            # A date and time begins with the date (PS3.5 6.2, VR DT).
            return text[:8] if declared.kind == "date" and keyword.endswith("DateTime") else text
    return None


def _instant(dataset: Dataset, date: str, time: str) -> datetime | None:
    """Return date and time with the file's time zone, or else this machine's; None if damaged."""
    day, moment = text_of(dataset, date), text_of(dataset, time)
    zone = text_of(dataset, "TimezoneOffsetFromUTC")
    if day is None or moment is None:
        return None
    try:
        stated = datetime.combine(DA(day), TM(moment))
        if zone is not None:
            return checked_instant(stated.replace(tzinfo=datetime.strptime(zone, "%z").tzinfo))
        return checked_instant(stated.astimezone())
    except (ValueError, OverflowError):
        return None
