"""DICOM files: which of them are chest radiographs, and their pixels for display."""

import struct
from pathlib import Path

import numpy as np
import pydicom
from pydicom.dataelem import RawDataElement
from pydicom.dataset import FileDataset
from pydicom.encaps import generate_frames
from pydicom.pixels.decoders.base import get_decoder
from pydicom.uid import (
    UID,
    ComputedRadiographyImageStorage,
    DeflatedExplicitVRLittleEndian,
    DigitalXRayImageStorageForPresentation,
    DigitalXRayImageStorageForProcessing,
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
)

from lungwatch.errors import FileRejected, LungwatchError, Reason
from lungwatch.imaging.codestream import frame_size
from lungwatch.imaging.grayscale import to_display
from lungwatch.imaging.radiograph import Radiograph, RadiographMeta

_RADIOGRAPH_CLASSES = {
    ComputedRadiographyImageStorage,
    DigitalXRayImageStorageForPresentation,
    DigitalXRayImageStorageForProcessing,
}
_MONOCHROME = {"MONOCHROME1", "MONOCHROME2"}
_COLOUR = {"RGB", "YBR_FULL", "YBR_FULL_422", "YBR_RCT", "YBR_ICT"}
# Left and right laterals and the obliques: PS3.3 C.8.11.5.1.1 (CR) and DX View Position.
_NOT_FRONTAL = {"LL", "RL", "LLD", "RLD", "LLO", "RLO", "LATERAL", "LAT"}
_UNDEFINED = 0xFFFFFFFF
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


def read(
    path: Path,
    *,
    modalities: frozenset[str],
    body_parts: frozenset[str],
    reject_lateral: bool,
    max_pixels: int,
) -> Radiograph:
    """Read a DICOM file's radiograph as its VOI transformation shows it.

    Parameters
    ----------
    path
        A file for which `is_dicom` holds.
    modalities, body_parts, reject_lateral, max_pixels
        As in `lungwatch.imaging.ReadPolicy`.

    Raises
    ------
    FileRejected
        If the file is no chest radiograph, or is damaged.
    OSError
        If the file cannot be read at all.
    """
    dataset = _parse(path)
    try:
        # A file that was cut off comes again whole, whatever it shows: say that first.
        _check_complete(dataset)
        _check_subject(dataset, modalities, body_parts, reject_lateral)
        _check_pixels(dataset, max_pixels)
        stored = _decode(dataset)
        return Radiograph(pixels=to_display(stored, dataset), meta=_meta(dataset))
    except FileRejected as refusal:
        refusal.meta = _meta(dataset)
        raise
    except (LungwatchError, MemoryError):
        raise
    # Values are decoded when looked at, and damaged ones may raise anything at all.
    except Exception as error:
        raise FileRejected(
            Reason.UNREADABLE, "the DICOM file holds values that cannot be decoded"
        ) from error


def _parse(path: Path) -> FileDataset:
    try:
        dataset = pydicom.dcmread(path, force=True)
        if "TransferSyntaxUID" not in dataset.file_meta:
            # PS3.5 10.1: the default transfer syntax. Bare files are uncompressed all the same,
            # and what pydicom found out of their byte order goes for the pixels too.
            is_little_endian = dataset.original_encoding[1] is not False
            dataset.file_meta.TransferSyntaxUID = (
                ImplicitVRLittleEndian if is_little_endian else ExplicitVRBigEndian
            )
        is_cut_off = _is_cut_off(dataset, path.stat().st_size)
        # Elements are decoded when first looked at; do it here, where errors are expected.
        text_of(dataset, "Modality")
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
    # pydicom drops all it has read when an element of undefined length has no end.
    if is_cut_off or len(dataset) == 0:
        raise FileRejected(Reason.TRUNCATED, _CUT_OFF)
    return dataset


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


def text_of(dataset: FileDataset, keyword: str) -> str | None:
    """Return an attribute as stripped text, None where it is absent, empty or unreadable."""
    try:
        value = dataset.get(keyword)
    # pydicom decodes here, and may raise anything at all on damaged bytes.
    except Exception:
        return None
    text = "" if value is None else str(value).strip().strip("\0")
    return text or None


def _check_subject(
    dataset: FileDataset,
    modalities: frozenset[str],
    body_parts: frozenset[str],
    reject_lateral: bool,  # noqa: FBT001  # private; named at its only call
) -> None:
    modality = (text_of(dataset, "Modality") or "").upper()
    sop_class = text_of(dataset, "SOPClassUID")
    if not modality and sop_class not in _RADIOGRAPH_CLASSES:
        raise FileRejected(
            Reason.NOT_A_RADIOGRAPH, "the file names neither a modality nor a radiograph's class"
        )
    if modality and modality not in modalities:
        wanted = ", ".join(sorted(modalities))
        raise FileRejected(
            Reason.NOT_A_RADIOGRAPH, f"modality {_short(modality)} is not a radiograph ({wanted})"
        )
    species = (text_of(dataset, "PatientSpeciesDescription") or "HUMAN").upper()
    if "HUMAN" not in species and "SAPIENS" not in species:
        raise FileRejected(Reason.NOT_HUMAN, "the file names a species other than human")
    body_part = (text_of(dataset, "BodyPartExamined") or "").upper()
    if body_part and body_part not in body_parts:
        raise FileRejected(
            Reason.WRONG_BODY_PART, f"body part {_short(body_part)} is not the chest"
        )
    view = (text_of(dataset, "ViewPosition") or "").upper()
    if reject_lateral and view in _NOT_FRONTAL:
        raise FileRejected(Reason.NOT_FRONTAL, f"view position {_short(view)} is not frontal")


def _check_pixels(dataset: FileDataset, max_pixels: int) -> None:
    if "PixelData" not in dataset:
        # A file cut off before its largest element parses without complaint.
        raise FileRejected(Reason.NO_PIXEL_DATA, "the DICOM file holds no pixel data")
    rows, columns = _number(dataset, "Rows"), _number(dataset, "Columns")
    if rows <= 0 or columns <= 0:
        raise FileRejected(Reason.UNREADABLE, "the DICOM file states no image size")
    if rows * columns > max_pixels:
        raise FileRejected(
            Reason.TOO_LARGE, f"the image is {columns}x{rows} pixels, more than {max_pixels} in all"
        )
    if (frames := _number(dataset, "NumberOfFrames", 1)) > 1:
        raise FileRejected(Reason.MULTI_FRAME, f"the file holds {frames} frames, not one")
    photometric = (text_of(dataset, "PhotometricInterpretation") or "").upper()
    if photometric not in _MONOCHROME | _COLOUR:
        raise FileRejected(
            Reason.UNSUPPORTED_PIXEL_FORMAT,
            f"photometric interpretation {_short(photometric) or 'missing'} is not supported",
        )


def _decode(dataset: FileDataset) -> np.ndarray:
    syntax = UID(dataset.file_meta.TransferSyntaxUID)
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError as error:
        raise FileRejected(
            Reason.UNSUPPORTED_TRANSFER_SYNTAX, f"no decoder knows the transfer syntax {syntax}"
        ) from error
    if syntax.is_encapsulated and not decoder.is_available:
        raise FileRejected(
            Reason.UNSUPPORTED_TRANSFER_SYNTAX,
            f"transfer syntax '{syntax.name}' needs a decoder that is not installed: "
            + " or ".join(decoder.missing_dependencies),
        )
    if syntax.is_encapsulated:
        _check_frame_size(dataset)
    try:
        stored = dataset.pixel_array
    # A codec may raise anything at all on a damaged stream, and it is the stream's fault. One
    # written in Rust panics, which pyo3 makes a BaseException of.
    except BaseException as error:
        is_panic = type(error).__name__ == "PanicException"
        if isinstance(error, MemoryError) or not (isinstance(error, Exception) or is_panic):
            raise
        raise FileRejected(
            Reason.UNREADABLE, f"the pixel data cannot be decoded ('{syntax.name}')"
        ) from error
    if stored.ndim not in (2, 3):
        raise FileRejected(
            Reason.UNSUPPORTED_PIXEL_FORMAT, f"the pixel data has {stored.ndim} dimensions"
        )
    return stored


def _check_frame_size(dataset: FileDataset) -> None:
    try:
        frame = next(generate_frames(dataset.PixelData, number_of_frames=1))
    # As with the codecs: the encapsulation is as damaged as the file.
    except Exception as error:
        raise FileRejected(
            Reason.UNREADABLE, "the compressed pixel data's frame cannot be found"
        ) from error
    stated = tuple(
        _number(dataset, keyword, 1) for keyword in ("Rows", "Columns", "SamplesPerPixel")
    )
    found = frame_size(frame)
    if found is not None and found != stated:
        raise FileRejected(
            Reason.UNREADABLE, "the compressed image's size is not the one that the file states"
        )


def _check_complete(dataset: FileDataset) -> None:
    if "PixelData" not in dataset:
        return
    value = dataset["PixelData"].value
    syntax = UID(dataset.file_meta.TransferSyntaxUID)
    if not syntax.is_transfer_syntax:
        return  # said by whoever looks for a decoder
    if syntax.is_encapsulated:
        complete = _fragments_complete(value)
    else:
        bits = _number(dataset, "Rows") * _number(dataset, "Columns")
        bits *= _number(dataset, "BitsAllocated") * _number(dataset, "SamplesPerPixel", 1)
        complete = len(value) >= bits // 8
    if not complete:
        raise FileRejected(Reason.TRUNCATED, "the DICOM file ends before its pixel data does")


def _fragments_complete(value: bytes) -> bool:
    """Whether every item of encapsulated pixel data is as long as it says (PS3.5 A.4)."""
    position = 0
    while position + 8 <= len(value):
        group, element, length = struct.unpack_from("<HHL", value, position)
        if (group, element) == (0xFFFE, 0xE0DD):
            return True
        if (group, element) != (0xFFFE, 0xE000):
            return True  # not for this check to judge; the codec will
        position += 8 + length
    return position == len(value) and position > 0


def _meta(dataset: FileDataset) -> RadiographMeta:
    return RadiographMeta(
        format="DICOM",
        rows=_number(dataset, "Rows"),
        columns=_number(dataset, "Columns"),
        bits_stored=_number(dataset, "BitsStored"),
        photometric=(text_of(dataset, "PhotometricInterpretation") or "").upper(),
        transfer_syntax=str(dataset.file_meta.TransferSyntaxUID),
        patient_id=text_of(dataset, "PatientID"),
        accession=text_of(dataset, "AccessionNumber"),
        study_uid=text_of(dataset, "StudyInstanceUID"),
        series_uid=text_of(dataset, "SeriesInstanceUID"),
        sop_uid=text_of(dataset, "SOPInstanceUID"),
        modality=text_of(dataset, "Modality"),
        body_part=text_of(dataset, "BodyPartExamined"),
        view_position=text_of(dataset, "ViewPosition"),
        study_date=text_of(dataset, "StudyDate"),
        manufacturer=text_of(dataset, "Manufacturer"),
        station=text_of(dataset, "StationName"),
        institution=text_of(dataset, "InstitutionName"),
    )


def _number(dataset: FileDataset, keyword: str, default: int = 0) -> int:
    text = text_of(dataset, keyword)
    try:
        return default if text is None else int(text)
    except ValueError:
        return default


def _short(value: str) -> str:
    """Make a value from a file fit for a one-line message: printable, 16 characters (VR CS)."""
    return "".join(c for c in value if c.isprintable())[:16]
