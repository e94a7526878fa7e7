"""Headers of compressed frames: size, components and precision before decoding.

A decoder allocates what the codestream asks for. One wrong byte there can ask for more than
the machine has, and the kernel's answer to that is to kill the process.
"""

import struct
from dataclasses import dataclass

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
        Whether samples have a sign; None in JPEG and JPEG-LS, which know of none.
    process
        The JPEG frame marker's second byte, which names the process (ISO 10918-1 table B.1),
        0xF7 for JPEG-LS; None in JPEG 2000.
    unit
        Height and width in pixels of what JPEG codes at once, its minimum coded unit.
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
        """The standard that the stream is of, by name."""
        if self.process is None:
            return "JPEG 2000"
        return "JPEG-LS" if self.process == _JPEG_LS else "JPEG"


def frame_header(frame: bytes) -> FrameHeader | None:
    """Read the header of a JPEG, JPEG-LS or JPEG 2000 frame.

    Returns
    -------
    FrameHeader or None
        None if the frame is none of these, or its header is not where it should be.
    """
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
    """Return where a JPEG 2000 codestream begins, None if there is none."""
    start = frame.find(_JPEG2000_START, 0, _SEARCHED_BYTES)
    return start if start >= 0 and len(frame) >= start + 43 else None


def _jpeg_header(frame: bytes) -> FrameHeader | None:
    position = 2
    while position + 10 <= len(frame) and frame[position] == 0xFF:
        marker = frame[position + 1]
        if marker == 0xFF:  # fill byte
            position += 1
        # SOF0..SOF15 without DHT, JPG and DAC (ISO 10918-1 B.2.2); SOF55 is JPEG-LS's.
        elif marker == _JPEG_LS or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):
            precision, rows, columns, components = struct.unpack_from(">BHHB", frame, position + 4)
            return FrameHeader(
                rows=rows,
                columns=columns,
                components=components,
                precision=precision,
                process=marker,
                unit=_unit(frame[position + 10 : position + 10 + 3 * components]),
            )
        else:
            (length,) = struct.unpack_from(">H", frame, position + 2)
            position += 2 + length
    return None


def _unit(components: bytes) -> tuple[int, int]:
    """Return a minimum coded unit's size, from the sampling factors (ISO 10918-1 A.2)."""
    sampling = components[1::3]
    if len(sampling) < 2:
        return 8, 8
    tallest = max(factors & 0x0F for factors in sampling)
    widest = max(factors >> 4 for factors in sampling)
    return 8 * max(tallest, 1), 8 * max(widest, 1)
