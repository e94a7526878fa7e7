"""DICOM files: which of them are chest radiographs, and their pixels for display."""

from pathlib import Path

from lungwatch.errors import FileRejected, LungwatchError, Reason
from lungwatch.flags import Flag
from lungwatch.imaging.attributes import meta_of
from lungwatch.imaging.dicomfile import check_complete, is_dicom, parse
from lungwatch.imaging.geometry import square_pixels
from lungwatch.imaging.grayscale import to_display
from lungwatch.imaging.orientation import is_known, turn_upright
from lungwatch.imaging.pixeldata import check_pixels, decode
from lungwatch.imaging.radiograph import Radiograph
from lungwatch.imaging.shutter import shutter_of
from lungwatch.imaging.subject import check_not_directory, check_subject
from lungwatch.imaging.vocabulary import vocabulary

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
    view_positions: frozenset[str],
    reject_lateral: bool,
    max_pixels: int,
) -> Radiograph:
    """Read a DICOM file's radiograph as its VOI transformation shows it.

    Parameters
    ----------
    path
        A file for which `is_dicom` holds.
    modalities, body_parts, view_positions, reject_lateral, max_pixels
        As in `lungwatch.imaging.ReadPolicy`.

    Raises
    ------
    FileRejected
        If the file is no chest radiograph, or is damaged.
    OSError
        If the file cannot be read at all.
    """
    dataset = parse(path, max_bytes=max_file_bytes(max_pixels))
    vocabulary()  # read here, since below any trouble is the file's own
    try:
        check_not_directory(dataset)
        # A file that was cut off comes again whole, whatever it shows: say that first.
        check_complete(dataset)
        flags = check_subject(
            dataset,
            modalities=modalities,
            body_parts=body_parts,
            view_positions=view_positions,
            reject_lateral=reject_lateral,
        )
        check_pixels(dataset, max_pixels)
        samples = decode(dataset)
        hidden, is_ignored = shutter_of(dataset, samples.values.shape[:2])
        if hidden is not None:
            flags = (*flags, Flag.SHUTTER_APPLIED)
        if is_ignored:
            flags = (*flags, Flag.SHUTTER_IGNORED)
        displayed = to_display(samples, dataset, hidden)
        pixels = square_pixels(displayed.pixels, dataset)
        upright = turn_upright(pixels, dataset)
        if upright is not pixels:
            flags = (*flags, Flag.ORIENTATION_CORRECTED)
        return Radiograph(
            pixels=upright,
            meta=meta_of(dataset),
            flags=(*flags, *displayed.flags),
            orientation_known=is_known(dataset),
        )
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
