"""DICOM files: which of them are chest radiographs, and their pixels for display."""

from pathlib import Path

from lungwatch.errors import FileRejected, LungwatchError, Reason
from lungwatch.imaging.attributes import meta_of
from lungwatch.imaging.dicomfile import check_complete, is_dicom, parse
from lungwatch.imaging.geometry import square_pixels
from lungwatch.imaging.grayscale import to_display
from lungwatch.imaging.pixeldata import check_pixels, decode
from lungwatch.imaging.radiograph import Radiograph
from lungwatch.imaging.subject import check_not_directory, check_subject

__all__ = ["is_dicom", "max_file_bytes", "read"]

# 16 bits a pixel leave as much again for what else a file may hold (icons, other copies), and
# small limits leave room for an ordinary header.
_BYTES_PER_PIXEL = 4
_HEADER_BYTES = 64 * 1024 * 1024


def max_file_bytes(max_pixels: int) -> int:
    """Return the size in bytes that a file with this many pixels may have."""
    return _BYTES_PER_PIXEL * max_pixels + _HEADER_BYTES


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
    dataset = parse(path, max_bytes=max_file_bytes(max_pixels))
    try:
        check_not_directory(dataset)
        # A file that was cut off comes again whole, whatever it shows: say that first.
        check_complete(dataset)
        check_subject(
            dataset, modalities=modalities, body_parts=body_parts, reject_lateral=reject_lateral
        )
        check_pixels(dataset, max_pixels)
        displayed = to_display(decode(dataset), dataset)
        pixels = square_pixels(displayed.pixels, dataset)
        return Radiograph(pixels=pixels, meta=meta_of(dataset), flags=displayed.flags)
    except FileRejected as refusal:
        refusal.meta = meta_of(dataset)
        raise
    except (LungwatchError, MemoryError):
        raise
    # Values are decoded when looked at, and damaged ones may raise anything at all.
    except Exception as error:
        raise FileRejected(
            Reason.UNREADABLE, "the DICOM file holds values that cannot be decoded"
        ) from error
