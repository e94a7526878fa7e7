"""Lanes of the intake: which files are large or odd, and whose turn it is in each lane.

What a file says of its size is read at fixed places of its header, and nothing is decoded. A file
that lies about it is decoded in the wrong lane; no other harm is done.
"""

import heapq
import itertools
import os
import stat
import struct
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lungwatch.daemon.intake.eligibility import Snapshot, WriterState, writer_of_descriptor
from lungwatch.daemon.pipeline.records import Claimed
from lungwatch.daemon.stage import Lane
from lungwatch.files import FileKind, kind_of

# The first data elements of a DICOM file, up to Rows and Columns: some kilobytes, rarely more.
_HEADER_BYTES = 64 * 1024
# Real JPEG files have a dozen segments before the frame header.
_MOST_SEGMENTS = 200
# ISO/IEC 10918-1 B.1.1.3: start of frame, but for DHT (C4), JPG (C8) and DAC (CC) among them.
_FRAME_MARKERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_BARE_MARKERS = frozenset(range(0xD0, 0xD9)) | {0x01}
_MIB = 1024 * 1024


@dataclass(frozen=True, kw_only=True)
class Look:
    """A dropped file, looked at without a claim.

    Attributes
    ----------
    writer
        Whether any process has it open for writing.
    kind
        By its first bytes.
    pixels
        Rows times columns as the header states them; None if they are not found there.
    """

    writer: WriterState
    kind: FileKind
    pixels: int | None


def look_at(path: Path) -> Look:
    """Open a file once and look at its writers and its header.

    Raises
    ------
    OSError
        If the file cannot be opened or read.
    """
    # NONBLOCK: a FIFO that took the file's name must not stop us.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        writer = writer_of_descriptor(descriptor)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            return Look(writer=writer, kind=FileKind.OTHER, pixels=None)
        head = os.pread(descriptor, _HEADER_BYTES, 0)
        kind = kind_of(head)
        return Look(writer=writer, kind=kind, pixels=_stated_pixels(descriptor, kind, head))
    finally:
        os.close(descriptor)


def _stated_pixels(descriptor: int, kind: FileKind, head: bytes) -> int | None:
    match kind:
        case FileKind.PNG:
            return _png_pixels(head)
        case FileKind.JPEG:
            return _jpeg_pixels(descriptor)
        case FileKind.DICOM:
            return _dicom_pixels(head)
        case _:
            return None


def _png_pixels(head: bytes) -> int | None:
    """Return the pixels of the header chunk, which comes first (W3C PNG, 11.2.1)."""
    if head[12:16] != b"IHDR" or len(head) < 24:
        return None
    columns, rows = struct.unpack(">II", head[16:24])
    return int(rows) * int(columns)


def _jpeg_pixels(descriptor: int) -> int | None:
    """Return the pixels of the first frame header (ISO/IEC 10918-1 B.2.2)."""
    place = 2
    for _ in range(_MOST_SEGMENTS):
        segment = os.pread(descriptor, 9, place)
        if len(segment) < 9 or segment[0] != 0xFF:
            return None
        marker = segment[1]
        if marker == 0xFF:  # a fill byte
            place += 1
        elif marker in _BARE_MARKERS:
            place += 2
        elif marker in _FRAME_MARKERS:
            rows, columns = struct.unpack(">HH", segment[5:9])
            # Rows of 0 are stated behind the scan (DNL).
            return int(rows) * int(columns) or None
        else:
            place += 2 + int.from_bytes(segment[2:4], "big")
    return None


def _dicom_pixels(head: bytes) -> int | None:
    """Return the largest Rows times the largest Columns that stand in the header (PS3.5 7.1)."""
    orders: tuple[Literal["little", "big"], ...] = ("little", "little", "big")
    largest = []
    for element in (0x10, 0x11):
        little, big = bytes((0x28, 0, element, 0)), bytes((0, 0x28, 0, element))
        # Explicit and implicit VR, little endian; explicit VR, big endian.
        begins = (little + b"US\x02\x00", little + b"\x02\x00\x00\x00", big + b"US\x00\x02")
        found = [
            int.from_bytes(head[place : place + 2], order)
            for begin, order in zip(begins, orders, strict=True)
            for place in _places_behind(begin, head)
        ]
        if not found:
            return None
        largest.append(max(found))
    return largest[0] * largest[1]


def _places_behind(begin: bytes, head: bytes) -> list[int]:
    places, place = [], head.find(begin)
    while place >= 0:
        places.append(place + len(begin))
        place = head.find(begin, place + 1)
    return places


@dataclass(frozen=True, kw_only=True)
class LaneRules:
    """Bounds of an ordinary file.

    Attributes
    ----------
    from_bytes
        Size, apparent or on the disk, from which a file takes the slow lane.
    from_pixels
        Stated rows times columns from which it does.
    readable_bytes
        Size beyond which no image is read.
    """

    from_bytes: int
    from_pixels: int
    readable_bytes: int

    def lane_of(self, snapshot: Snapshot, look: Look) -> Lane:
        """Return the lane of a file."""
        is_ordinary = (
            self.by_size(snapshot) is Lane.ORDINARY
            and look.kind.is_image
            and look.pixels is not None
            and look.pixels < self.from_pixels
        )
        return Lane.ORDINARY if is_ordinary else Lane.SLOW

    def by_size(self, snapshot: Snapshot) -> Lane:
        """Return the lane of a file of which nothing has been read."""
        largest = max(snapshot.size_bytes, snapshot.allocated_bytes)
        return Lane.SLOW if largest >= self.from_bytes else Lane.ORDINARY

    def refusal(self, snapshot: Snapshot, look: Look) -> str | None:
        """Return why a file is not even to be claimed, since that means to read all of it."""
        if look.kind is FileKind.OTHER and snapshot.size_bytes > self.readable_bytes:
            return f"no image, and larger than {self.readable_bytes // _MIB} MiB"
        return None


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A file that waits to be claimed.

    Attributes
    ----------
    uid
        Its owner; -1 for a file that the daemon has already.
    folder
        The folder of the drop folder that it is in, at whatever depth; "" for none.
    came_at_s
        Since the epoch: when it came or was last written to.
    claim
        Claims it.
    is_dropped
        Whether it is in the drop folder; else it is in `work/`, or in quarantine on request.
    """

    path: Path
    uid: int
    folder: str
    came_at_s: float
    lane: Lane
    claim: Callable[[], Claimed | None]
    is_dropped: bool = True

    @property
    def key(self) -> str:
        """The path as a text, which is cheap to compare."""
        return str(self.path)


# Oldest, number of its coming, file; a heap.
_Heap = list[tuple[float, int, Candidate]]
_NEWEST_EVERY = 4
_HEAP_SLACK = 64


class Turns:
    """Files of one lane that wait, in fair order.

    Users take turns, the folders of a user take turns, and of a folder the oldest file comes
    first. Every fourth file is the newest of all, so that one that is dropped behind a flood, of
    the same user and into the same folder too, need not wait for its end.
    """

    def __init__(self) -> None:
        self._files: dict[str, Candidate] = {}
        self._users: OrderedDict[int, OrderedDict[str, _Heap]] = OrderedDict()
        self._newest: _Heap = []
        self._numbers = itertools.count()
        self._taken = 0

    def __len__(self) -> int:
        """Return how many files wait."""
        return len(self._files)

    def keys(self) -> list[str]:
        """Return the paths of the files that wait."""
        return list(self._files)

    def add(self, file: Candidate) -> None:
        """Add a file, in the place of another one at its path."""
        self._files[file.key] = file
        number = next(self._numbers)
        folders = self._users.setdefault(file.uid, OrderedDict())
        heapq.heappush(folders.setdefault(file.folder, []), (file.came_at_s, number, file))
        heapq.heappush(self._newest, (-file.came_at_s, -number, file))
        if len(self._newest) > 2 * len(self._files) + _HEAP_SLACK:
            self._newest = [entry for entry in self._newest if self._is_waiting(entry[2])]
            heapq.heapify(self._newest)

    def discard(self, key: str) -> None:
        """Remove the file of a path, if it waits."""
        self._files.pop(key, None)

    def pop(self) -> Candidate | None:
        """Remove and return the file whose turn it is; None if none waits."""
        if not self._files:
            self._users.clear()
            self._newest.clear()
            return None
        self._taken += 1
        if self._taken % _NEWEST_EVERY == 0:
            file = self._first_of(self._newest)
        else:
            file = self._next_in_turn()
        assert file is not None, "a file that waits is in both orders"
        del self._files[file.key]
        return file

    def _next_in_turn(self) -> Candidate | None:
        while self._users:
            uid, folders = self._users.popitem(last=False)
            file = None
            while folders and file is None:
                name, heap = folders.popitem(last=False)
                file = self._first_of(heap)
                if heap:
                    folders[name] = heap
            if folders:
                self._users[uid] = folders
            if file is not None:
                return file
        return None

    def _first_of(self, heap: _Heap) -> Candidate | None:
        while heap:
            file = heapq.heappop(heap)[2]
            if self._is_waiting(file):
                return file
        return None

    def _is_waiting(self, file: Candidate) -> bool:
        return self._files.get(file.key) is file
