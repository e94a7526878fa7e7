"""Recognition of what lungwatch itself sends: Secondary Captures and Structured Reports.

A PACS that forwards by itself sends them back. They are known by their SOP class and by what
every lungwatch writes into them (`lungwatch.daemon.dicomout`), de-identified or not, of this
installation or another. Whoever imitates that gets his file set aside, and nothing else.
"""

import io
import zlib
from pathlib import Path

from pydicom.dataset import Dataset
from pydicom.filereader import read_dataset, read_partial, read_preamble
from pydicom.tag import BaseTag
from pydicom.uid import DeflatedExplicitVRLittleEndian

from lungwatch import RESEARCH_USE_ONLY
from lungwatch.imaging.attributes import text_of
from lungwatch.imaging.dicom import is_dicom

_NAME = "lungwatch"
# Prefixes of SOP classes: every Secondary Capture and every Structured Report.
_CLASSES = ("1.2.840.10008.5.1.4.1.1.7", "1.2.840.10008.5.1.4.1.1.88.")
# What is looked at lies before pixels and content.
_MOST_BYTES = 256 * 1024
_HEAD_BYTES = 132
_LAST_TAG = 0x00204000  # Image Comments


def is_own_object(path: Path) -> bool:
    """Whether a file is an object that some lungwatch made of a result.

    Raises
    ------
    OSError
        If the file cannot be read.
    """
    with path.open("rb") as file:
        data = file.read(_MOST_BYTES)
    if not is_dicom(data[:_HEAD_BYTES]):
        return False
    is_deflated = DeflatedExplicitVRLittleEndian.encode() in data[:1024]
    # Nothing is parsed of a file that cannot be one.
    if _NAME.encode() not in data.lower() and not is_deflated:
        return False
    try:
        dataset = _inflated(data) if is_deflated else _parsed(data)
    # A parser may raise anything at all on damaged bytes; those are for the decoder.
    except Exception:
        return False
    return (text_of(dataset, "SOPClassUID") or "").startswith(_CLASSES) and _is_marked(dataset)


def _is_marked(dataset: Dataset) -> bool:
    """Whether one of the marks is left of those that a PACS, or a de-identifier, may remove."""
    manufacturer = text_of(dataset, "Manufacturer") or ""
    series = text_of(dataset, "SeriesDescription") or ""
    comments = (text_of(dataset, word) or "" for word in ("ImageComments", "DerivationDescription"))
    return (
        manufacturer.casefold() == _NAME
        or series.casefold().startswith(f"{_NAME} ")
        or any(RESEARCH_USE_ONLY in comment for comment in comments)
    )


def _parsed(data: bytes) -> Dataset:
    return read_partial(io.BytesIO(data), stop_when=_is_past, force=True)


def _inflated(data: bytes) -> Dataset:
    file = io.BytesIO(data)
    read_preamble(file, force=True)
    read_dataset(file, is_implicit_VR=False, is_little_endian=True, stop_when=_is_past_meta)
    # PS3.5 A.5: the bare deflate stream of RFC 1951.
    body = zlib.decompressobj(-zlib.MAX_WBITS).decompress(file.read(), _MOST_BYTES)
    return read_dataset(
        io.BytesIO(body), is_implicit_VR=False, is_little_endian=True, stop_when=_is_past
    )


def _is_past(tag: BaseTag, vr: str | None, length: int) -> bool:
    del vr, length
    return int(tag) > _LAST_TAG


def _is_past_meta(tag: BaseTag, vr: str | None, length: int) -> bool:
    del vr, length
    return tag.group != 0x0002
