"""One received object becomes one durable file in the drop folder."""

import errno
import logging
import secrets
import time
from typing import TYPE_CHECKING

from lungwatch.atomicfile import write_atomic
from lungwatch.daemon.home import Home
from lungwatch.daemon.logs import event as log

if TYPE_CHECKING:
    from pynetdicom.events import Event

# PS3.4 table B.2-1, PS3.7 annex C.
SUCCESS = 0x0000
OUT_OF_RESOURCES = 0xA700
CANNOT_UNDERSTAND = 0xC000
PROCESSING_FAILURE = 0x0110
_FULL = {errno.ENOSPC, errno.EDQUOT}
_LEFT_OVER_S = 3600.0


class Reception:
    """Takes objects for one home.

    Parameters
    ----------
    min_free_mb
        Free space below which nothing is taken, in MiB: the sender keeps its copy.
    """

    def __init__(self, home: Home, min_free_mb: int) -> None:
        self._home = home
        self._min_free_mb = min_free_mb

    def sweep(self) -> None:
        """Remove what a killed process has left half written in the drop folder."""
        for path in self._home.incoming.glob(".tmp-*.dcm"):
            if time.time() - path.stat().st_mtime > _LEFT_OVER_S:
                path.unlink(missing_ok=True)

    def store(self, event: "Event") -> int:
        """Answer a C-STORE request; success means that the file outlives a power loss.

        The data set is written as it came: its bytes are not decoded.
        """
        caller = event.assoc.requestor.ae_title
        try:
            status = self._store(event)
        except OSError as error:
            status = OUT_OF_RESOURCES if error.errno in _FULL else PROCESSING_FAILURE
        if status == SUCCESS:
            log("received", caller=caller)
        else:
            log("not_received", level=logging.WARNING, caller=caller, status=f"0x{status:04X}")
        return status

    def _store(self, event: "Event") -> int:
        if self._home.free_mb() < self._min_free_mb:
            return OUT_OF_RESOURCES
        data = event.encoded_dataset(include_meta=True)
        if not data:
            return CANNOT_UNDERSTAND
        # No part of the object in the name: even a UID leads to a patient.
        write_atomic(self._home.incoming / f"pacs-{secrets.token_hex(12)}.dcm", data)
        return SUCCESS
