"""Recognise a file by its content and hand it to the reader of its format."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lungwatch.errors import FileRejected, Reason
from lungwatch.imaging import dicom, raster
from lungwatch.imaging.radiograph import Radiograph

# The longest signature: the DICOM preamble and its "DICM".
_HEAD_BYTES = 132
ZIP_SIGNATURE = b"PK\x03\x04"


@dataclass(frozen=True, kw_only=True)
class ReadPolicy:
    """What is taken for a chest radiograph, and how large an image may be.

    Attributes
    ----------
    modalities
        Values of Modality (0008,0060) that are projection radiographs.
    body_parts
        Values of BodyPartExamined (0018,0015) that show the lungs. A file without the
        attribute passes: it is optional in CR and DX (PS3.3 C.8.1.1, C.8.11.2).
    reject_lateral
        Refuse files whose ViewPosition (0018,5101) is lateral or oblique.
    min_side_px, max_pixels
        Smallest side and largest area that are read.
    """

    modalities: frozenset[str] = frozenset({"CR", "DX", "RG"})
    body_parts: frozenset[str] = frozenset({"CHEST", "THORAX", "LUNG", "LUNGS", "CHEST WALL"})
    reject_lateral: bool = True
    min_side_px: int = 64
    max_pixels: int = 120_000_000


def is_zip(path: Path) -> bool:
    """Whether a file is a zip archive by its content.

    Raises
    ------
    OSError
        If the file cannot be read.
    """
    with path.open("rb") as file:
        return file.read(len(ZIP_SIGNATURE)) == ZIP_SIGNATURE


def max_file_bytes(policy: ReadPolicy) -> int:
    """Return the size in bytes beyond which no file is a radiograph that `policy` takes."""
    return dicom.max_file_bytes(policy.max_pixels)


def read_radiograph(path: Path, policy: ReadPolicy | None = None) -> Radiograph:
    """Read an X-ray from a DICOM, PNG or JPEG file, whatever its name.

    Parameters
    ----------
    path
        The file. Its extension is not looked at.
    policy
        What is accepted; the defaults of `ReadPolicy` if None.

    Returns
    -------
    Radiograph
        Grey values float32 in 0..1, air dark.

    Raises
    ------
    FileRejected
        If the file is no usable chest X-ray, with the reason code.
    OSError
        If the file cannot be read at all (missing, no rights, input/output error).
    """
    policy = policy or ReadPolicy()
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    if raster.is_raster(head):
        radiograph = raster.read(path, policy.max_pixels)
    elif dicom.is_dicom(head):
        radiograph = dicom.read(
            path,
            modalities=policy.modalities,
            body_parts=policy.body_parts,
            reject_lateral=policy.reject_lateral,
            max_pixels=policy.max_pixels,
        )
    elif not head:
        raise FileRejected(Reason.TRUNCATED, "the file is empty")
    elif head.startswith(ZIP_SIGNATURE):
        raise FileRejected(
            Reason.NOT_AN_IMAGE, "a zip archive is not unpacked here; drop the files in it"
        )
    else:
        raise FileRejected(Reason.NOT_AN_IMAGE, "the content is neither DICOM, PNG nor JPEG")

    if min(radiograph.pixels.shape) < policy.min_side_px:
        rows, columns = radiograph.pixels.shape
        raise FileRejected(
            Reason.TOO_SMALL,
            f"the image is {columns}x{rows} pixels, less than {policy.min_side_px} on a side",
        )
    if float(np.ptp(radiograph.pixels)) == 0.0:
        raise FileRejected(Reason.NO_CONTRAST, "every pixel has the same value")
    return radiograph
