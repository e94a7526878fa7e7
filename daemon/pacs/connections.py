"""Connections of the listener: deadlines of reads and writes, least rate, limits, cut-off.

The library reads and writes on one thread of each association, without an end: a peer that stops in
the middle of a PDU would hold its association for good, and delay a stop for as long.
"""

import logging
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pynetdicom.ae import ApplicationEntity
from pynetdicom.association import Association
from pynetdicom.transport import AssociationSocket

from lungwatch.daemon.logs import event as log

if TYPE_CHECKING:
    from lungwatch.daemon.config import Config

# Above any association request, and above what we say that a PDU may have.
MAX_PDU_BYTES = 1024 * 1024
ACSE_S = 15.0
_MIB = 1024 * 1024
_KEEPALIVE_S = 30
_KEEPALIVE_EVERY_S = 10
_KEEPALIVE_TRIES = 3
_CHUNK_BYTES = 65_536
_RELEASE_S = 2.0


@dataclass(frozen=True, kw_only=True)
class ConnectionLimits:
    """Limits of one connection.

    Attributes
    ----------
    request_s
        Seconds from the connection to the end of its association request.
    pdu_s
        Seconds that one PDU may take, read or written.
    min_rate_bytes_s
        Least rate of an unfinished message, measured over `pdu_s`, in bytes a second.
    idle_s
        Seconds between two messages, and between two associations' PDUs.
    max_object_bytes
        Of one message.
    """

    request_s: float
    pdu_s: float
    min_rate_bytes_s: int
    idle_s: float
    max_object_bytes: int

    @classmethod
    def of(cls, config: "Config") -> "ConnectionLimits":
        """Return the limits that are configured."""
        return cls(
            request_s=min(ACSE_S, config.pacs_pdu_timeout_s),
            pdu_s=config.pacs_pdu_timeout_s,
            min_rate_bytes_s=config.pacs_min_rate_bytes_s,
            idle_s=config.pacs_idle_timeout_s,
            max_object_bytes=config.pacs_max_object_mb * _MIB,
        )


def set_keepalive(connection: socket.socket, limits: ConnectionLimits) -> None:
    """Have the kernel find a peer that is gone, and what it does not acknowledge."""
    with suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _KEEPALIVE_S)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _KEEPALIVE_EVERY_S)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _KEEPALIVE_TRIES)
        unacknowledged_ms = round(limits.pdu_s * 1000)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, unacknowledged_ms)


def shut_down(connection: socket.socket | None) -> None:
    """End a connection under whichever thread reads from it or writes to it."""
    if connection is not None:
        with suppress(OSError):
            # Not SSLSocket's own, which takes the encryption away from the thread that uses it.
            socket.socket.shutdown(connection, socket.SHUT_RDWR)


class BoundedSocket(AssociationSocket):
    """A connection that ends when a limit is exceeded, and says why.

    The library makes the socket and takes no other: `guard` turns one into this.
    """

    limits: ConnectionLimits
    caller_address: str
    is_cut: bool
    since_s: float
    _received: int
    _window_s: float
    _window_bytes: int
    _pdu_since_s: float | None
    _in_message: bool
    unanswered: int

    @classmethod
    def guard(
        cls, connection: AssociationSocket, limits: ConnectionLimits, address: str
    ) -> "BoundedSocket":
        """Bound a connection that the library has made."""
        now_s = time.monotonic()
        values = {
            "limits": limits,
            "caller_address": address,
            "is_cut": False,
            "since_s": now_s,
            "_received": 0,
            "_window_s": now_s,
            "_window_bytes": 0,
            "_pdu_since_s": None,
            "_in_message": False,
            "unanswered": 0,
        }
        vars(connection).update(values)
        connection.__class__ = cls
        assert isinstance(connection, cls)
        if connection.socket is not None:
            set_keepalive(connection.socket, limits)
        return connection

    @property
    def has_request(self) -> bool:
        """Whether the association request is here."""
        return self.assoc.requestor.primitive is not None

    def recv(self, nr_bytes: int) -> bytearray:
        """Read exactly so many bytes.

        Raises
        ------
        OSError
            If there are too many, or they do not come in time.
        """
        self._received += nr_bytes
        if nr_bytes > MAX_PDU_BYTES or self._received > self.limits.max_object_bytes:
            self.cut("PDU or object too large")
            raise OSError("too much data")
        if self.socket is None:
            raise OSError("closed")
        received = bytearray()
        with self._timed(self.socket) as end_s:
            while len(received) < nr_bytes:
                self.socket.settimeout(max(end_s - time.monotonic(), 0.001))
                part = self.socket.recv(min(nr_bytes - len(received), _CHUNK_BYTES))
                if not part:
                    break
                received += part
                self._window_bytes += len(part)
                if time.monotonic() > end_s:
                    raise TimeoutError
        return received

    def send(self, bytestream: bytes) -> None:
        """Write, within the time of one PDU; else the connection ends."""
        if self.socket is None:
            return
        try:
            with self._timed(self.socket) as end_s:
                self.socket.settimeout(max(end_s - time.monotonic(), 0.001))
                self.socket.sendall(bytestream)
        except OSError:
            self.event_queue.put("Evt17")

    @contextmanager
    def _timed(self, connection: socket.socket) -> Iterator[float]:
        """Yield the end of this PDU's time, monotonic."""
        started_s = self._pdu_since_s = time.monotonic()
        allowed_s = self.limits.pdu_s if self.has_request else self.limits.request_s
        try:
            yield started_s + allowed_s
        except TimeoutError:
            self.cut("PDU not in time")
            raise
        finally:
            self._pdu_since_s = None
            with suppress(OSError):
                connection.settimeout(None)

    def begin_message(self) -> None:
        """Note that the first part of a message is here."""
        if not self._in_message:
            self._in_message = True
            self._window_s, self._window_bytes = time.monotonic(), 0

    def end_message(self, *, is_request: bool) -> None:
        """Note that a message is complete; the answer to a request is owed."""
        self._in_message = False
        self._received = 0
        self.unanswered += is_request
        self.since_s = time.monotonic()

    def answered(self) -> None:
        """Note that a message is answered."""
        self.unanswered = max(0, self.unanswered - 1)
        self.since_s = time.monotonic()

    def check(self) -> None:
        """Cut the connection if it is past a limit. Called several times a second."""
        now_s = time.monotonic()
        limits = self.limits
        if self.is_cut:
            self._release()
        elif not self.has_request:
            if now_s - self.since_s > limits.request_s:
                self.cut("no association request")
            elif self.socket is None:
                self._release()
        elif self._pdu_since_s is not None and now_s - self._pdu_since_s > limits.pdu_s:
            self.cut("PDU not in time")
        elif self._in_message:
            self._check_rate(now_s)
        elif not self.unanswered and now_s - self.since_s > limits.idle_s:
            self.cut("idle")

    def _check_rate(self, now_s: float) -> None:
        if now_s - self._window_s <= self.limits.pdu_s:
            return
        if self._window_bytes < self.limits.min_rate_bytes_s * self.limits.pdu_s:
            self.cut("too slow")
        self._window_s, self._window_bytes = now_s, 0

    def cut(self, why: str) -> None:
        """End the connection; the log says why, once."""
        if self.is_cut:
            return
        self.is_cut = True
        title = str(self.assoc.requestor.ae_title or "") if self.has_request else ""
        log(
            "cut_off",
            level=logging.WARNING,
            why=why,
            address=self.caller_address,
            caller=title.strip(),
        )
        self.end()

    def end(self) -> None:
        """End the connection without a line in the log."""
        self.is_cut = True
        shut_down(self.socket)
        self._release()

    def _release(self) -> None:
        if not self.has_request:
            # The association's thread waits here for the request; None is the end of its time.
            self.assoc.dul.to_user_queue.put(None)


class BoundedEntity(ApplicationEntity):
    """An application entity that counts an association once its request is here.

    A connection that asks for nothing takes no place from those that do.
    """

    @property
    def active_associations(self) -> list[Association]:
        """Associations that were asked for and have not ended."""
        return [
            association
            for association in super().active_associations
            if association.requestor.primitive is not None and not is_cut(association)
        ]


def is_cut(association: Association) -> bool:
    """Whether an association's connection was ended here."""
    connection = association.dul.socket
    return isinstance(connection, BoundedSocket) and connection.is_cut


class Handshakes:
    """TLS handshakes in progress, each with one deadline for all of it."""

    def __init__(self, most: int, seconds: float) -> None:
        self._most = most
        self._seconds = seconds
        self._guard = threading.Lock()
        self._since: dict[socket.socket, float] = {}

    def begin(self, connection: socket.socket) -> bool:
        """Note a handshake; False if there are too many."""
        with self._guard:
            if len(self._since) >= self._most:
                return False
            self._since[connection] = time.monotonic()
            return True

    def end(self, connection: socket.socket) -> None:
        """Forget a handshake."""
        with self._guard:
            self._since.pop(connection, None)

    def check(self, *, all_of_them: bool = False) -> None:
        """End those that are past their time, or all."""
        with self._guard:
            for connection, since_s in self._since.items():
                if all_of_them or time.monotonic() - since_s > self._seconds:
                    shut_down(connection)
