"""Recognise a file by its content and hand it to the reader of its format."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from lungwatch.errors import FileRejected, Reason
from lungwatch.flags import Flag
from lungwatch.imaging import dicom, raster
from lungwatch.imaging.frame import frame_box
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
        Values of BodyPartExamined (0018,0015), in capitals, that are taken for the chest beside
        those that `vocabulary.toml` knows.
    view_positions
        Values of ViewPosition (0018,5101), in capitals, that are taken for a frontal view beside
        those that `vocabulary.toml` knows.
    reject_lateral
        Refuse files whose ViewPosition, View Code Sequence or Patient Orientation is not that of
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
            view_positions=policy.view_positions,
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

    if float(np.ptp(radiograph.pixels)) == 0.0:
        raise FileRejected(Reason.NO_CONTRAST, "every pixel has the same value")
    radiograph = _without_frame(radiograph)
    if min(radiograph.pixels.shape) < policy.min_side_px:
        rows, columns = radiograph.pixels.shape
        raise FileRejected(
            Reason.TOO_SMALL,
            f"the image is {columns}x{rows} pixels, less than {policy.min_side_px} on a side",
        )
    return radiograph


def _without_frame(radiograph: Radiograph) -> Radiograph:
    kept = frame_box(radiograph.pixels)
    if kept is None:
        return radiograph
    return replace(
        radiograph,
        pixels=np.ascontiguousarray(kept.of(radiograph.pixels)),
        flags=(*radiograph.flags, Flag.FRAME_REMOVED),
        kept=kept,
    )
