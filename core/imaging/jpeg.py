"""JPEG scans (ISO 10918-1 B, F and H): marker segments, and Huffman codes without an image.

libjpeg accepts a block of more coefficients than there are and a mean outside of all grey values;
for 12 bits and the lossless process no library says whether the data are sound.
"""

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

FRAME_MARKERS = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
"""SOF0..SOF15 without DHT, JPG and DAC (ISO 10918-1 B.2.2)."""
# Markers without a length: TEM, RST0..7, SOI, EOI.
_BARE = {0x01, *range(0xD0, 0xDA)}


class DamageError(Exception):
    """The stream breaks the rules of JPEG."""


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
    """Tables and sizes that the marker segments before a scan have set."""

    precision: int = 0
    rows: int = 0
    columns: int = 0
    interval: int = 0
    components: dict[int, Component] = field(default_factory=dict)
    first_quanta: dict[int, int] = field(default_factory=dict)
    tables: dict[int, bytes] = field(default_factory=dict)


def marker_segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield marker, start and end of the content of each segment as far as the first scan."""
    position = 2
    while position + 10 <= len(data) and data[position] == 0xFF:
        if data[position + 1] == 0xFF:  # fill byte
            position += 1
            continue
        end = position + 2 + int.from_bytes(data[position + 2 : position + 4], "big")
        yield data[position + 1], position + 4, end
        position = end


def scans_of(data: bytes, state: StreamState) -> Iterator[Scan]:
    """Yield a stream's scans; `state` is set by the marker segments before each.

    Raises
    ------
    DamageError
        If the stream ends early, or its restart markers are out of order.
    IndexError, KeyError, ValueError, struct.error
        If it refers to something that it does not contain.
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
    """Return a scan's end, and its data without stuffed bytes, by restart interval."""
    values = np.frombuffer(data, dtype=np.uint8, offset=start)
    followers = values[1:]
    marked = np.flatnonzero((values[:-1] == 0xFF) & (followers != 0) & (followers != 0xFF))
    kinds = followers[marked]
    is_restart = (kinds >= 0xD0) & (kinds <= 0xD7)
    others = np.flatnonzero(~is_restart)
    if not len(others):
        raise DamageError
    last = int(others[0])
    # Restart markers are numbered modulo 8.
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


_NO_CODE = 0
_MAX_SIZE_CATEGORY = 16
_BLOCK = 64
_END_OF_BLOCK = 2**10
_NOT_A_STEP = 2**12
# Most encoders write the standard's own tables.
_CACHED_TABLES = 4
_CHUNK = 24  # bytes
# Errors of a stream that refers to missing parts, or ends too soon.
_STREAM_ERRORS = (DamageError, ArithmeticError, IndexError, KeyError, ValueError, struct.error)


def has_sound_scans(data: bytes) -> bool:
    """Return whether the scans of a sequential Huffman-coded JPEG are sound.

    Every code is in its table, no block has more than 64 coefficients, no mean leaves the
    range of grey values, and the last block ends in the last byte.
    """
    state = StreamState()
    try:
        scans = 0
        for scan in scans_of(data, state):
            _follow(scan, state)
            scans += 1
    except _STREAM_ERRORS:
        return False
    return scans > 0


def fits_lossless(data: bytes, decoded: NDArray[Any], precision: int) -> bool:
    """Return whether a lossless JPEG has the length that its samples, (rows, columns), need."""
    rows, columns = decoded.shape
    try:
        (scan,) = scans_of(data, StreamState())
        rows_a_segment = scan.interval // columns if scan.interval else rows
        if rows_a_segment < 1 or (scan.interval and scan.interval % columns):
            return False
        bits = _lossless_bits(
            decoded.astype(np.int32) >> scan.shift,
            _table_of(scan.components[0].dc_table),
            scan.selection,
            2 ** (precision - scan.shift - 1),
            rows_a_segment,
        )
    except _STREAM_ERRORS:
        return False
    starts = np.arange(0, rows, rows_a_segment)
    needed = -(-np.add.reduceat(bits, starts) // 8)
    return bool([len(segment) for segment in scan.segments] == needed.tolist())


# By their selection value (table H.1), of the samples to the left, above, and above to the left.
_PREDICTORS: dict[int, Callable[..., NDArray[np.int32]]] = {
    1: lambda left, _above, _corner: left.copy(),
    2: lambda _left, above, _corner: above.copy(),
    3: lambda _left, _above, corner: corner.copy(),
    4: lambda left, above, corner: left + above - corner,
    5: lambda left, above, corner: left + ((above - corner) >> 1),
    6: lambda left, above, corner: above + ((left - corner) >> 1),
    7: lambda left, above, _corner: (left + above) >> 1,
}


def _lossless_bits(
    plane: NDArray[np.int32],
    table: NDArray[np.int32],
    selection: int,
    middle: int,
    rows_a_segment: int,
) -> NDArray[np.int64]:
    """Return the bits that each row's differences take (ISO 10918-1 H.1.2)."""
    above = np.empty_like(plane)
    above[1:] = plane[:-1]
    left = np.empty_like(plane)
    left[:, 1:] = plane[:, :-1]
    corner = np.empty_like(plane)
    corner[1:, 1:] = plane[:-1, :-1]
    predicted = _PREDICTORS[selection](left, above, corner)
    predicted[1:, 0] = above[1:, 0]
    firsts = slice(0, None, rows_a_segment)
    predicted[firsts, 1:] = left[firsts, 1:]
    predicted[firsts, 0] = middle
    # Differences are taken modulo 65536.
    size = np.abs((plane - predicted).astype(np.int16).astype(np.int32))
    category = np.frexp(size.astype(np.float32))[1]
    lengths = _code_lengths(table)
    if bool((lengths[np.unique(category)] == 0).any()):
        raise DamageError
    extra = np.where(category == _MAX_SIZE_CATEGORY, 0, category)
    return np.asarray((lengths[category] + extra).sum(axis=1, dtype=np.int64))


def _code_lengths(table: NDArray[np.int32]) -> NDArray[np.int64]:
    lengths = np.zeros(256, dtype=np.int64)
    lengths[table & 0xFF] = table >> 8
    lengths[0] = max(
        (int(entry) >> 8 for entry in np.unique(table) if entry & 0xFF == 0), default=0
    )
    return lengths


def _follow(scan: Scan, state: StreamState) -> None:
    """Decode a scan's symbols without its coefficients; raise DamageError for a broken rule."""
    order, units = _block_order(scan, state)
    # Eight times half the range (F.1.1.4), and a quarter more for overshoot at edges.
    reach = 5 * 2**state.precision
    limits = [
        reach // max(state.first_quanta[entry.component.quantiser], 1) + 1
        for entry in scan.components
    ]
    tables = [(_codes_of(entry.dc_table), _steps_of(entry.ac_table)) for entry in scan.components]
    interval = scan.interval or units
    if len(scan.segments) != -(-units // interval):
        raise DamageError
    for number, segment in enumerate(scan.segments):
        blocks = order * min(interval, units - number * interval)
        _follow_segment(segment, blocks, tables, limits)


def _block_order(scan: Scan, state: StreamState) -> tuple[list[int], int]:
    """Return the components of a minimum coded unit's blocks, and the number of units."""
    tallest = max(component.vertical for component in state.components.values())
    widest = max(component.horizontal for component in state.components.values())
    if len(scan.components) == 1:
        only = scan.components[0].component
        rows = -(-state.rows * only.vertical // (8 * tallest))
        columns = -(-state.columns * only.horizontal // (8 * widest))
        return [0], rows * columns
    order = [
        index
        for index, entry in enumerate(scan.components)
        for _ in range(entry.component.horizontal * entry.component.vertical)
    ]
    return order, -(-state.rows // (8 * tallest)) * -(-state.columns // (8 * widest))


def _follow_segment(
    segment: bytes, blocks: list[int], tables: list[tuple[list[int], list[int]]], limits: list[int]
) -> None:
    means = [0] * len(tables)
    bits = _Bits(segment)
    for index in blocks:
        dc_codes, ac_codes = tables[index]
        means[index] += bits.difference(dc_codes)
        if abs(means[index]) > limits[index]:
            raise DamageError
        bits.skip_block(ac_codes)
    if not 0 <= bits.left() < 8:
        raise DamageError


class _Bits:
    """The bits of a segment, taken from the front."""

    def __init__(self, segment: bytes) -> None:
        # Zeros for the look-ahead beyond the end; `left` is negative once they are used.
        self._data = segment + bytes(_CHUNK)
        self._size_bits = 8 * len(segment)
        self._position = 0
        self._held = 0
        self._buffer = 0

    def left(self) -> int:
        """Return how many bits have not been taken; negative beyond the end."""
        return self._size_bits - 8 * self._position + self._held

    def _fill(self) -> None:
        if self._position >= len(self._data):
            raise DamageError
        chunk = self._data[self._position : self._position + _CHUNK].ljust(_CHUNK, b"\0")
        self._buffer = (self._buffer & ((1 << self._held) - 1)) << 8 * _CHUNK | int.from_bytes(
            chunk, "big"
        )
        self._position += _CHUNK
        self._held += 8 * _CHUNK

    def difference(self, codes: list[int]) -> int:
        """Take a block's first coefficient, coded as the difference to the last block's."""
        if self._held < 32:
            self._fill()
        entry = codes[(self._buffer >> (self._held - 16)) & 0xFFFF]
        size = entry & 0xFF
        if entry == _NO_CODE or size > 15:
            raise DamageError
        self._held -= (entry >> 8) + size
        if not size:
            return 0
        value = (self._buffer >> self._held) & ((1 << size) - 1)
        return value if value >> (size - 1) else value + 1 - (1 << size)

    def skip_block(self, steps: list[int]) -> None:
        """Take a block's other coefficients, by `_steps_of` its table."""
        coefficient = 1
        buffer, held = self._buffer, self._held
        while coefficient < _BLOCK:
            if held < 32:
                self._held = held
                self._fill()
                buffer, held = self._buffer, self._held
            step = steps[(buffer >> (held - 16)) & 0xFFFF]
            held -= step & 0x3F
            coefficient += step >> 6
        self._held = held
        # The last coefficient or an end of block, not a run beyond it or an undefined code.
        if coefficient != _BLOCK and not _END_OF_BLOCK < coefficient < _NOT_A_STEP:
            raise DamageError


@lru_cache(maxsize=_CACHED_TABLES)
def _steps_of(definition: bytes) -> list[int]:
    """Return each code's coefficients, and in the lowest six bits its length with its value."""
    table = _table_of(definition)
    length, run, size = table >> 8, (table >> 4) & 0x0F, table & 0x0F
    coefficients = np.where(size > 0, run + 1, _NOT_A_STEP)
    coefficients[(size == 0) & (run == 15)] = 16
    coefficients[(size == 0) & (run == 0)] = _END_OF_BLOCK
    coefficients[table == _NO_CODE] = _NOT_A_STEP
    steps: list[int] = (coefficients << 6 | (length + size)).tolist()
    return steps


@lru_cache(maxsize=_CACHED_TABLES)
def _table_of(definition: bytes) -> NDArray[np.int32]:
    """Return an entry for each 16 bits to come: the code's length above, its symbol below."""
    table = np.full(2**16, _NO_CODE, dtype=np.int32)
    first, symbol = 0, 16
    for length, count in enumerate(definition[:16], start=1):
        width = 2 ** (16 - length)
        for _ in range(count):
            table[first : first + width] = length << 8 | definition[symbol]
            first += width
            symbol += 1
    return table


@lru_cache(maxsize=_CACHED_TABLES)
def _codes_of(definition: bytes) -> list[int]:
    codes: list[int] = _table_of(definition).tolist()
    return codes
