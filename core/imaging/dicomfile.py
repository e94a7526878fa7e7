"""DICOM files off the disk: recognised, parsed, known to be whole, bounded in size."""

import io
import struct
import zlib
from pathlib import Path
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
)

from lungwatch.errors import FileRejected, Reason
from lungwatch.imaging import encapsulation
from lungwatch.imaging.attributes import number_of, text_of

_UNDEFINED = 0xFFFFFFFF
_MIB = 1024 * 1024
_SEQUENCE_DELIMITER = b"\xfe\xff\xdd\xe0\0\0\0\0"
_CUT_OFF = "the DICOM file ends in mid-element"


def is_dicom(head: bytes) -> bool:
    """Whether the first 132 bytes of a file are those of a DICOM file.

    PS3.10 7.1 wants 128 bytes and "DICM"; files from before that rule, and from careless
    exporters, begin with the first data element instead.
    """
    if head[128:132] == b"DICM":
        return True
    if len(head) < 8:
        return False
    explicit = head[4:6].isalpha() and head[4:6].isupper()
    # Big endian was always explicit (PS3.5 A.3, retired).
    group, element = struct.unpack(">HH" if explicit and head[0] == 0 else "<HH", head[:4])
    if group not in (0x0002, 0x0008) or element > 0x0100:
        return False
    return explicit or int.from_bytes(head[4:8], "little") <= 1024


def parse(path: Path, max_bytes: int) -> FileDataset:
    """Parse a DICOM file; its elements are decoded when looked at.

    Parameters
    ----------
    max_bytes
        Of the file, and of what a deflated one inflates to.

    Raises
    ------
    FileRejected
        If the file is cut off, too large, or no DICOM data set after all.
    OSError
        If the file cannot be read at all.
    """
    size_bytes = path.stat().st_size
    if size_bytes > max_bytes:
        raise FileRejected(
            Reason.TOO_LARGE,
            f"the file has {size_bytes // _MIB} MiB; a radiograph has at most {max_bytes // _MIB}",
        )
    try:
        dataset = _read(path, max_bytes)
        # pydicom drops all it has read when an element of undefined length has no end.
        if len(dataset) == 0 and _states_compression(dataset):
            dataset = _delimited(path) or dataset
        if "TransferSyntaxUID" not in dataset.file_meta:
            # PS3.5 10.1: the default transfer syntax. Bare files are uncompressed all the same,
            # and what pydicom found out of their byte order goes for the pixels too.
            is_little_endian = dataset.original_encoding[1] is not False
            dataset.file_meta.TransferSyntaxUID = (
                ImplicitVRLittleEndian if is_little_endian else ExplicitVRBigEndian
            )
        is_cut_off = _is_cut_off(dataset, size_bytes)
        # Elements are decoded when first looked at; do it here, where errors are expected.
        text_of(dataset, "Modality")
    except FileRejected:
        raise
    except (EOFError, struct.error) as error:
        raise FileRejected(Reason.TRUNCATED, _CUT_OFF) from error
    except OSError as error:
        if error.errno is not None:
            raise
        # Not the system's but pydicom's own, for a sequence that has no end.
        raise FileRejected(Reason.TRUNCATED, _CUT_OFF) from error
    except MemoryError:
        raise
    # A parser may raise anything at all on damaged bytes, and it is the bytes' fault.
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
        As TRUNCATED; whatever else is wrong with the file, it comes again whole.
    """
    if "PixelData" not in dataset:
        return
    value = dataset["PixelData"].value
    syntax = UID(dataset.file_meta.TransferSyntaxUID)
    if not syntax.is_transfer_syntax:
        return  # said by whoever looks for a decoder
    if syntax.is_encapsulated or encapsulation.is_encapsulated(value):
        complete = encapsulation.is_complete(value)
    else:
        complete = len(value) >= frame_bytes(dataset) or holds_bytes(dataset)
    if not complete:
        raise FileRejected(Reason.TRUNCATED, "the DICOM file ends before its pixel data does")


def holds_bytes(dataset: Dataset) -> bool:
    """Whether pixel data that are said to be words of 8 bits in 16 are bytes, by their size."""
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


def _read(path: Path, max_bytes: int) -> FileDataset:
    with path.open("rb") as file:
        preamble = read_preamble(file, force=True)
        meta = read_dataset(
            file, is_implicit_VR=False, is_little_endian=True, stop_when=_is_past_meta
        )
        if meta.get("TransferSyntaxUID") == DeflatedExplicitVRLittleEndian:
            body = read_dataset(
                io.BytesIO(_inflate(file, max_bytes)), is_implicit_VR=False, is_little_endian=True
            )
            return FileDataset(
                path,
                body,
                preamble=preamble,
                file_meta=FileMetaDataset(meta),
                is_implicit_VR=False,
                is_little_endian=True,
            )
    return pydicom.dcmread(path, force=True)


def _states_compression(dataset: FileDataset) -> bool:
    syntax = UID(str(dataset.file_meta.get("TransferSyntaxUID", "")))
    return syntax.is_transfer_syntax and syntax.is_encapsulated


def _delimited(path: Path) -> FileDataset | None:
    """Parse a file of which nothing but the end of its pixel data's sequence is missing.

    Returns
    -------
    FileDataset or None
        None if more is missing: the last fragment is cut off, or others may have followed it.
    """
    dataset = pydicom.dcmread(io.BytesIO(path.read_bytes() + _SEQUENCE_DELIMITER), force=True)
    value = dataset.get("PixelData")
    is_whole = (
        isinstance(value, bytes)
        and encapsulation.is_complete(value)
        and encapsulation.has_ended(value)
    )
    return dataset if is_whole else None


def _is_past_meta(tag: BaseTag, vr: str | None, length: int) -> bool:
    del vr, length
    return tag.group != 0x0002


def _inflate(file: BinaryIO, max_bytes: int) -> bytes:
    """Inflate the rest of a file, as far as `max_bytes`: a few bytes can hold gigabytes."""
    # PS3.5 A.5: the bare deflate stream of RFC 1951.
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
    """Whether the last element is shorter than it says, or followed by a part of another.

    pydicom takes both without complaint. What follows whole pixel data does no harm.
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
