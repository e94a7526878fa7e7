"""Reach a folder below another one without following a link on the way.

Whoever may write to the drop folder may put a link in a sub-folder's place at any moment. A path
that was looked at a moment ago would then lead out of the drop folder: the daemon's own database
could be claimed like an X-ray, or a file be given back into its home.
"""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


@contextmanager
def opened_beneath(root: Path, relative: Path, *, create: bool = False) -> Iterator[int]:
    """Open a folder, step by step from `root`, and yield its descriptor.

    Parameters
    ----------
    root
        Is trusted, and may be a link itself.
    relative
        The way from there, without "..".
    create
        Whether missing folders are made.

    Raises
    ------
    FileNotFoundError
        If a step is missing, a link or no folder.
    OSError
        If a folder cannot be opened or made.
    """
    descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for part in relative.parts:
            if create:
                with suppress(FileExistsError):
                    os.mkdir(part, dir_fd=descriptor)
            deeper = _step(part, descriptor)
            os.close(descriptor)
            descriptor = deeper
        yield descriptor
    finally:
        os.close(descriptor)


def _step(part: str, folder: int) -> int:
    if part == "..":
        raise FileNotFoundError(errno.ENOENT, "leads out of the folder")
    try:
        return os.open(part, _FLAGS, dir_fd=folder)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR):
            raise FileNotFoundError(errno.ENOENT, "no folder any more") from error
        raise
