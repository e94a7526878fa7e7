"""Seed corpus of the fuzzer: small valid files of every kind, generated."""

import io
import json
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import cv2
import imagecodecs
import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.sequence import Sequence
from pydicom.uid import (
    JPEG2000,
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)
from targets import ABOUT, KEY, MODEL, SEPARATOR

from lungwatch.bundle import BundleFiles
from lungwatch.daemon.config import Config
from lungwatch.daemon.pipeline.model import Classifier, find_bundle
from lungwatch.models import SHIPPED_DEFAULT
from lungwatch.signing import sign

_SIDE = 12
_PIXELS = (np.add.outer(np.arange(_SIDE), 2 * np.arange(_SIDE)) * 7).astype(np.uint16)


def seeds(target: str) -> Iterator[bytes]:
    """Yield a target's first inputs.

    Parameters
    ----------
    target
        A key of `targets.TARGETS`.
    """
    yield from {
        "dicom": _dicom,
        "jpeg": _jpeg,
        "png": _png,
        "zip": _zip,
        "contract": _contract,
        "bundle": _bundle,
        "config": _config,
    }[target]()


def _dicom() -> Iterator[bytes]:
    grey8 = _PIXELS.astype(np.uint8)
    for syntax in (
        ExplicitVRLittleEndian,
        ImplicitVRLittleEndian,
        ExplicitVRBigEndian,
        DeflatedExplicitVRLittleEndian,
    ):
        swapped = _PIXELS.byteswap() if syntax == ExplicitVRBigEndian else _PIXELS
        yield _file(_radiograph(16), syntax, swapped.tobytes())
    rich = _radiograph(16)
    rich.WindowCenter, rich.WindowWidth = ["100", "50"], ["80", "20"]
    rich.RescaleSlope, rich.RescaleIntercept = "2", "-10"
    rich.PixelPaddingValue, rich.PresentationLUTShape = 3, "INVERSE"
    rich.PixelSpacing = ["0.1", "0.2"]
    rich.PhotometricInterpretation = "MONOCHROME1"
    yield _file(rich, ExplicitVRLittleEndian, _PIXELS.tobytes())
    table = Dataset()
    table.LUTDescriptor = [4, 0, 16]
    table.LUTData = np.array([0, 9, 99, 999], np.uint16).tobytes()
    for keyword in ("VOILUTSequence", "ModalityLUTSequence"):
        tabled = _radiograph(16)
        setattr(tabled, keyword, Sequence([table]))
        yield _file(tabled, ExplicitVRLittleEndian, _PIXELS.tobytes())
    palette = _radiograph(8)
    palette.PhotometricInterpretation = "PALETTE COLOR"
    for colour in ("Red", "Green", "Blue"):
        setattr(palette, f"{colour}PaletteColorLookupTableDescriptor", [256, 0, 8])
        setattr(palette, f"{colour}PaletteColorLookupTableData", bytes(range(256)))
    yield _file(palette, ExplicitVRLittleEndian, grey8.tobytes())
    for syntax, bits, frame in (
        (JPEGBaseline8Bit, 8, imagecodecs.jpeg8_encode(grey8)),
        (JPEGLosslessSV1, 8, imagecodecs.jpeg8_encode(grey8, lossless=True, predictor=1)),
        (JPEGLSLossless, 8, imagecodecs.jpegls_encode(grey8)),
        (JPEG2000Lossless, 16, imagecodecs.jpeg2k_encode(_PIXELS, codecformat="j2k")),
        (JPEG2000, 8, imagecodecs.jpeg2k_encode(grey8, level=20, codecformat="j2k")),
    ):
        yield _file(_radiograph(bits), syntax, encapsulate([bytes(frame)]))
    raw = _radiograph(16)
    raw.file_meta = FileMetaDataset()
    raw.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    raw.PixelData = _PIXELS.tobytes()
    raw["PixelData"].VR = "OW"
    raw.compress(RLELossless)
    yield _file(raw, RLELossless, raw.PixelData)


def _radiograph(bits: int) -> Dataset:
    image = Dataset()
    image.SOPClassUID = "1.2.840.10008.5.1.4.1.1.1.1"
    image.SOPInstanceUID = "1.2.3"
    image.Modality, image.BodyPartExamined, image.ViewPosition = "DX", "CHEST", "PA"
    image.PatientID, image.StudyInstanceUID = "1", "1.2"
    image.SamplesPerPixel, image.PhotometricInterpretation = 1, "MONOCHROME2"
    image.Rows = image.Columns = _SIDE
    image.BitsAllocated = image.BitsStored = bits
    image.HighBit, image.PixelRepresentation = bits - 1, 0
    return image


def _file(image: Dataset, syntax: UID, pixels: bytes) -> bytes:
    image.PixelData = pixels
    image["PixelData"].VR = "OB" if syntax.is_encapsulated or image.BitsAllocated == 8 else "OW"
    image["PixelData"].is_undefined_length = syntax.is_encapsulated
    image.file_meta = FileMetaDataset()
    image.file_meta.TransferSyntaxUID = syntax
    image.file_meta.MediaStorageSOPClassUID = image.SOPClassUID
    image.file_meta.MediaStorageSOPInstanceUID = image.SOPInstanceUID
    target = io.BytesIO()
    # The keyword arguments that pydicom derives from the syntax are those it checks against.
    image.save_as(
        target,
        enforce_file_format=True,
        implicit_vr=syntax.is_implicit_VR,
        little_endian=syntax.is_little_endian,
    )
    return target.getvalue()


def _jpeg() -> Iterator[bytes]:
    grey = _PIXELS.astype(np.uint8)
    colour = cv2.merge([grey, grey[::-1].copy(), grey.T.copy()])
    for picture, options in ((grey, []), (colour, []), (grey, [cv2.IMWRITE_JPEG_PROGRESSIVE, 1])):
        yield cv2.imencode(".jpg", picture, options)[1].tobytes()


def _png() -> Iterator[bytes]:
    grey = _PIXELS.astype(np.uint8)
    for picture in (grey, _PIXELS, cv2.merge([grey] * 3), cv2.merge([grey] * 4)):
        # Without the signature: the target puts it before the chunks, and mends their sums.
        yield cv2.imencode(".png", picture)[1].tobytes()[8:]


def _zip() -> Iterator[bytes]:
    for method in (
        zipfile.ZIP_STORED,
        zipfile.ZIP_DEFLATED,
        zipfile.ZIP_BZIP2,
        zipfile.ZIP_LZMA,
    ):
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w", method) as archive:
            archive.writestr("a.dcm", zlib.compress(b"x" * 50))
            archive.writestr("folder/b.png", b"y" * 300)
            archive.writestr("../c", b"z")
        yield file.getvalue()[4:]


def _contract() -> Iterator[bytes]:
    yield Classifier.load(find_bundle(SHIPPED_DEFAULT)).contract.to_json().encode()


def _bundle() -> Iterator[bytes]:
    files = BundleFiles(folder=Path("/m-1"), model=MODEL, about=ABOUT)
    yield ABOUT + SEPARATOR + sign(files.statement(), KEY).to_bytes()
    yield ABOUT + SEPARATOR
    yield b'{"sha256": "0"}' + SEPARATOR + b"{}"


def _config() -> Iterator[bytes]:
    defaults = Config().model_dump()
    # JSON's texts, numbers and lists are TOML's too.
    lines = [
        f"{name} = {json.dumps(str(value) if isinstance(value, Path) else value)}"
        for name, value in defaults.items()
    ]
    yield "\n".join(lines).encode()
    for line in lines:
        yield line.encode()
    yield b'pacs_destinations = ["A@h:104+tls", "B@[::1]:1"]\npacs_address = "0.0.0.0"\n'
