"""Files on disk: kinds by content, atomic writes and moves, durable folders.

A file that another process may look at is written beside its place, synchronised and renamed into
it. POSIX promises that `rename` within one file system is atomic, and nothing about when it
reaches the disk: folders are synchronised too.
"""

import contextlib
import os
import struct
import tempfile
from collections.abc import Iterator
from enum import Enum
from pathlib import Path

# The longest signature: the DICOM preamble and its "DICM".
HEAD_BYTES = 132


class FileKind(Enum):
    """Kind of a file by its content; the value is the extension that it is filed under."""

    PNG = ".png"
    JPEG = ".jpg"
    DICOM = ".dcm"
    ZIP = ".zip"
    OTHER = ".bin"

    @property
    def is_image(self) -> bool:
        """Return whether the reader reads files of this kind."""
        return self in (FileKind.PNG, FileKind.JPEG, FileKind.DICOM)


def file_kind(path: Path) -> FileKind:
    """Recognise a file by its content, whatever its name.

    Raises
    ------
    OSError
        If the file cannot be read.
    """
    with path.open("rb") as file:
        return kind_of(file.read(HEAD_BYTES))


def kind_of(head: bytes) -> FileKind:
    """Recognise a file by its first 132 bytes or more."""
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return FileKind.PNG
    if head.startswith(b"\xff\xd8\xff"):
        return FileKind.JPEG
    if _is_dicom(head):
        return FileKind.DICOM
    return FileKind.ZIP if head.startswith(b"PK\x03\x04") else FileKind.OTHER


def _is_dicom(head: bytes) -> bool:
    # PS3.10 7.1 wants 128 bytes and "DICM"; files from before that rule, and from careless
    # exporters, begin with the first data element instead.
    if head[128:132] == b"DICM":
        return True
    if len(head) < 8:
        return False
    explicit = head[4:6].isalpha() and head[4:6].isupper()
    # Big endian was always explicit (PS3.5 A.3, retired).
    group, element = struct.unpack(">HH" if explicit and head[0] == 0 else "<HH", head[:4])
    if group not in (0x0002, 0x0008) or element > 0x0100:
        return False
    return explicit or int.from_bytes(head[4:8], "little") <= 1024


def fsync_dir(folder: Path) -> None:
    """Make the entries of a folder durable.

    Raises
    ------
    OSError
        If the folder cannot be opened or synchronised.
    """
    _fsync(folder, os.O_DIRECTORY)


def make_dirs(folder: Path) -> None:
    """Create a folder and its missing parents, durably."""
    missing = []
    while not folder.is_dir():
        missing.append(folder)
        folder = folder.parent
    for path in reversed(missing):
        with contextlib.suppress(FileExistsError):
            path.mkdir()
        fsync_dir(path.parent)


@contextlib.contextmanager
def replacing(target: Path, *, suffix: str | None = None) -> Iterator[Path]:
    """Yield an empty file beside `target` that takes its place at the end, whole and durable.

    A reader sees the old content, the new, or no file. After an error `target` is what it was,
    and nothing is left behind.

    Parameters
    ----------
    suffix
        Of the file's name until then; None: the endings of `target`.

    Raises
    ------
    OSError
        If writing fails (a full disk, no rights).
    """
    with _beside(target, suffix) as temporary:
        yield temporary
        _publish(temporary, target)


def write_atomic(target: Path, data: bytes) -> None:
    """Write `data` to `target`, as `replacing` does."""
    with replacing(target) as temporary:
        temporary.write_bytes(data)


def create_private(target: Path, data: bytes) -> None:
    """Write a new file that its owner alone may read (mode 0600), whole or not at all.

    Raises
    ------
    FileExistsError
        If there is one of that name, which stays as it is.
    OSError
        If writing fails; nothing is left behind then.
    """
    with _beside(target) as temporary:
        temporary.write_bytes(data)
        _fsync(temporary)
        # Unlike a rename, a link never takes the place of what is there.
        target.hardlink_to(temporary)
        temporary.unlink()
    fsync_dir(target.parent)


def move_atomic(source: Path, target: Path) -> None:
    """Move a file within one file system, durable at both ends.

    `target` is replaced if it exists. The content must have been synchronised before; a
    rename does not do that.

    Raises
    ------
    OSError
        If the folders are on different file systems (EXDEV) or one of them is missing.
    """
    source.rename(target)
    fsync_dir(target.parent)
    if source.parent != target.parent:
        fsync_dir(source.parent)


@contextlib.contextmanager
def _beside(target: Path, suffix: str | None = None) -> Iterator[Path]:
    # Two endings at most: Keras wants ".weights.h5".
    endings = "".join(target.suffixes[-2:]) if suffix is None else suffix
    descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=".tmp-", suffix=endings)
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def _publish(temporary: Path, target: Path) -> None:
    # mkstemp gives 0600; take what the user's umask says instead.
    temporary.chmod(0o666 & ~_umask())
    _fsync(temporary)
    temporary.replace(target)
    fsync_dir(target.parent)


def _fsync(path: Path, flags: int = 0) -> None:
    descriptor = os.open(path, os.O_RDONLY | flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    # The only portable way to read it is to set it; Linux shows it without the race.
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("Umask:"):
            return int(line.split()[1], 8)
    return 0o022
