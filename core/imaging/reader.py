"""Reader of radiographs: DICOM, PNG and JPEG files, recognised by their content."""

import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from lungwatch.errors import FileRejected, Flag, LungwatchError, Reason
from lungwatch.imaging.codestream import check_jpeg, frame_header
from lungwatch.imaging.dicomfile import check_complete, is_dicom, parse_dicom
from lungwatch.imaging.display import shutter_of, to_display
from lungwatch.imaging.geometry import frame_box, is_orientation_known, square_pixels, turn_upright
from lungwatch.imaging.pixeldata import check_pixels, decode_pixels
from lungwatch.imaging.radiograph import FloatImage, Radiograph, RadiographMeta, meta_of
from lungwatch.imaging.subject import check_not_directory, check_subject
from lungwatch.imaging.vocabulary import vocabulary
from lungwatch.imaging.window import grey_of, is_visible, stretch_range

# 16 bits a pixel leave as much again for what else a file may hold (icons, other copies), and
# small limits leave room for an ordinary header.
_BYTES_PER_PIXEL = 4

_DICOM_HEADER_BYTES = 64 * 1024 * 1024


def max_dicom_bytes(max_pixels: int) -> int:
    """Return the size in bytes that a file with this many pixels may have."""
    return _BYTES_PER_PIXEL * max_pixels + _DICOM_HEADER_BYTES


def read_dicom(
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
    dataset = parse_dicom(path, max_bytes=max_dicom_bytes(max_pixels))
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
    # Values are decoded when looked at, and damaged ones may raise anything at all.
    except Exception as error:
        raise FileRejected(
            Reason.UNREADABLE, "the DICOM file holds values that cannot be decoded"
        ) from error


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


def read_raster(path: Path, max_pixels: int) -> Radiograph:
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
    image = _decode_raster(data)
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


def _decode_raster(data: bytes) -> NDArray[np.uint8] | NDArray[np.uint16] | None:
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
        grey, is_corrected = stretch_range(grey), True
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
    return max_dicom_bytes(policy.max_pixels)


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
    if is_raster(head):
        radiograph = read_raster(path, policy.max_pixels)
    elif is_dicom(head):
        radiograph = read_dicom(
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
