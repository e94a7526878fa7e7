"""DICOM files: parsing, completeness, and the frame of encapsulated pixel data (PS3.5 A.4)."""

import io
import os
import struct
import zlib
from itertools import pairwise
from typing import BinaryIO

import pydicom
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.filereader import read_dataset, read_preamble
from pydicom.tag import BaseTag
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
    RLELossless,
)

from lungwatch.errors import FileRejected, Reason
from lungwatch.imaging.radiograph import number_of, text_of

_ITEM = b"\xfe\xff\x00\xe0"
_DELIMITER = b"\xfe\xff\xdd\xe0"
# SOI of JPEG and JPEG-LS, SOC of JPEG 2000; a JP2 file's signature box, against PS3.5 A.4.4.
_STARTS = (b"\xff\xd8\xff", b"\xff\x4f\xff\x51", b"\x00\x00\x00\x0cjP")
_END = b"\xff\xd9"  # EOI and EOC alike
_RLE_HEADER_BYTES = 64
_RLE_MAX_SEGMENTS = 15


def is_encapsulated(value: bytes) -> bool:
    """Return whether pixel data begins with an item for offsets, as encapsulated data does."""
    if not value.startswith(_ITEM) or len(value) < 16:
        return False
    (length,) = struct.unpack_from("<L", value, 4)
    following = value[8 + length : 12 + length]
    return length % 4 == 0 and following in (_ITEM, _DELIMITER)


def has_whole_items(value: bytes) -> bool:
    """Return whether every item of encapsulated pixel data is as long as it says."""
    position = 0
    while position + 8 <= len(value):
        (length,) = struct.unpack_from("<L", value, position + 4)
        tag = value[position : position + 4]
        if tag == _DELIMITER:
            return True
        if tag != _ITEM:
            return True  # the codec decides
        position += 8 + length
    return position == len(value) and position > 0


def has_end_marker(value: bytes) -> bool:
    """Return whether the last fragment ends as a JPEG or JPEG 2000 stream does.

    Without the sequence's delimiter, only this distinguishes a whole file from one that ends
    between two fragments.
    """
    return value.rstrip(b"\0").endswith(_END)


def single_frame(value: bytes, syntax: UID) -> bytes:
    """Join the fragments of pixel data that hold one frame, whatever the offset tables state.

    Raises
    ------
    FileRejected
        If the pixel data is not encapsulated, or holds more than one frame.
    """
    if not value.startswith(_ITEM):
        raise FileRejected(
            Reason.UNREADABLE,
            f"the pixel data is not compressed, though the transfer syntax is '{syntax.name}'",
        )
    fragments = _fragments(value)
    frames = _frames(fragments, syntax)
    if frames > 1:
        raise FileRejected(
            Reason.MULTI_FRAME, f"the pixel data holds {frames} frames, though the file states one"
        )
    if not fragments:
        raise FileRejected(Reason.UNREADABLE, "the compressed pixel data's frame cannot be found")
    return b"".join(fragments)


def _fragments(value: bytes) -> list[bytes]:
    items = []
    position = 0
    while position + 8 <= len(value) and value[position : position + 4] == _ITEM:
        (length,) = struct.unpack_from("<L", value, position + 4)
        items.append(value[position + 8 : position + 8 + length])
        position += 8 + length
    # The first item holds the offset table, or nothing; some files omit it.
    if items and items[0].startswith(_STARTS):
        return items
    return [item for item in items[1:] if item]


def _frames(fragments: list[bytes], syntax: UID) -> int:
    """Count the fragments that begin a frame after another has ended."""
    count = 1 if fragments else 0
    for before, fragment in pairwise(fragments):
        if syntax == RLELossless:
            count += _is_rle_header(fragment)
        else:
            count += fragment.startswith(_STARTS) and has_end_marker(before)
    return count


def _is_rle_header(fragment: bytes) -> bool:
    """Return whether bytes begin like an RLE frame does (PS3.5 G.5)."""
    if len(fragment) < _RLE_HEADER_BYTES:
        return False
    segments, *offsets = struct.unpack_from("<16L", fragment)
    return bool(0 < segments <= _RLE_MAX_SEGMENTS and offsets[0] == _RLE_HEADER_BYTES)


_UNDEFINED = 0xFFFFFFFF
_MIB = 1024 * 1024
_SEQUENCE_DELIMITER = b"\xfe\xff\xdd\xe0\0\0\0\0"
_CUT_OFF = "the DICOM file ends in mid-element"


def parse_dicom(file: BinaryIO, max_bytes: int) -> FileDataset:
    """Parse a DICOM file; its elements are decoded when looked at.

    Parameters
    ----------
    file
        Open for reading; it is read from its beginning.
    max_bytes
        Of the file, and of what a deflated one inflates to.

    Raises
    ------
    FileRejected
        If the file is cut off, too large, or no DICOM data set after all.
    OSError
        If the file cannot be read at all.
    """
    size_bytes = file.seek(0, os.SEEK_END)
    if size_bytes > max_bytes:
        raise FileRejected(
            Reason.TOO_LARGE,
            f"the file has {size_bytes // _MIB} MiB; a radiograph has at most {max_bytes // _MIB}",
        )
    try:
        dataset = _read(file, max_bytes)
        # pydicom discards everything when an element of undefined length has no end.
        if len(dataset) == 0 and _states_compression(dataset):
            dataset = _delimited(file) or dataset
        if "TransferSyntaxUID" not in dataset.file_meta:
            # PS3.5 10.1: the default transfer syntax. Files without a header are uncompressed,
            # and the byte order that pydicom found holds for the pixels too.
            is_little_endian = dataset.original_encoding[1] is not False
            dataset.file_meta.TransferSyntaxUID = (
                ImplicitVRLittleEndian if is_little_endian else ExplicitVRBigEndian
            )
        is_cut_off = _is_cut_off(dataset, size_bytes)
        # Elements are decoded at first access; do it here, where errors are expected.
        text_of(dataset, "Modality")
    except FileRejected:
        raise
    except (EOFError, struct.error) as error:
        raise FileRejected(Reason.TRUNCATED, _CUT_OFF) from error
    except OSError as error:
        if error.errno is not None:
            raise
        # pydicom's own, for a sequence without an end.
        raise FileRejected(Reason.TRUNCATED, _CUT_OFF) from error
    except MemoryError:
        raise
    # A parser may raise anything on damaged bytes.
    except Exception as error:
        raise FileRejected(Reason.UNREADABLE, "the DICOM file cannot be parsed") from error
    if is_cut_off or len(dataset) == 0:
        raise FileRejected(Reason.TRUNCATED, _CUT_OFF)
    return dataset


def check_complete(dataset: FileDataset) -> None:
    """Refuse a file that ends before its pixel data does.

    Raises
    ------
    FileRejected
        As TRUNCATED.
    """
    if "PixelData" not in dataset:
        return
    value = dataset["PixelData"].value
    syntax = UID(dataset.file_meta.TransferSyntaxUID)
    if not syntax.is_transfer_syntax:
        return  # refused later, for want of a decoder
    if syntax.is_encapsulated or is_encapsulated(value):
        complete = has_whole_items(value)
    else:
        complete = len(value) >= frame_bytes(dataset) or holds_bytes(dataset)
    if not complete:
        raise FileRejected(Reason.TRUNCATED, "the DICOM file ends before its pixel data does")


def holds_bytes(dataset: Dataset) -> bool:
    """Return whether pixel data stated as 8 bits in words of 16 are bytes, by their size."""
    value = dataset["PixelData"].value
    bits = number_of(dataset, "BitsAllocated"), number_of(dataset, "BitsStored")
    size = frame_bytes(dataset) // 2
    return bits[0] == 16 and 0 < bits[1] <= 8 and size > 0 and len(value) in (size, size + size % 2)


def frame_bytes(dataset: Dataset) -> int:
    """Return the size of an uncompressed frame in bytes, as the attributes make it."""
    samples = number_of(dataset, "Rows") * number_of(dataset, "Columns")
    if text_of(dataset, "PhotometricInterpretation") == "YBR_FULL_422":
        samples *= 2  # two of three are shared by a pair of pixels: PS3.3 C.7.6.3.1.2
    else:
        samples *= number_of(dataset, "SamplesPerPixel", 1)
    return samples * number_of(dataset, "BitsAllocated") // 8


def _read(file: BinaryIO, max_bytes: int) -> FileDataset:
    file.seek(0)
    preamble = read_preamble(file, force=True)
    meta = read_dataset(file, is_implicit_VR=False, is_little_endian=True, stop_when=_is_past_meta)
    if meta.get("TransferSyntaxUID") == DeflatedExplicitVRLittleEndian:
        body = read_dataset(
            io.BytesIO(_inflate(file, max_bytes)), is_implicit_VR=False, is_little_endian=True
        )
        return FileDataset(
            file,
            body,
            preamble=preamble,
            file_meta=FileMetaDataset(meta),
            is_implicit_VR=False,
            is_little_endian=True,
        )
    file.seek(0)
    return pydicom.dcmread(file, force=True)


def _states_compression(dataset: FileDataset) -> bool:
    syntax = UID(str(dataset.file_meta.get("TransferSyntaxUID", "")))
    return syntax.is_transfer_syntax and syntax.is_encapsulated


def _delimited(file: BinaryIO) -> FileDataset | None:
    """Parse a file that lacks only the delimiter of its pixel data's sequence; None if more."""
    file.seek(0)
    dataset = pydicom.dcmread(io.BytesIO(file.read() + _SEQUENCE_DELIMITER), force=True)
    value = dataset.get("PixelData")
    is_whole = isinstance(value, bytes) and has_whole_items(value) and has_end_marker(value)
    return dataset if is_whole else None


def _is_past_meta(tag: BaseTag, vr: str | None, length: int) -> bool:
    del vr, length
    return tag.group != 0x0002


def _inflate(file: BinaryIO, max_bytes: int) -> bytes:
    """Inflate the rest of a file (PS3.5 A.5, RFC 1951), up to `max_bytes`."""
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        data = inflater.decompress(file.read(), max_bytes)
    except zlib.error as error:
        raise FileRejected(
            Reason.DAMAGED, "the DICOM file's content is not deflated as it says, or is damaged"
        ) from error
    if inflater.eof:
        return data
    if len(data) >= max_bytes:
        raise FileRejected(
            Reason.TOO_LARGE, f"the deflated file inflates to more than {max_bytes // _MIB} MiB"
        )
    raise FileRejected(Reason.TRUNCATED, "the DICOM file ends before its deflated content does")


def _is_cut_off(dataset: FileDataset, size_bytes: int) -> bool:
    """Return whether the last element is shorter than stated, or followed by part of another.

    pydicom accepts both. Bytes behind whole pixel data are harmless.
    """
    elements = dataset if len(dataset) else dataset.file_meta
    if not len(elements) or "PixelData" in dataset:
        return False
    last: object = elements.get_item(max(elements.keys()))
    if not isinstance(last, RawDataElement) or last.value is None or last.length == _UNDEFINED:
        return False
    is_deflated = dataset.file_meta.TransferSyntaxUID == DeflatedExplicitVRLittleEndian
    has_rest = not is_deflated and last.value_tell + last.length < size_bytes
    return len(last.value) < last.length or has_rest
