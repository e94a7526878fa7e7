"""Reception of objects: spooled to disk, compared with the command, published."""

import errno
import logging
import os
import secrets
import time
import zlib
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydicom.filereader import read_dataset
from pydicom.tag import BaseTag
from pydicom.uid import DeflatedExplicitVRLittleEndian
from pynetdicom.association import Association
from pynetdicom.dimse import DIMSEServiceProvider
from pynetdicom.dimse_messages import C_STORE_RQ, DIMSEMessage
from pynetdicom.dsutils import create_file_meta, encode_file_meta

from lungwatch.daemon.config import is_ae_title
from lungwatch.daemon.home import Home
from lungwatch.daemon.logs import event as log
from lungwatch.daemon.pacs.connections import BoundedSocket
from lungwatch.files import fsync_dir

if TYPE_CHECKING:
    from pynetdicom.events import Event

# PS3.4 table B.2-1, PS3.7 annex C.
SUCCESS = 0x0000
OUT_OF_RESOURCES = 0xA700
DOES_NOT_MATCH = 0xA900
CANNOT_UNDERSTAND = 0xC000
PROCESSING_FAILURE = 0x0110
_FULL = {errno.ENOSPC, errno.EDQUOT}
_LEFT_OVER_S = 3600.0
_HEAD_BYTES = 64 * 1024
_COMMAND_BYTES = 64 * 1024
# Of other messages: above what a request of storage commitment may have.
_IN_MEMORY_BYTES = 8 * 1024 * 1024
# A sender waits for each answer (no asynchronous operations are negotiated).
_UNANSWERED = 8
_SOP_CLASS, _SOP_INSTANCE = 0x00080016, 0x00080018


class SpooledObject(BytesIO):
    """The data set of a message: on disk if it is of a C-STORE request, else in memory.

    Takes the place of the library's BytesIO.
    """

    def __init__(self, message: DIMSEMessage, association: Association, folder: Path) -> None:
        super().__init__()
        self._message = message
        self._association = association
        self._folder = folder
        self._descriptor: int | None = None
        self.path: Path | None = None
        self.error: OSError | None = None
        self.head = b""
        self.size = 0

    def write(self, data: Any) -> int:  # noqa: ANN401 - BytesIO's
        """Append; an error of the file system is kept, and what follows is dropped."""
        self.size += len(data)
        if not isinstance(self._message, C_STORE_RQ):
            if self.size > _IN_MEMORY_BYTES:
                raise ValueError("a message without an object is too large")
            return super().write(data)
        if len(self.head) < _HEAD_BYTES:
            self.head += bytes(data[: _HEAD_BYTES - len(self.head)])
        if self.error is None:
            try:
                self._append(bytes(data))
            except OSError as error:
                self.error = error
                self.discard()
        return len(data)

    def _append(self, data: bytes) -> None:
        if self._descriptor is None:
            # No part of the object in the name: even a UID leads to a patient.
            self.path = self._folder / f".tmp-{secrets.token_hex(12)}.dcm"
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
            self._descriptor = os.open(self.path, flags, 0o666)
            self._write(self._preamble())
        self._write(data)

    def _write(self, data: bytes) -> None:
        assert self._descriptor is not None
        left = memoryview(data)
        while left:
            left = left[os.write(self._descriptor, left) :]

    def _preamble(self) -> bytes:
        """Return the file's beginning (PS3.10 7.1) from the command and the context."""
        command: Any = self._message.command_set
        context_id: Any = self._message.context_id
        context = self._association._accepted_cx[context_id]  # noqa: SLF001 - as the library
        meta = create_file_meta(
            sop_class_uid=command.AffectedSOPClassUID,
            sop_instance_uid=command.AffectedSOPInstanceUID,
            transfer_syntax=context.transfer_syntax[0],
        )
        # A title with other characters is not written: it would make a broken file.
        if is_ae_title(caller := str(self._association.requestor.ae_title)):
            meta.SendingApplicationEntityTitle = caller
        return b"\0" * 128 + b"DICM" + encode_file_meta(meta)

    def publish(self, target: Path) -> None:
        """Move the file to its place, whole and durable.

        Raises
        ------
        OSError
            If that fails; `discard` removes what is left.
        """
        assert self._descriptor is not None
        assert self.path is not None
        os.fsync(self._descriptor)
        os.close(self._descriptor)
        self._descriptor = None
        self.path.replace(target)
        self.path = None
        fsync_dir(target.parent)

    def discard(self) -> None:
        """Remove what was not published."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)
        path, self.path = self.path, None
        if path is not None:
            path.unlink(missing_ok=True)


class SpoolingProvider(DIMSEServiceProvider):
    """Takes messages in part by part, the objects among them on disk."""

    def __init__(self, association: Association, folder: Path, connection: BoundedSocket) -> None:
        super().__init__(association)
        self._folder = folder
        self._connection = connection
        self._spools: set[SpooledObject] = set()

    def receive_primitive(self, primitive: Any) -> None:  # noqa: ANN401 - a P_DATA
        """Take a part of a message; what cannot be one ends the connection."""
        if self._connection.is_cut:
            return
        self._connection.begin_message()
        if self.message is None:
            self.message = DIMSEMessage()
            spool = SpooledObject(self.message, self.assoc, self._folder)
            self._spools.add(spool)
            self.message.data_set = spool
        taken, spool_now = self.message, self.message.data_set
        try:
            super().receive_primitive(primitive)
        # Whatever a peer sends: an exception would end the library's thread with a traceback.
        except Exception:
            self._connection.cut("message not understood")
            return
        message: DIMSEMessage | None = vars(self)["message"]
        if message is None:
            # The peer's answers to this side's own requests are answered by nothing.
            self._connection.end_message(is_request=type(taken).__name__.endswith("_RQ"))
            if isinstance(spool_now, SpooledObject) and spool_now.path is None:
                self._spools.discard(spool_now)
            if self._connection.unanswered > _UNANSWERED:
                self._connection.cut("answers not awaited")
        elif message.encoded_command_set.tell() > _COMMAND_BYTES:
            self._connection.cut("message not understood")

    def send_msg(self, primitive: Any, context_id: int) -> None:  # noqa: ANN401 - the library's
        """Send an answer, or a request."""
        if primitive.MessageIDBeingRespondedTo is not None:
            self._connection.answered()
        super().send_msg(primitive, context_id)

    def forget(self, spool: SpooledObject) -> None:
        """Remove what is left of an object that was dealt with."""
        spool.discard()
        self._spools.discard(spool)

    def discard(self) -> None:
        """Remove what did not become an object; the association has ended."""
        for spool in list(self._spools):
            self.forget(spool)


def _uids(head: bytes, syntax: Any) -> tuple[str, str]:  # noqa: ANN401 - pydicom's UID
    """Return the SOP Class and Instance UID of a data set's beginning; empty where missing."""
    if syntax == DeflatedExplicitVRLittleEndian:
        head = zlib.decompressobj(-zlib.MAX_WBITS).decompress(head, _HEAD_BYTES)

    def is_behind(tag: BaseTag, vr: str | None, length: int) -> bool:
        del vr, length
        return int(tag) > _SOP_INSTANCE

    found = read_dataset(
        BytesIO(head), syntax.is_implicit_VR, syntax.is_little_endian, stop_when=is_behind
    )
    one, two = (
        (found.get_item(tag).value or b"").strip(b" \0").decode("ascii", "replace")
        if tag in found
        else ""
        for tag in (_SOP_CLASS, _SOP_INSTANCE)
    )
    return one, two


class StorageHandler:
    """Stores received objects in the drop folder of one home.

    Parameters
    ----------
    min_free_mb
        Free space below which nothing is taken, in MiB: the sender keeps its copy.
    """

    def __init__(self, home: Home, min_free_mb: int) -> None:
        self._home = home
        self._min_free_mb = min_free_mb

    def sweep(self) -> None:
        """Remove incomplete files that a killed process left in the drop folder."""
        for path in self._home.incoming.glob(".tmp-*.dcm"):
            if time.time() - path.stat().st_mtime > _LEFT_OVER_S:
                path.unlink(missing_ok=True)

    def store(self, event: "Event") -> int:
        """Answer a C-STORE request; success means that the file outlives a power loss.

        The data set is written as it came: all that is decoded are its SOP Class and Instance UID.
        The calling AE title goes into the file meta information, as Sending Application Entity
        Title (0002,0017).
        """
        caller = event.assoc.requestor.ae_title
        request: Any = event.request
        spool = request.DataSet
        provider = event.assoc.dimse
        try:
            status = self._store(event, spool)
        except OSError as error:
            status = OUT_OF_RESOURCES if error.errno in _FULL else PROCESSING_FAILURE
        finally:
            if isinstance(provider, SpoolingProvider) and isinstance(spool, SpooledObject):
                provider.forget(spool)
        if status == SUCCESS:
            log("received", caller=caller)
        else:
            log("not_received", level=logging.WARNING, caller=caller, status=f"0x{status:04X}")
        return status

    def _store(self, event: "Event", spool: object) -> int:
        if self._home.free_mb() < self._min_free_mb:
            return OUT_OF_RESOURCES
        if not isinstance(spool, SpooledObject) or not spool.size:
            return CANNOT_UNDERSTAND
        if spool.error is not None:
            raise spool.error
        try:
            uids = _uids(spool.head, event.context.transfer_syntax)
        # Whatever the bytes are.
        except Exception:
            return CANNOT_UNDERSTAND
        request: Any = event.request
        if uids != (str(request.AffectedSOPClassUID), str(request.AffectedSOPInstanceUID)):
            return DOES_NOT_MATCH
        spool.publish(self._home.incoming / f"pacs-{secrets.token_hex(12)}.dcm")
        return SUCCESS
