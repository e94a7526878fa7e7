"""Damage in entropy-coded data: what a decoder takes without complaint and makes an image of.

A decoder of JPEG, run-length or JPEG 2000 data goes on after damaged bytes as well as it can.
An X-ray that half of was made up must not be scored, so the stream is held to its own rules:
every code is one of its table's, the image ends where the data end, and no marker stands where
none may. Damage that keeps to all of them, as a single changed bit may, cannot be found.
"""

import struct
from itertools import pairwise
from typing import Any

import numpy as np
import simplejpeg
from numpy.typing import NDArray

from lungwatch.errors import FileRejected, Reason
from lungwatch.imaging import huffman
from lungwatch.imaging.codestream import FrameHeader, start_of_jpeg2000
from lungwatch.imaging.seam import has_seam

_LOSSLESS_PROCESS = 0xC3
_SEQUENTIAL_PROCESSES = (0xC0, 0xC1)
_SOT, _SOD, _EOC = 0x90, 0x93, b"\xff\xd9"
_PACKET_MARKERS = (0x91, 0x92)  # SOP and EPH
_RLE_HEADER_BYTES = 64


def damaged(what: str) -> FileRejected:
    """Return the refusal of a stream whose data are damaged."""
    return FileRejected(Reason.DAMAGED, f"the {what} data are damaged; send the image again")


def check_jpeg(data: bytes, header: FrameHeader, decoded: NDArray[Any]) -> None:
    """Refuse a JPEG whose entropy-coded data are damaged.

    Of 8 bits libjpeg's warnings decide, which other bindings keep to themselves. Sequential and
    lossless scans are followed symbol by symbol as well, and the picture is looked at for the
    step that damage leaves behind it.

    Parameters
    ----------
    decoded
        What the decoder made of it, shape (rows, columns) or (rows, columns, components). Of a
        lossless JPEG in colours nothing is checked.

    Raises
    ------
    FileRejected
        As DAMAGED.
    """
    if header.process == _LOSSLESS_PROCESS:
        if decoded.ndim == 3:
            return  # in whatever order of colours; X-rays are grey
        is_sound = int(decoded.max()) < 2**header.precision and huffman.fits_lossless(
            data, decoded, header.precision
        )
    else:
        plane = decoded if decoded.ndim == 2 else decoded[:, :, 0]
        is_sound = _has_sound_scans(data, header) and not has_seam(
            plane, block=header.unit, white=2**header.precision - 1
        )
    if not is_sound:
        raise damaged("JPEG")


def _has_sound_scans(data: bytes, header: FrameHeader) -> bool:
    if header.precision == 8:
        space = "CMYK" if header.components == 4 else "GRAY"
        try:
            # An eighth of the size takes least time, and all of the data all the same.
            simplejpeg.decode_jpeg(
                data, space, fastdct=True, min_height=1, min_width=1, min_factor=8, strict=True
            )
        except ValueError:
            return False
    return header.process not in _SEQUENTIAL_PROCESSES or huffman.is_sound(data)


def check_jpeg2000(data: bytes) -> None:
    """Refuse a JPEG 2000 stream with a marker in a place where none can be.

    Within coded data no byte after 0xFF is above 0x8F (ISO 15444-1 A.1.3, also of HTJ2K), so
    that foreign bytes show soon. Its codec takes all others for an image.

    Raises
    ------
    FileRejected
        As DAMAGED.
    """
    start = start_of_jpeg2000(data)
    if start is None:
        return
    position = start + 2
    # The main header: marker segments as far as the first tile part.
    while position + 4 <= len(data) and data[position + 1] != _SOT:
        position += 2 + struct.unpack_from(">H", data, position + 2)[0]
    while position + 12 <= len(data) and data[position : position + 2] == bytes((0xFF, _SOT)):
        (length,) = struct.unpack_from(">L", data, position + 6)
        end = position + length if length else data.rfind(_EOC)
        body = position
        while body + 4 <= min(end, len(data)) and data[body + 1] != _SOD:
            body += 2 + struct.unpack_from(">H", data, body + 2)[0]
        if end > len(data) or _has_marker(data[body + 2 : end]):
            raise damaged("JPEG 2000")
        position = end


def _has_marker(body: bytes) -> bool:
    values = np.frombuffer(body, dtype=np.uint8)
    if len(values) < 2:
        return False
    followers = values[np.flatnonzero(values[:-1] == 0xFF) + 1]
    return bool(np.any((followers > 0x8F) & ~np.isin(followers, _PACKET_MARKERS)))


def check_rle(data: bytes, *, segments: int, size: int) -> None:
    """Refuse run-length encoded data that are not those of so many segments of one size.

    Parameters
    ----------
    data
        A frame (PS3.5 G).
    segments
        Bytes of a pixel.
    size
        Pixels: the bytes that each segment unpacks to.

    Raises
    ------
    FileRejected
        As DAMAGED.
    """
    if len(data) < _RLE_HEADER_BYTES:
        raise damaged("run-length encoded")
    count, *offsets = struct.unpack_from("<16L", data)
    bounds = [*offsets[:count], len(data)]
    if count != segments or bounds[0] != _RLE_HEADER_BYTES or bounds != sorted(bounds):
        raise damaged("run-length encoded")
    for start, end in pairwise(bounds):
        if not _unpacks_to(data, start, end, size):
            raise damaged("run-length encoded")


def _unpacks_to(data: bytes, position: int, end: int, size: int) -> bool:
    made = 0
    while made < size and position < end:
        control = data[position]
        if control < 128:
            made += control + 1
            position += control + 2
        elif control > 128:
            made += 257 - control
            position += 2
        else:
            position += 1
    return made == size and position <= end and not any(data[position:end])
