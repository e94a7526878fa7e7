"""PNG and JPEG files, 8 and 16 bits, grey or colour."""

import zlib
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from lungwatch.errors import FileRejected, Reason
from lungwatch.flags import Flag
from lungwatch.imaging.codestream import frame_header
from lungwatch.imaging.colour import grey_of
from lungwatch.imaging.entropy import check_jpeg
from lungwatch.imaging.radiograph import FloatImage, Radiograph, RadiographMeta
from lungwatch.imaging.tone import is_visible, own_range

_PNG = b"\x89PNG\r\n\x1a\n"
_JPEG = b"\xff\xd8\xff"

OVERLAY_MARGIN = (17, 17, 20)
"""RGB of the margins of the overlays that lungwatch draws: not quite grey, so that they are known
again, also after a conversion to JPEG."""

OVERLAY_MARK = b"Software\0lungwatch"
"""Content of a PNG overlay's tEXt chunk (PNG 1.2, 4.2.3)."""

_RING_PX = 4
_RING_TOLERANCE = 5
_RING_SHARE = 0.99
_LEAST_BLUE = 1.5  # blue above red, of 3; compression of colours takes some of it


def is_raster(head: bytes) -> bool:
    """Whether the first bytes of a file are those of a PNG or a JPEG file."""
    return head.startswith((_PNG, _JPEG))


def read(path: Path, max_pixels: int) -> Radiograph:
    """Read a PNG or JPEG file as it looks on a screen: black to 0, and 12 bits in 16 to white.

    Parameters
    ----------
    path
        A file for which `is_raster` holds.
    max_pixels
        Largest area that is decoded; the header is checked before the pixels are.

    Raises
    ------
    FileRejected
        If the file is truncated, damaged or too large, or the picture is in colours or an
        overlay of lungwatch's own.
    OSError
        If the file cannot be read at all.
    """
    data = path.read_bytes()
    kind = "PNG" if data.startswith(_PNG) else "JPEG"
    # OpenCV fills what is missing with grey and says nothing, and half an X-ray must not be
    # scored: the size is only taken from a file that is whole.
    rows, columns = _png_size(data) if kind == "PNG" else _jpeg_size(data)
    if rows * columns > max_pixels:
        raise FileRejected(
            Reason.TOO_LARGE, f"the image is {columns}x{rows} pixels, more than {max_pixels} in all"
        )
    header = frame_header(data) if kind == "JPEG" else None
    if header is not None and header.precision != 8:
        raise FileRejected(
            Reason.UNSUPPORTED_PIXEL_FORMAT,
            f"JPEG files of {header.precision} bits are not supported, only in DICOM",
        )
    image = _decode(data)
    if image is None:
        # A JPEG's headers are sound by now, and the rest has no checksum that could tell.
        reason = Reason.UNREADABLE if header is None else Reason.DAMAGED
        raise FileRejected(reason, f"the {kind} data cannot be decoded")
    if header is not None:
        # OpenCV mends what it can, and says nothing.
        check_jpeg(data, header, image)
    if (kind == "PNG" and _has_mark(data)) or _is_overlay(image):
        raise FileRejected(
            Reason.NOT_A_RADIOGRAPH,
            "the picture is an overlay that lungwatch drew; drop the X-ray itself",
        )
    pixels, bits, flags = _to_grey(image)
    return Radiograph(
        pixels=pixels,
        meta=RadiographMeta(
            format=kind,
            rows=pixels.shape[0],
            columns=pixels.shape[1],
            bits_stored=bits,
            photometric="MONOCHROME2" if image.ndim == 2 else "RGB",
        ),
        flags=flags,
    )


def _decode(data: bytes) -> NDArray[np.uint8] | NDArray[np.uint16] | None:
    buffer = np.frombuffer(data, dtype=np.uint8)
    try:
        # ANYDEPTH keeps 16 bits; IGNORE_ORIENTATION, since EXIF of an X-ray's photograph is
        # about how the telephone was held.
        flags = cv2.IMREAD_ANYDEPTH | cv2.IMREAD_ANYCOLOR | cv2.IMREAD_IGNORE_ORIENTATION
        image = cv2.imdecode(buffer, flags)
    except cv2.error as error:
        raise FileRejected(Reason.UNREADABLE, "the image data cannot be decoded") from error
    return image  # type: ignore[return-value]  # OpenCV's stub knows no element types


def _has_mark(data: bytes) -> bool:
    position = data.find(b"tEXt" + OVERLAY_MARK)
    return 0 <= position < data.find(b"IDAT")


def _is_overlay(image: NDArray[np.uint8] | NDArray[np.uint16]) -> bool:
    """Whether the outermost pixels have the colour of an overlay's margins."""
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
    # Twelve bits in sixteen are common. What leaves the highest bit unused is no 16 bits.
    bits = max(8, min(word, int(image.max()).bit_length()))
    white = 2**bits - 1
    if image.ndim == 3:
        grey = grey_of(image[:, :, 2::-1], white)
    else:
        grey = image.astype(np.float32) / np.float32(white)
    is_corrected = bits != word
    if not is_visible(grey):
        grey, is_corrected = own_range(grey), True
    return grey, bits, (Flag.DEPTH_CORRECTED,) if is_corrected else ()


def _png_size(data: bytes) -> tuple[int, int]:
    """Rows and columns of a PNG file, once all its chunks are seen to be whole."""
    position, size = len(_PNG), None
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
    """Rows and columns of a JPEG file, once its end is seen to be there."""
    position, size = 2, None
    while position + 9 < len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        length = int.from_bytes(data[position + 2 : position + 4], "big")
        if marker == 0xFF:  # fill byte
            position += 1
            continue
        # SOF0..SOF15 without DHT, JPG and DAC: the frame header.
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            rows = int.from_bytes(data[position + 5 : position + 7], "big")
            size = rows, int.from_bytes(data[position + 7 : position + 9], "big")
        if marker == 0xDA and size is not None:
            # The end marker of a thumbnail in EXIF lies before the first scan.
            if data.find(b"\xff\xd9", position) < 0:
                break
            return size
        position += 2 + length
    if size is None and position + 9 < len(data):
        raise FileRejected(Reason.UNREADABLE, "the JPEG file has no frame header")
    raise FileRejected(Reason.TRUNCATED, "the JPEG file ends before its image does")
