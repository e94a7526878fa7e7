"""Ask the kernel whether a file is open for writing."""

import errno
import fcntl
import os
from pathlib import Path

from lungwatch.daemon.stability import Writer


def writer_of(path: Path) -> Writer:
    """Tell whether any process has a file open for writing.

    A read lease is granted only while nobody does (fcntl(2), F_SETLEASE). Network file
    systems do not grant leases, nor does the kernel for another user's file without
    CAP_LEASE; the answer is UNKNOWN then.

    Raises
    ------
    OSError
        If the file cannot be opened for reading.
    """
    # NONBLOCK: a FIFO that took the file's name must not stop us.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    except OSError as error:
        return Writer.SOMEBODY if error.errno == errno.EAGAIN else Writer.UNKNOWN
    else:
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        return Writer.NONE
    finally:
        os.close(descriptor)
