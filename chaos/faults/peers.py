"""Stalled peers: senders that take the listener's associations and go no further."""

import contextlib
import importlib.util
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any, ClassVar

from chaos.fault import Fault, Lab, Trial
from chaos.place import ChaosError, Place
from tests.support.pictures import dicom

_PEERS = 20
_FILES = 4
_STOP_S = 40.0
# A P-DATA-TF's header that announces 10,000 bytes (PS3.8 9.3.5).
_HEADER = struct.pack(">BBL", 4, 0, 10_000)


class StalledPeers(Fault):
    """Senders stop in the middle of a PDU while others have objects to send."""

    name: ClassVar[str] = "stalled peers"
    how: ClassVar[str] = (
        f"{_PEERS} peers ask the listener for an association, and those that get one stop in the "
        "middle of a PDU; another sender has to deliver its objects, and a stop has to end in time"
    )

    def obstacle(self) -> str | None:
        """Without the extra nothing listens."""
        if importlib.util.find_spec("pynetdicom"):
            return None
        return "needs the extra 'pacs'"

    def trials(self, lab: Lab) -> Iterator[Trial]:
        """Stall, send until all is taken, stall again, stop."""
        for repeat in range(lab.times(2, 10)):
            yield self._trial(lab, repeat)

    def _trial(self, lab: Lab, repeat: int) -> Trial:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port: int = free.getsockname()[1]
        place = lab.place(PACS_PORT=str(port), PACS_PDU_TIMEOUT_S="3", PACS_IDLE_TIMEOUT_S="3")
        place.start_ready()
        with ExitStack() as stack:
            _stall(stack, port)
            began_s = time.monotonic()
            for number in range(repeat * 100, repeat * 100 + _FILES):
                place.wait_for(partial(_send, number, port), "no object is taken")
            place.wait_for(partial(_has_ended, place), "the objects have no end")
            recovery_s = time.monotonic() - began_s
            # The listener writes a file header of its own: the rows name what came.
            place.dropped.update(dict.fromkeys(place.ended(), "received"))
            cuts = place.log().count("action=cut_off")
            if not cuts:
                raise ChaosError("no peer was cut off")
            _stall(stack, port)
            began_s = time.monotonic()
            place.stop()
            stop_s = time.monotonic() - began_s
        if stop_s > _STOP_S:
            raise ChaosError(f"the stop took {stop_s:.0f} s")
        trial = Trial(
            audit=place.audit(),
            recovery_s=recovery_s,
            injected=cuts,
            note=f"{_FILES} objects of another sender taken beside {_PEERS} stalled peers",
        )
        lab.clear(place, trial.audit)
        return trial


def _stall(stack: ExitStack, port: int) -> None:
    for _ in range(_PEERS):
        peer = stack.enter_context(socket.create_connection(("127.0.0.1", port), 60))
        peer.sendall(_request())
        with contextlib.suppress(OSError):  # rejected
            if peer.recv(1) == b"\x02":
                peer.sendall(_HEADER)


def _request() -> bytes:
    """Encode an association request for Verification (PS3.8 9.3.2)."""

    def item(kind: int, content: bytes) -> bytes:
        return struct.pack(">BBH", kind, 0, len(content)) + content

    body = struct.pack(">HH16s16s32x", 1, 0, b"LUNGWATCH".ljust(16), b"STALLED".ljust(16))
    body += item(0x10, b"1.2.840.10008.3.1.1.1")
    syntax = item(0x30, b"1.2.840.10008.1.1") + item(0x40, b"1.2.840.10008.1.2")
    body += item(0x20, b"\x01\0\0\0" + syntax)
    body += item(0x50, item(0x51, struct.pack(">L", 16_384)) + item(0x52, b"1.2.3"))
    return struct.pack(">BBL", 1, 0, len(body)) + body


def _send(number: int, port: int) -> bool:
    """Send one object; return whether it was taken."""
    from io import BytesIO  # noqa: PLC0415 - with the extra alone

    from pydicom import dcmread  # noqa: PLC0415 - as above
    from pynetdicom import AE  # noqa: PLC0415 - as above

    image: Any = dcmread(BytesIO(dicom(number)))
    entity = AE(ae_title="CHAOS")
    entity.add_requested_context(image.SOPClassUID, image.file_meta.TransferSyntaxUID)
    association = entity.associate("127.0.0.1", port, ae_title="LUNGWATCH")
    if not association.is_established:
        return False
    try:
        status: Any = association.send_c_store(image)
        return bool(status.get("Status") == 0x0000)
    finally:
        association.release()


def _has_ended(place: Place) -> bool:
    return len(place.ended()) == _FILES
