"""Files on disk: atomic writes and moves, durable folders, kinds by content."""

import contextlib
import os
import shutil
import tempfile
from pathlib import Path

_CHUNK_BYTES = 1 << 20


def fsync_dir(folder: Path) -> None:
    """Make the entries of a folder durable.

    Raises
    ------
    OSError
        If the folder cannot be opened or synchronised.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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


def write_atomic(target: Path, data: bytes) -> None:
    """Write `data` to `target` so that a reader sees the old content, the new, or no file.

    Raises
    ------
    OSError
        If writing fails (a full disk, no rights); nothing is left behind then.
    """
    descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=".tmp-", suffix=target.suffix)
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp gives 0600; take what the user's umask says instead.
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_dir(target.parent)


def create_private(target: Path, data: bytes) -> None:
    """Write a new file that its owner alone may read (mode 0600), whole or not at all.

    Raises
    ------
    FileExistsError
        If there is one of that name, which stays as it is.
    OSError
        If writing fails; nothing is left behind then.
    """
    descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=".tmp-")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        # Unlike a rename, a link never takes the place of what is there.
        os.link(name, target)
    finally:
        Path(name).unlink()
    fsync_dir(target.parent)


def copy_apart(target: Path) -> bool:
    """Put a copy in the place of a file that has other names, whole or not at all.

    Whoever writes to the file under one of those does not write to this one any more.

    Returns
    -------
    bool
        False if the file changed while it was copied; it is what it was then.

    Raises
    ------
    OSError
        If it cannot be copied (a full disk); nothing is left behind then.
    """
    descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=".tmp-")
    temporary = Path(name)
    try:
        with target.open("rb") as source, os.fdopen(descriptor, "wb") as file:
            before = os.fstat(source.fileno())
            shutil.copyfileobj(source, file, _CHUNK_BYTES)
            file.flush()
            os.fsync(file.fileno())
            after = os.fstat(source.fileno())
        if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            temporary.unlink()
            return False
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_dir(target.parent)
    return True


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


def _umask() -> int:
    # The only portable way to read it is to set it; Linux shows it without the race.
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("Umask:"):
            return int(line.split()[1], 8)
    return 0o022
