"""The scans of a JPEG stream with their tables, read from its marker segments (ISO 10918-1 B)."""

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

# Markers without a length: TEM, RST0..7, SOI, EOI.
_BARE = {0x01, *range(0xD0, 0xDA)}


class DamageError(Exception):
    """The stream breaks a rule of its own."""


@dataclass(kw_only=True)
class Component:
    """Sampling factors and quantisation table of a component."""

    horizontal: int
    vertical: int
    quantiser: int


@dataclass(frozen=True, kw_only=True)
class ScanComponent:
    """A component in a scan, with its Huffman tables as their marker segments define them."""

    component: Component
    dc_table: bytes
    ac_table: bytes


@dataclass(frozen=True, kw_only=True)
class Scan:
    """A scan's tables and data.

    Attributes
    ----------
    components
        In the order of their blocks.
    selection, shift
        Predictor and point transform of the lossless process.
    interval
        Minimum coded units between restarts, 0 for none.
    segments
        Entropy-coded data between restart markers, without stuffed bytes.
    """

    components: list[ScanComponent]
    selection: int
    shift: int
    interval: int
    segments: list[bytes]


@dataclass(kw_only=True)
class StreamState:
    """What the marker segments before a scan have set."""

    precision: int = 0
    rows: int = 0
    columns: int = 0
    interval: int = 0
    components: dict[int, Component] = field(default_factory=dict)
    first_quanta: dict[int, int] = field(default_factory=dict)
    tables: dict[int, bytes] = field(default_factory=dict)


def scans_of(data: bytes, state: StreamState) -> Iterator[Scan]:
    """Read a stream's marker segments, and yield its scans.

    Parameters
    ----------
    state
        Is set by the segments before each scan.

    Raises
    ------
    DamageError
        If the stream breaks off, or its restart markers are out of order. What names something
        that the stream does not have comes out as IndexError, KeyError, ValueError or
        struct.error.
    """
    position = 2
    while position + 2 <= len(data):
        marker = data[position + 1]
        if data[position] != 0xFF:
            raise DamageError
        if marker == 0xFF:  # fill byte
            position += 1
            continue
        if marker == 0xD9:
            return
        if marker in _BARE:
            position += 2
            continue
        (length,) = struct.unpack_from(">H", data, position + 2)
        body = data[position + 4 : position + 2 + length]
        position += 2 + length
        if marker == 0xDA:
            end, segments = _entropy_coded(data, position)
            yield _scan(body, segments, state)
            position = end
        else:
            _set(marker, body, state)
    raise DamageError


def _set(marker: int, body: bytes, state: StreamState) -> None:
    if marker == 0xDD:
        (state.interval,) = struct.unpack(">H", body)
    elif marker == 0xC4:
        _read_tables(body, state)
    elif marker == 0xDB:
        _read_quanta(body, state)
    elif 0xC0 <= marker <= 0xCF and marker not in (0xC8, 0xCC):
        state.precision, state.rows, state.columns, count = struct.unpack_from(">BHHB", body)
        for number in range(count):
            identity, sampling, quantiser = body[6 + 3 * number : 9 + 3 * number]
            state.components[identity] = Component(
                horizontal=sampling >> 4, vertical=sampling & 0x0F, quantiser=quantiser
            )


def _read_tables(body: bytes, state: StreamState) -> None:
    position = 0
    while position < len(body):
        end = position + 17 + sum(body[position + 1 : position + 17])
        state.tables[body[position]] = body[position + 1 : end]
        position = end


def _read_quanta(body: bytes, state: StreamState) -> None:
    position = 0
    while position < len(body):
        is_wide = body[position] >> 4
        first = struct.unpack_from(">H" if is_wide else ">B", body, position + 1)[0]
        state.first_quanta[body[position] & 0x0F] = first
        position += 1 + (128 if is_wide else 64)


def _scan(body: bytes, segments: list[bytes], state: StreamState) -> Scan:
    count = body[0]
    components = []
    for number in range(count):
        identity, selectors = body[1 + 2 * number : 3 + 2 * number]
        components.append(
            ScanComponent(
                component=state.components[identity],
                dc_table=state.tables[selectors >> 4],
                ac_table=state.tables.get(0x10 | (selectors & 0x0F), b""),
            )
        )
    return Scan(
        components=components,
        selection=body[1 + 2 * count],
        shift=body[3 + 2 * count] & 0x0F,
        interval=state.interval,
        segments=segments,
    )


def _entropy_coded(data: bytes, start: int) -> tuple[int, list[bytes]]:
    """Return where a scan ends, and its data without stuffed bytes, by restart interval."""
    values = np.frombuffer(data, dtype=np.uint8, offset=start)
    followers = values[1:]
    marked = np.flatnonzero((values[:-1] == 0xFF) & (followers != 0) & (followers != 0xFF))
    kinds = followers[marked]
    is_restart = (kinds >= 0xD0) & (kinds <= 0xD7)
    others = np.flatnonzero(~is_restart)
    if not len(others):
        raise DamageError
    last = int(others[0])
    # Restart markers are numbered round and round.
    if not np.array_equal(kinds[:last], 0xD0 + np.arange(last) % 8):
        raise DamageError
    end = start + int(marked[last])
    bounds = [start - 2, *(start + int(place) for place in marked[:last]), end]
    segments = [
        data[before + 2 : after].rstrip(b"\xff").replace(b"\xff\x00", b"\xff")
        if after > before + 2
        else b""
        for before, after in pairwise(bounds)
    ]
    return end, segments
