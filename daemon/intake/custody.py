"""Custody of a dropped file: a copy that is the daemon's own, hashed while it is written.

Whoever dropped a file may keep it open, and write to the same inode after the daemon has renamed
it. What is decoded, sent and filed is therefore a copy in a new inode, of which nobody else ever
had a descriptor, and it is read through the descriptor that was opened when it was made.
"""

import fcntl
import hashlib
import os
import stat
import weakref
from pathlib import Path
from typing import BinaryIO

from lungwatch.daemon.intake.eligibility import WriterState, writer_of
from lungwatch.files import HEAD_BYTES, FileKind, fsync_dir, kind_of

COPY_NAME = ".copy"
"""Name of the copy beside its original; hidden, so that no dropped file has it."""

# The owner writes, the group of the home reads; the umask may take more.
_MODE = 0o640
_CHUNK_BYTES = 1 << 20
_ZEROS = bytes(_CHUNK_BYTES)
_FICLONE = 0x40049409  # ioctl_ficlonerange(2)
_READ_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_COPY_FLAGS = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


class OwnedFile:
    """A file of the daemon's own, open for reading until it is closed.

    Parameters
    ----------
    descriptor
        Open for reading alone; closed with this object.
    sha256
        Of the content, in hexadecimal.
    """

    def __init__(self, descriptor: int, sha256: str) -> None:
        self.descriptor = descriptor
        self.sha256 = sha256
        self.size_bytes = os.fstat(descriptor).st_size
        self.kind: FileKind = kind_of(self.head(HEAD_BYTES))
        # Files that are in hand when a service stops are dropped without their end.
        self._finalizer = weakref.finalize(self, os.close, descriptor)

    @classmethod
    def open(cls, path: Path) -> "OwnedFile":
        """Open and hash a file that is the daemon's own already.

        Raises
        ------
        OSError
            If it cannot be read.
        """
        descriptor = os.open(path, _READ_FLAGS)
        try:
            return cls(descriptor, _digest(descriptor))
        except BaseException:
            os.close(descriptor)
            raise

    def head(self, size_bytes: int) -> bytes:
        """Return the first bytes of the file, fewer where it is shorter."""
        return os.pread(self.descriptor, size_bytes, 0)

    def reader(self) -> BinaryIO:
        """Return the file as a stream at its beginning, to be closed; for one thread at a time."""
        stream = os.fdopen(os.dup(self.descriptor), "rb")
        stream.seek(0)
        return stream

    def close(self) -> None:
        """Close the descriptor; repeatable."""
        self._finalizer()


def copy_of(path: Path) -> OwnedFile | None:
    """Copy a file to `COPY_NAME` in its folder, durably; the file itself stays.

    Where the file system can, the copy shares its blocks (reflink). What is hashed is what is
    written, so that a file that changes meanwhile has the digest of its copy, whatever that is.
    The modification time is kept.

    Returns
    -------
    OwnedFile or None
        None if the file is no regular one, was being written to, or changed while it was copied;
        no copy is left then.

    Raises
    ------
    OSError
        If it cannot be read or copied (a full disk); nothing is left behind then.
    """
    # Since the scan the file may have been replaced by a link or a FIFO.
    if not stat.S_ISREG(path.lstat().st_mode):
        return None
    target = path.with_name(COPY_NAME)
    source = os.open(path, _READ_FLAGS)
    try:
        before = os.fstat(source)
        target.unlink(missing_ok=True)
        owned = _copy(source, before, target)
        try:
            after = os.fstat(source)
            is_same = (before.st_size, before.st_mtime_ns) == (after.st_size, after.st_mtime_ns)
            is_whole = owned.size_bytes == after.st_size
            if is_same and is_whole and writer_of(path) is not WriterState.PRESENT:
                fsync_dir(path.parent)
                return owned
            owned.close()
            target.unlink()
        except BaseException:
            owned.close()
            target.unlink(missing_ok=True)
            raise
    finally:
        os.close(source)
    return None


def settle_copy(path: Path, recorded: str | None) -> None:
    """Finish or remove a copy that an interrupted claim left beside its original.

    Parameters
    ----------
    recorded
        SHA-256 of the content that the database has at `path`; None if it has none. The copy
        takes the original's place only if it has that content.

    Raises
    ------
    OSError
        If it cannot be read, moved or removed.
    """
    copy = path.with_name(COPY_NAME)
    try:
        owned = OwnedFile.open(copy)
    except FileNotFoundError:
        return
    owned.close()
    if owned.sha256 == recorded:
        copy.replace(path)
    else:
        copy.unlink()


def _copy(source: int, status: os.stat_result, target: Path) -> OwnedFile:
    descriptor = os.open(target, _COPY_FLAGS, _MODE)
    try:
        sha256 = _fill(source, descriptor)
        os.utime(descriptor, ns=(status.st_atime_ns, status.st_mtime_ns))
        os.fsync(descriptor)
        # The descriptor that is passed on, of the very same file, cannot write.
        reading = os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            return OwnedFile(reading, sha256)
        except BaseException:
            os.close(reading)
            raise
    except BaseException:
        target.unlink(missing_ok=True)
        raise
    finally:
        os.close(descriptor)


def _fill(source: int, target: int) -> str:
    """Copy the bytes of one open file to another, empty one; return their SHA-256."""
    try:
        fcntl.ioctl(target, _FICLONE, source)
    except OSError:
        pass  # most file systems; errors of the disk come again below
    else:
        return _digest(target)
    digest, size_bytes = hashlib.sha256(), 0
    while chunk := os.read(source, _CHUNK_BYTES):
        digest.update(chunk)
        # A sparse file stays one.
        if len(chunk) < _CHUNK_BYTES or chunk != _ZEROS:
            _write(target, chunk, size_bytes)
        size_bytes += len(chunk)
    os.ftruncate(target, size_bytes)
    return digest.hexdigest()


def _write(target: int, chunk: bytes, offset: int) -> None:
    view = memoryview(chunk)
    while view:
        written = os.pwrite(target, view, offset)
        view, offset = view[written:], offset + written


def _digest(descriptor: int) -> str:
    digest, offset = hashlib.sha256(), 0
    while chunk := os.pread(descriptor, _CHUNK_BYTES, offset):
        digest.update(chunk)
        offset += len(chunk)
    return digest.hexdigest()
