"""Reader of radiographs: DICOM, PNG and JPEG files, recognised by their content."""

import os
import struct
import zlib
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import cv2
import numpy as np
from numpy.typing import NDArray

from lungwatch.attributes import RadiographMeta
from lungwatch.errors import FileRejected, Flag, LungwatchError, Reason
from lungwatch.files import HEAD_BYTES, FileKind, kind_of
from lungwatch.imaging.codestream import check_jpeg, frame_header
from lungwatch.imaging.dicomfile import check_complete, parse_dicom
from lungwatch.imaging.display import shutter_of, to_display
from lungwatch.imaging.geometry import frame_box, is_orientation_known, square_pixels, turn_upright
from lungwatch.imaging.jpeg import FRAME_MARKERS, marker_segments
from lungwatch.imaging.pixeldata import check_pixels, decode_pixels
from lungwatch.imaging.radiograph import FloatImage, Radiograph, ReadPolicy, meta_of
from lungwatch.imaging.subject import check_not_directory, check_subject
from lungwatch.imaging.vocabulary import vocabulary
from lungwatch.imaging.window import grey_of, is_visible, stretch_range

# 16 bits a pixel leave as much again for what else a file may hold (icons, other copies), and
# small limits leave room for an ordinary header.
_BYTES_PER_PIXEL = 4
_HEADER_BYTES = 64 * 1024 * 1024
OVERLAY_MARGIN = (17, 17, 20)
"""RGB of the margins of the overlays that lungwatch draws: not quite grey, so that they are known
again, also after a conversion to JPEG."""

OVERLAY_MARK = b"Software\0lungwatch"
"""Content of a PNG overlay's tEXt chunk (PNG 1.2, 4.2.3)."""

_RING_PX = 4
_RING_TOLERANCE = 5
_RING_SHARE = 0.99
_LEAST_BLUE = 1.5  # blue above red, of 3; compression of colours takes some of it


def max_file_bytes(policy: ReadPolicy) -> int:
    """Return the size in bytes beyond which no file is a radiograph that `policy` takes."""
    return _BYTES_PER_PIXEL * policy.max_pixels + _HEADER_BYTES


def read_radiograph(source: Path | BinaryIO, policy: ReadPolicy | None = None) -> Radiograph:
    """Read an X-ray from a DICOM, PNG or JPEG file, whatever its name.

    Parameters
    ----------
    source
        Path of the file, or the file itself, open for reading; that one stays open.
    policy
        What is accepted; the defaults of `ReadPolicy` if None.

    Raises
    ------
    FileRejected
        If the file is not a usable chest X-ray, with the reason code.
    OSError
        If the file cannot be read at all (missing, no rights, input/output error).
    """
    policy = policy or ReadPolicy()
    if isinstance(source, Path):
        with source.open("rb") as file:
            return _read(file, policy)
    return _read(source, policy)


def _read(file: BinaryIO, policy: ReadPolicy) -> Radiograph:
    file.seek(0)
    kind = kind_of(file.read(HEAD_BYTES))
    if kind in (FileKind.PNG, FileKind.JPEG):
        radiograph = _read_raster(file, kind, policy.max_pixels)
    elif kind is FileKind.DICOM:
        radiograph = _read_dicom(file, policy)
    elif kind is FileKind.ZIP:
        raise FileRejected(
            Reason.NOT_AN_IMAGE, "a zip archive is not unpacked here; drop the files in it"
        )
    elif file.seek(0, os.SEEK_END) == 0:
        raise FileRejected(Reason.TRUNCATED, "the file is empty")
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


def _read_dicom(file: BinaryIO, policy: ReadPolicy) -> Radiograph:
    """Read a DICOM file's radiograph as its VOI transformation shows it."""
    dataset = parse_dicom(file, max_bytes=max_file_bytes(policy))
    vocabulary()  # loaded here, since errors below are the file's own
    try:
        check_not_directory(dataset)
        # An incomplete file will be sent again, whatever it shows.
        check_complete(dataset)
        flags = check_subject(dataset, policy)
        check_pixels(dataset, policy.max_pixels)
        samples = decode_pixels(dataset)
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
            orientation_known=is_orientation_known(dataset),
        )
    except FileRejected as refusal:
        refusal.meta = meta_of(dataset)
        raise
    except (LungwatchError, MemoryError):
        raise
    # Values are decoded at access, and damaged ones may raise anything.
    except Exception as error:
        raise FileRejected(
            Reason.UNREADABLE, "the DICOM file holds values that cannot be decoded"
        ) from error


def _read_raster(file: BinaryIO, kind: FileKind, max_pixels: int) -> Radiograph:
    """Read a PNG or JPEG file as it looks on a screen: black to 0, and 12 bits in 16 to white."""
    file.seek(0)
    data = file.read()
    # OpenCV silently fills what is missing with grey, and half an X-ray must not be scored: the
    # size is only taken from a file that is whole.
    rows, columns = _png_size(data) if kind is FileKind.PNG else _jpeg_size(data)
    if rows * columns > max_pixels:
        raise FileRejected(
            Reason.TOO_LARGE, f"the image is {columns}x{rows} pixels, more than {max_pixels} in all"
        )
    header = frame_header(data) if kind is FileKind.JPEG else None
    if header is not None and header.precision != 8:
        raise FileRejected(
            Reason.UNSUPPORTED_PIXEL_FORMAT,
            f"JPEG files of {header.precision} bits are not supported, only in DICOM",
        )
    image = _decode_raster(data)
    if image is None:
        # A JPEG's headers are sound by now.
        reason = Reason.UNREADABLE if header is None else Reason.DAMAGED
        raise FileRejected(reason, f"the {kind.name} data cannot be decoded")
    if header is not None:
        check_jpeg(data, header, image)
    if (kind is FileKind.PNG and _has_mark(data)) or _is_overlay(image):
        raise FileRejected(
            Reason.NOT_A_RADIOGRAPH,
            "the picture is an overlay that lungwatch drew; drop the X-ray itself",
        )
    pixels, bits, flags = _to_grey(image)
    return Radiograph(
        pixels=pixels,
        meta=RadiographMeta(
            format=kind.name,
            rows=pixels.shape[0],
            columns=pixels.shape[1],
            bits_stored=bits,
            photometric="MONOCHROME2" if image.ndim == 2 else "RGB",
        ),
        flags=flags,
    )


def _decode_raster(data: bytes) -> NDArray[np.uint8] | NDArray[np.uint16] | None:
    buffer = np.frombuffer(data, dtype=np.uint8)
    try:
        # ANYDEPTH keeps 16 bits; EXIF of an X-ray's photograph states how the telephone was held.
        flags = cv2.IMREAD_ANYDEPTH | cv2.IMREAD_ANYCOLOR | cv2.IMREAD_IGNORE_ORIENTATION
        image = cv2.imdecode(buffer, flags)
    except cv2.error as error:
        raise FileRejected(Reason.UNREADABLE, "the image data cannot be decoded") from error
    return image  # type: ignore[return-value]  # OpenCV's stub knows no element types


def _has_mark(data: bytes) -> bool:
    position = data.find(b"tEXt" + OVERLAY_MARK)
    return 0 <= position < data.find(b"IDAT")


def _is_overlay(image: NDArray[np.uint8] | NDArray[np.uint16]) -> bool:
    """Return whether the outermost pixels have the colour of an overlay's margins."""
    if image.ndim != 3 or image.dtype != np.uint8 or min(image.shape[:2]) <= 2 * _RING_PX:
        return False
    inner = slice(_RING_PX, -_RING_PX)
    outside = np.ones(image.shape[:2], dtype=np.bool_)
    outside[inner, inner] = False
    ring = image[outside][:, 2::-1].astype(np.int16)
    near = np.abs(ring - np.array(OVERLAY_MARGIN, dtype=np.int16)).max(axis=1) <= _RING_TOLERANCE
    blue = float((ring[:, 2] - ring[:, 0]).mean())
    return bool(near.mean() >= _RING_SHARE) and blue >= _LEAST_BLUE


def _to_grey(
    image: NDArray[np.uint8] | NDArray[np.uint16],
) -> tuple[FloatImage, int, tuple[Flag, ...]]:
    """Return grey values, their depth in bits, and a flag if that is not the file's own."""
    word = 8 * image.dtype.itemsize
    # Twelve bits in sixteen are common: an unused highest bit means fewer than 16.
    bits = max(8, min(word, int(image.max()).bit_length()))
    white = 2**bits - 1
    if image.ndim == 3:
        grey = grey_of(image[:, :, 2::-1], white)
    else:
        grey = image.astype(np.float32) / np.float32(white)
    is_corrected = bits != word
    if not is_visible(grey):
        grey, is_corrected = stretch_range(grey), True
    return grey, bits, (Flag.DEPTH_CORRECTED,) if is_corrected else ()


def _png_size(data: bytes) -> tuple[int, int]:
    """Return rows and columns of a PNG file after a check of all its chunks."""
    position, size = 8, None
    while position + 12 <= len(data):
        length = int.from_bytes(data[position : position + 4], "big")
        kind = data[position + 4 : position + 8]
        end = position + 12 + length
        if end > len(data):
            break
        body = data[position + 4 : end - 4]
        if zlib.crc32(body) != int.from_bytes(data[end - 4 : end], "big"):
            raise FileRejected(Reason.UNREADABLE, "a checksum within the PNG file is wrong")
        if kind == b"IHDR":
            size = int.from_bytes(body[8:12], "big"), int.from_bytes(body[4:8], "big")
        if kind == b"IEND" and size is not None:
            return size
        position = end
    raise FileRejected(Reason.TRUNCATED, "the PNG file ends before its image does")


def _jpeg_size(data: bytes) -> tuple[int, int]:
    """Return rows and columns of a JPEG file after a check for its end."""
    size: tuple[int, int] | None = None
    end = 2
    for marker, start, end in marker_segments(data):  # noqa: B007 - used behind the loop
        if marker in FRAME_MARKERS:
            size = struct.unpack_from(">HH", data, start + 1)
        # The end marker of a thumbnail in EXIF lies before the first scan.
        if marker == 0xDA and size is not None:
            if data.find(b"\xff\xd9", start) < 0:
                break
            return size
    if size is None and end + 9 < len(data):
        raise FileRejected(Reason.UNREADABLE, "the JPEG file has no frame header")
    raise FileRejected(Reason.TRUNCATED, "the JPEG file ends before its image does")
