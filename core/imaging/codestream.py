"""Codestreams: headers of compressed frames, and checks for damage that decoders ignore.

A decoder allocates what the codestream asks for, and continues after damaged bytes: sizes are
compared before, and the stream is checked against its own rules. Damage that breaks none of them,
such as a single changed bit, cannot be found.
"""

import struct
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import simplejpeg
from numpy.typing import NDArray

from lungwatch.errors import FileRejected, Reason
from lungwatch.imaging import jpeg

_JPEG2000_START = b"\xff\x4f\xff\x51"  # SOC and SIZ, which follow each other: ISO 15444-1 A.4
_JPEG_LS = 0xF7  # SOF55
_JPEG_START = b"\xff\xd8"
# A JP2 file's boxes may come first, against PS3.5 A.4.4.
_SEARCHED_BYTES = 4096


@dataclass(frozen=True, kw_only=True)
class FrameHeader:
    """The head of a JPEG, JPEG-LS or JPEG 2000 frame.

    Attributes
    ----------
    rows, columns
        In pixels.
    components
        Samples of a pixel.
    precision
        Bits of a sample.
    is_signed
        Whether samples have a sign; None in JPEG and JPEG-LS, which have none.
    process
        The JPEG frame marker's second byte, which names the process (ISO 10918-1 table B.1),
        0xF7 for JPEG-LS; None in JPEG 2000.
    unit
        Height and width of JPEG's minimum coded unit, in pixels.
    """

    rows: int
    columns: int
    components: int
    precision: int
    is_signed: bool | None = None
    process: int | None = None
    unit: tuple[int, int] = (8, 8)

    @property
    def family(self) -> str:
        """Name of the stream's standard."""
        if self.process is None:
            return "JPEG 2000"
        return "JPEG-LS" if self.process == _JPEG_LS else "JPEG"


def frame_header(frame: bytes) -> FrameHeader | None:
    """Read the header of a JPEG, JPEG-LS or JPEG 2000 frame; None if there is none."""
    start = start_of_jpeg2000(frame)
    if start is not None:
        # X and Y extents and the image's offset within them: ISO 15444-1 A.5.1.
        right, bottom, left, top = struct.unpack_from(">4L", frame, start + 8)
        components, depth = struct.unpack_from(">HB", frame, start + 40)
        return FrameHeader(
            rows=bottom - top,
            columns=right - left,
            components=components,
            precision=(depth & 0x7F) + 1,
            is_signed=bool(depth & 0x80),
        )
    return _jpeg_header(frame) if frame.startswith(_JPEG_START) else None


def start_of_jpeg2000(frame: bytes) -> int | None:
    """Return the position of a JPEG 2000 codestream; None if there is none."""
    start = frame.find(_JPEG2000_START, 0, _SEARCHED_BYTES)
    return start if start >= 0 and len(frame) >= start + 43 else None


def _jpeg_header(frame: bytes) -> FrameHeader | None:
    for marker, start, _ in jpeg.marker_segments(frame):
        if marker in jpeg.FRAME_MARKERS or marker == _JPEG_LS:
            precision, rows, columns, components = struct.unpack_from(">BHHB", frame, start)
            return FrameHeader(
                rows=rows,
                columns=columns,
                components=components,
                precision=precision,
                process=marker,
                unit=_unit(frame[start + 6 : start + 6 + 3 * components]),
            )
    return None


def _unit(components: bytes) -> tuple[int, int]:
    """Return a minimum coded unit's size, from the sampling factors (ISO 10918-1 A.2)."""
    sampling = components[1::3]
    if len(sampling) < 2:
        return 8, 8
    tallest = max(factors & 0x0F for factors in sampling)
    widest = max(factors >> 4 for factors in sampling)
    return 8 * max(tallest, 1), 8 * max(widest, 1)


# Smallest step, in grey levels of 256.
_MIN_STEP = 5.0
# Share of blocks along the step that may differ from it; largest step before and behind it.
_MAX_STRAY = 0.4
_MAX_AROUND = 0.35
# An edge of the picture's own, as of a frame, begins with a row of blocks.
_ROW_START_SHARE = 0.02
_ROW_START_BLOCKS = 3
_MIN_BLOCKS = 12
_MIN_BLOCK_ROWS = 4


def has_seam(grey: NDArray[Any], *, block: tuple[int, int], white: int) -> bool:
    """Return whether a decoded JPEG has a step from one block on to the end of the image.

    A block's mean is coded as the difference from that of the block before. Where damage changes a
    difference and the codes are right again behind it, everything that follows is lighter or
    darker by the same amount: to the end of that row of blocks, and in all rows below.

    Parameters
    ----------
    grey
        Shape (rows, columns), from 0 to `white`.
    block
        Height and width of the minimum coded unit, in pixels.
    """
    columns = grey.shape[1] // block[1]
    if columns < _MIN_BLOCKS or grey.shape[0] // block[0] < _MIN_BLOCK_ROWS:
        return False
    steps = _steps(grey, *block) * (255.0 / white)
    flat = steps.ravel()
    # A row of blocks is as long as the step: a median over it is the step's height.
    windows = np.lib.stride_tricks.sliding_window_view(flat, columns)
    totals = np.convolve(flat, np.ones(columns), "valid") / columns
    for start in np.flatnonzero(np.abs(totals) > _MIN_STEP / 2):
        within_row = min(start % columns, columns - start % columns)
        if within_row <= max(_ROW_START_BLOCKS, _ROW_START_SHARE * columns):
            continue
        height = float(np.median(windows[start]))
        if abs(height) < _MIN_STEP:
            continue
        stray = float(np.mean(np.abs(windows[start] - height) > abs(height) / 2))
        before = flat[max(0, start - columns) : start - 1]
        behind = flat[start + columns + 1 : start + 2 * columns]
        if (
            stray <= _MAX_STRAY
            and abs(_median(before)) <= _MAX_AROUND * abs(height)
            and abs(_median(behind)) <= _MAX_AROUND * abs(height)
            and _is_sharp(flat, int(start), columns, height)
        ):
            return True
    return False


def _steps(grey: NDArray[Any], height: int, width: int) -> NDArray[np.float64]:
    """Return how much lighter each block is than the one above, without the trend of the rows."""
    rows, columns = grey.shape[0] // height * height, grey.shape[1] // width * width
    values = grey[:rows, :columns].astype(np.float64)
    below, above = values[height::height], values[height - 1 : -1 : height]
    trend = (values[height + 1 :: height] - below) + (above - values[height - 2 : -2 : height])
    step = below - above - trend / 2
    return np.asarray(step.reshape(len(step), -1, width).mean(axis=2))


def _is_sharp(flat: NDArray[np.float64], start: int, columns: int, height: float) -> bool:
    """Return whether the step has its height at both ends, and begins and ends sharply."""
    near = max(3, columns // 12)
    pairs = (
        (flat[start : start + near], flat[max(0, start - near) : start]),
        (flat[start + columns - near : start + columns], flat[start + columns :][:near]),
    )
    return all(
        len(outside) > 0
        and abs(_median(inside) - height) <= abs(height) / 2
        and abs(_median(outside)) <= abs(height) / 2
        for inside, outside in pairs
    )


def _median(values: NDArray[np.float64]) -> float:
    return float(np.median(values)) if len(values) else 0.0


_LOSSLESS_PROCESS = 0xC3
_SEQUENTIAL_PROCESSES = (0xC0, 0xC1)
_SOT, _SOD, _EOC = 0x90, 0x93, b"\xff\xd9"
_PACKET_MARKERS = (0x91, 0x92)  # SOP and EPH
_RLE_HEADER_BYTES = 64


def damaged(what: str) -> FileRejected:
    """Return the rejection of a stream whose data are damaged."""
    return FileRejected(Reason.DAMAGED, f"the {what} data are damaged; send the image again")


def check_jpeg(data: bytes, header: FrameHeader, decoded: NDArray[Any]) -> None:
    """Refuse a JPEG whose entropy-coded data are damaged.

    libjpeg's warnings decide for 8 bits. Sequential and lossless scans are followed symbol by
    symbol as well, and the picture is searched for the step that damage leaves (`has_seam`).

    Parameters
    ----------
    decoded
        The image, shape (rows, columns) or (rows, columns, components). A lossless JPEG in
        colours is not checked.

    Raises
    ------
    FileRejected
        As DAMAGED.
    """
    if header.process == _LOSSLESS_PROCESS:
        if decoded.ndim == 3:
            return  # X-rays are grey
        is_sound = int(decoded.max()) < 2**header.precision and jpeg.fits_lossless(
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
            # An eighth of the size is fastest, and all data are still decoded.
            simplejpeg.decode_jpeg(
                data, space, fastdct=True, min_height=1, min_width=1, min_factor=8, strict=True
            )
        except ValueError:
            return False
    return header.process not in _SEQUENTIAL_PROCESSES or jpeg.has_sound_scans(data)


def check_jpeg2000(data: bytes) -> None:
    """Refuse a JPEG 2000 stream with a marker in a place where none can be.

    Within coded data no byte after 0xFF is above 0x8F (ISO 15444-1 A.1.3, also of HTJ2K), so
    that foreign bytes are found soon. The codec accepts almost any other bytes.

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
    """Refuse a run-length encoded frame (PS3.5 G) whose segments do not have the right size.

    Parameters
    ----------
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
