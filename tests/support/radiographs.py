"""Small DICOM radiographs, made as a test needs them."""

from pathlib import Path

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ComputedRadiographyImageStorage, ExplicitVRLittleEndian

from lungwatch.imaging.radiograph import Radiograph, ReadPolicy
from lungwatch.imaging.reader import read_radiograph


def radiograph(pixels: NDArray[np.uint16] | None = None, **changes: object) -> Dataset:
    """Return a CR chest image of 12 bits; a change to None takes an attribute away."""
    if pixels is None:
        pixels = (np.indices((80, 100)).sum(axis=0) * 20).astype(np.uint16)
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID = ComputedRadiographyImageStorage
    dataset.SOPInstanceUID = "1.2.826.0.1.3680043.8.498.2"
    dataset.ImageType = ["ORIGINAL", "PRIMARY"]
    dataset.Modality = "CR"
    dataset.BodyPartExamined, dataset.ViewPosition = "CHEST", "PA"
    dataset.Rows, dataset.Columns = pixels.shape
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 12, 11
    dataset.PixelRepresentation, dataset.SamplesPerPixel = 0, 1
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.WindowCenter, dataset.WindowWidth = "2048", "4096"
    dataset.PixelData = pixels.tobytes()
    with pydicom.config.disable_value_validation():
        for keyword, value in changes.items():
            if value is None:
                delattr(dataset, keyword)
            else:
                setattr(dataset, keyword, value)
    return dataset


def code(value: str, scheme: str, meaning: str) -> list[Dataset]:
    """Return a code sequence of one item."""
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, scheme, meaning
    return [item]


def read(dataset: Dataset, tmp_path: Path, policy: ReadPolicy | None = None) -> Radiograph:
    """Write a data set as a file and read that."""
    path = tmp_path / "image"
    with pydicom.config.disable_value_validation():
        pydicom.dcmwrite(path, dataset, enforce_file_format=True)
    return read_radiograph(path, policy)
