"""Small images by number: caricatures of a chest, each of other bytes, none of a patient."""

import io
import zipfile

import cv2
import numpy as np
import numpy.typing as npt
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ComputedRadiographyImageStorage, ExplicitVRLittleEndian

from lungwatch.preprocess import golden_pixels

SIDE_PX = 64
_LARGE_PX = 3000
_UID_ROOT = "1.2.826.0.1.3680043.8.498.77"


def picture(number: int) -> bytes:
    """Return a PNG; every tenth is a DICOM file instead."""
    return dicom(number) if number % 10 == 9 else png(number)


def png(number: int, *, side_px: int = SIDE_PX) -> bytes:
    """Return a grey PNG of a few kilobytes."""
    return _encoded(_pixels(number, side_px))


def large(number: int) -> bytes:
    """Return a grey PNG whose pixels take tens of megabytes once decoded."""
    small = _pixels(number, SIDE_PX)
    return _encoded(cv2.resize(small, (_LARGE_PX, _LARGE_PX), interpolation=cv2.INTER_LINEAR))


def dicom(number: int) -> bytes:
    """Return a small Computed Radiography image (PS3.3 A.2), uncompressed."""
    pixels = _pixels(number, SIDE_PX)
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID = ComputedRadiographyImageStorage
    dataset.SOPInstanceUID = f"{_UID_ROOT}.{number + 1}"
    dataset.StudyInstanceUID = f"{_UID_ROOT}.0.{number + 1}"
    dataset.SeriesInstanceUID = f"{_UID_ROOT}.1.{number + 1}"
    dataset.Modality = "CR"
    dataset.BodyPartExamined = "CHEST"
    dataset.ViewPosition = "PA"
    dataset.PatientID = f"CHAOS{number}"
    dataset.Rows, dataset.Columns = pixels.shape
    dataset.SamplesPerPixel = 1
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.BitsAllocated = dataset.BitsStored = 8
    dataset.HighBit = 7
    dataset.PixelRepresentation = 0
    dataset.PixelData = pixels.tobytes()
    file = io.BytesIO()
    dataset.save_as(file, enforce_file_format=True)
    return file.getvalue()


def archive(members: dict[str, bytes]) -> bytes:
    """Return a zip archive."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as opened:
        for name, content in members.items():
            opened.writestr(name, content)
    return file.getvalue()


def _encoded(pixels: cv2.typing.MatLike) -> bytes:
    is_encoded, data = cv2.imencode(".png", pixels)
    assert is_encoded
    return data.tobytes()


def _pixels(number: int, side_px: int) -> npt.NDArray[np.uint8]:
    base = cv2.resize(golden_pixels(), (side_px, side_px), interpolation=cv2.INTER_AREA) * 220
    noise = np.random.default_rng(number).normal(10, 5, base.shape)
    pixels: npt.NDArray[np.uint8] = np.clip(base + noise, 0, 255).astype(np.uint8)
    return pixels
