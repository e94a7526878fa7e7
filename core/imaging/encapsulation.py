"""The one frame of encapsulated pixel data (PS3.5 A.4), found without its offset tables.

A single frame is all the fragments there are, whatever the tables say of it.
"""

import struct
from itertools import pairwise

from pydicom.uid import UID, RLELossless

from lungwatch.errors import FileRejected, Reason

_ITEM = b"\xfe\xff\x00\xe0"
_DELIMITER = b"\xfe\xff\xdd\xe0"
# SOI of JPEG and JPEG-LS, SOC of JPEG 2000; a JP2 file's signature box, against PS3.5 A.4.4.
_STARTS = (b"\xff\xd8\xff", b"\xff\x4f\xff\x51", b"\x00\x00\x00\x0cjP")
_END = b"\xff\xd9"  # EOI and EOC alike
_RLE_HEADER_BYTES = 64
_RLE_MAX_SEGMENTS = 15


def is_encapsulated(value: bytes) -> bool:
    """Whether pixel data begins like encapsulated ones do: with an item for offsets."""
    if not value.startswith(_ITEM) or len(value) < 16:
        return False
    (length,) = struct.unpack_from("<L", value, 4)
    following = value[8 + length : 12 + length]
    return length % 4 == 0 and following in (_ITEM, _DELIMITER)


def is_complete(value: bytes) -> bool:
    """Whether every item of encapsulated pixel data is as long as it says."""
    position = 0
    while position + 8 <= len(value):
        (length,) = struct.unpack_from("<L", value, position + 4)
        tag = value[position : position + 4]
        if tag == _DELIMITER:
            return True
        if tag != _ITEM:
            return True  # not for this check to judge; the codec will
        position += 8 + length
    return position == len(value) and position > 0


def has_ended(value: bytes) -> bool:
    """Whether the last fragment ends as a JPEG or JPEG 2000 stream does.

    Where the sequence's delimiter is missing, this alone tells a whole file from one that was
    cut off between two fragments.
    """
    return value.rstrip(b"\0").endswith(_END)


def single_frame(value: bytes, syntax: UID) -> bytes:
    """Join the fragments of pixel data that hold one frame.

    Raises
    ------
    FileRejected
        If the pixel data is not encapsulated, or holds more than one frame.
    """
    if not value.startswith(_ITEM):
        raise FileRejected(
            Reason.UNREADABLE,
            f"the pixel data is not compressed, though the transfer syntax is '{syntax.name}'",
        )
    fragments = _fragments(value)
    frames = _frames(fragments, syntax)
    if frames > 1:
        raise FileRejected(
            Reason.MULTI_FRAME, f"the pixel data holds {frames} frames, though the file states one"
        )
    if not fragments:
        raise FileRejected(Reason.UNREADABLE, "the compressed pixel data's frame cannot be found")
    return b"".join(fragments)


def _fragments(value: bytes) -> list[bytes]:
    items = []
    position = 0
    while position + 8 <= len(value) and value[position : position + 4] == _ITEM:
        (length,) = struct.unpack_from("<L", value, position + 4)
        items.append(value[position + 8 : position + 8 + length])
        position += 8 + length
    # The first item holds the offset table, or nothing. Files exist that leave it out.
    if items and items[0].startswith(_STARTS):
        return items
    return [item for item in items[1:] if item]


def _frames(fragments: list[bytes], syntax: UID) -> int:
    """Count the fragments that begin a frame after another has ended."""
    count = 1 if fragments else 0
    for before, fragment in pairwise(fragments):
        if syntax == RLELossless:
            count += _is_rle_header(fragment)
        else:
            count += fragment.startswith(_STARTS) and has_ended(before)
    return count


def _is_rle_header(fragment: bytes) -> bool:
    """Whether bytes begin like an RLE frame does (PS3.5 G.5)."""
    if len(fragment) < _RLE_HEADER_BYTES:
        return False
    segments, *offsets = struct.unpack_from("<16L", fragment)
    return bool(0 < segments <= _RLE_MAX_SEGMENTS and offsets[0] == _RLE_HEADER_BYTES)
