"""Contents of a disk after a power cut, computed from the recorded calls.

The model is pessimistic about data and describes a journalling file system (ext4, XFS, btrfs)
otherwise: of a file, only what an fsync of that very file covered is sure to be there; of
names (creations, renames, removals), only what an fsync of a folder covered, each of them whole
and in order. What was not synchronised may have arrived all the same, in any part: `cut` takes
a seed for that, and none for the worst case, in which nothing of it has.
"""

import os
import random
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

# struct record and its operations in shim.c
_HEAD = struct.Struct("=B3xIQqII")
OPEN, WRITE, TRUNCATE, RENAME, UNLINK, MKDIR, RMDIR, SYNC, LINK = range(1, 10)

Change = Callable[[bytearray], None]


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call on the home's files."""

    op: int
    flags: int
    inode: int
    offset: int
    path: str
    data: bytes


@dataclass(eq=False)
class _Content:
    """A file's bytes: what is sure to be on the disk, and what was written since."""

    durable: bytes = b""
    pending: list[Change] = field(default_factory=list)

    def change(self, change: Change) -> None:
        self.pending.append(change)

    def sync(self) -> None:
        self.durable = self.after(self.pending)
        self.pending = []

    def after(self, changes: list[Change]) -> bytes:
        data = bytearray(self.durable)
        for change in changes:
            change(data)
        return bytes(data)


@dataclass(frozen=True, kw_only=True)
class _Entry:
    """One change of names; `content` is None for a folder's."""

    op: int
    path: str
    target: str = ""
    content: _Content | None = None

    @property
    def folders(self) -> set[str]:
        return {os.path.dirname(path) for path in (self.path, self.target) if path}  # noqa: PTH120


def read_calls(log: Path) -> list[Call]:
    """Return the recorded calls in their order; a last one that is cut off is left out."""
    data = log.read_bytes()
    return list(_calls(data))


def _calls(data: bytes) -> Iterator[Call]:
    at = 0
    while at + _HEAD.size <= len(data):
        op, flags, inode, offset, path_len, data_len = _HEAD.unpack_from(data, at)
        at += _HEAD.size
        if at + path_len + data_len > len(data):
            return
        yield Call(
            op=op,
            flags=flags,
            inode=inode,
            offset=offset,
            path=os.fsdecode(data[at : at + path_len]),
            data=data[at + path_len : at + path_len + data_len],
        )
        at += path_len + data_len


class Forgotten(StrEnum):
    """Whose fsync is taken as never called, to see that the loss is found."""

    FILES = "files, the database's left aside"
    DATABASE = "the database"
    FOLDERS = "folders"


class Disk:
    """A home's files, as they were durable at first, and what became of them call by call."""

    def __init__(self, home: Path, forgotten: Forgotten | None = None) -> None:
        self._home = home.resolve()
        self._forgotten = forgotten
        self._databases: set[int] = set()
        self._first_files: dict[str, _Content] = {}
        self._first_folders = {str(self._home)}
        self._inodes: dict[int, _Content | str] = {self._home.stat().st_ino: str(self._home)}
        for path in self._home.rglob("*"):
            if path.is_dir():
                self._first_folders.add(str(path))
                self._inodes[path.stat().st_ino] = str(path)
            else:
                content = _Content(path.read_bytes())
                self._first_files[str(path)] = content
                self._inodes[path.stat().st_ino] = content
        self._files = dict(self._first_files)
        self._folders = set(self._first_folders)
        self._journal: list[_Entry] = []
        self._committed = 0

    def apply(self, call: Call) -> None:
        """Take up the next call."""
        if call.op == OPEN:
            self._open(call)
        elif call.op in (WRITE, TRUNCATE, SYNC):
            self._on_descriptor(call)
        elif call.op in (RENAME, LINK):
            target = os.fsdecode(call.data)
            self._enter(call.op, call.path, target, self._files.get(call.path))
        else:
            self._enter(call.op, call.path, "", self._files.get(call.path))

    def cut(self, root: Path, seed: int | None = None) -> None:
        """Write what is there after a power cut into a new folder."""
        chance = random.Random(seed)
        extra = 0 if seed is None else chance.randint(0, len(self._journal) - self._committed)
        files, folders = dict(self._first_files), set(self._first_folders)
        for entry in self._journal[: self._committed + extra]:
            _replay(entry, files, folders)
        for folder in sorted(folders):
            self._moved(folder, root).mkdir(parents=True, exist_ok=True)
        for path, content in files.items():
            if path.endswith("-shm"):
                continue  # shared memory: SQLite makes it anew
            kept = [c for c in content.pending if seed is not None and chance.random() < 0.5]
            self._moved(path, root).write_bytes(content.after(kept))

    def _moved(self, path: str, root: Path) -> Path:
        return root / Path(path).relative_to(self._home)

    def _open(self, call: Call) -> None:
        if call.path in self._folders:
            self._inodes[call.inode] = call.path
            return
        if call.path not in self._files:
            content = _Content()
            self._enter(OPEN, call.path, "", content)
        content = self._files[call.path]
        self._inodes[call.inode] = content
        if "lungwatch.db" in call.path:
            self._databases.add(call.inode)
        if call.flags & os.O_TRUNC:
            content.change(_cut_to(0))

    def _on_descriptor(self, call: Call) -> None:
        known = self._inodes.get(call.inode)
        if call.op == SYNC and self._forgotten is self._kind_of(call.inode):
            return
        if isinstance(known, str):
            touching = [n for n, entry in enumerate(self._journal, 1) if known in entry.folders]
            self._committed = max(self._committed, touching[-1] if touching else 0)
        elif known is None:
            return
        elif call.op == SYNC:
            known.sync()
        elif call.op == TRUNCATE:
            known.change(_cut_to(call.offset))
        else:
            known.change(_put(call.offset, call.data))

    def _kind_of(self, inode: int) -> Forgotten:
        if isinstance(self._inodes.get(inode), str):
            return Forgotten.FOLDERS
        return Forgotten.DATABASE if inode in self._databases else Forgotten.FILES

    def _enter(self, op: int, path: str, target: str, content: _Content | None) -> None:
        entry = _Entry(op=op, path=path, target=target, content=content)
        self._journal.append(entry)
        _replay(entry, self._files, self._folders)


def _replay(entry: _Entry, files: dict[str, _Content], folders: set[str]) -> None:
    if entry.op == MKDIR:
        folders.add(entry.path)
    elif entry.op == RMDIR:
        folders.discard(entry.path)
    elif entry.op == UNLINK:
        files.pop(entry.path, None)
    elif entry.content is None:
        _rename_folder(entry, files, folders)
    elif entry.op == OPEN:
        files[entry.path] = entry.content
    else:
        if entry.op == RENAME:
            files.pop(entry.path, None)
        files[entry.target] = entry.content


def _rename_folder(entry: _Entry, files: dict[str, _Content], folders: set[str]) -> None:
    below = entry.path + "/"
    for path in [path for path in files if path.startswith(below)]:
        files[entry.target + path[len(entry.path) :]] = files.pop(path)
    for path in [path for path in folders if path == entry.path or path.startswith(below)]:
        folders.discard(path)
        folders.add(entry.target + path[len(entry.path) :])


def _put(offset: int, data: bytes) -> Change:
    def change(content: bytearray) -> None:
        content.extend(bytes(max(0, offset - len(content))))
        content[offset : offset + len(data)] = data

    return change


def _cut_to(size: int) -> Change:
    def change(content: bytearray) -> None:
        content.extend(bytes(max(0, size - len(content))))
        del content[size:]

    return change
