"""pynetdicom's server with bounds: who connects, how many, how much they may send at once."""

import logging
import socket
import ssl
import threading
from collections.abc import Callable
from socketserver import BaseServer
from typing import Any

from pynetdicom.ae import ApplicationEntity
from pynetdicom.association import Association
from pynetdicom.events import EventHandlerType
from pynetdicom.presentation import PresentationContext
from pynetdicom.transport import AssociationServer, AssociationSocket, RequestHandler

from lungwatch.daemon.dicomnet.access import AccessList
from lungwatch.daemon.logs import event as log

_HANDSHAKE_S = 10.0
_HANDSHAKES = 8
# Above any association request, and above what we say that a PDU may have.
MAX_PDU_BYTES = 1024 * 1024


class BoundedSocket(AssociationSocket):
    """A connection that breaks off when more is sent than an object may have.

    The library reads as much as a PDU's header promises, up to 4 GiB.
    """

    max_object_bytes = 0
    _received = 0

    def recv(self, nr_bytes: int) -> bytearray:
        """Read exactly so many bytes.

        Raises
        ------
        OSError
            If there are not as many, or too many.
        """
        self._received += nr_bytes
        if nr_bytes > MAX_PDU_BYTES or self._received > self.max_object_bytes:
            log("cut_off", level=logging.WARNING, why="PDU or object too large")
            raise OSError("too much data")
        return super().recv(nr_bytes)

    def start_anew(self) -> None:
        """Count from here: an object was taken."""
        self._received = 0


class _Handler(RequestHandler):
    server: "BoundedServer"

    def _create_association(self) -> Association:
        association = super()._create_association()
        connection = association.dul.socket
        # The library makes the socket, takes no other, and has begun to listen to this one.
        connection.__class__ = BoundedSocket
        assert isinstance(connection, BoundedSocket)
        connection.max_object_bytes = self.server.max_object_bytes
        return association


class BoundedServer(AssociationServer):
    """Listens for associations.

    Attributes
    ----------
    access
        Whose connections are taken.
    max_connections
        Open at once, established or not; further ones are closed.
    max_object_bytes
        Of one object.
    on_round
        Called several times a second, for as long as connections are being accepted.
    """

    request_queue_size = 64
    access: AccessList
    max_connections: int
    max_object_bytes: int
    on_round: Callable[[], None]

    def __init__(
        self,
        entity: ApplicationEntity,
        address: tuple[str, int],
        contexts: list[PresentationContext],
        tls: ssl.SSLContext | None,
        handlers: list[EventHandlerType],
    ) -> None:
        super().__init__(
            entity,
            address,
            entity.ae_title,
            contexts,
            ssl_context=tls,
            evt_handlers=handlers,
            request_handler=_Handler,
        )
        self._in_handshake = threading.Semaphore(_HANDSHAKES)

    def service_actions(self) -> None:
        """Do what is due after each look for connections."""
        super().service_actions()
        self.on_round()

    def get_request(self) -> tuple[socket.socket, Any]:
        """Take a connection; its handshake comes later, on a thread of its own."""
        assert self.socket is not None
        return self.socket.accept()

    def verify_request(self, request: Any, client_address: Any) -> bool:  # noqa: ANN401, ARG002 - socketserver's
        """Whether a connection is let in."""
        if not self.access.allows(client_address[0]):
            log("refused", level=logging.WARNING, address=client_address[0], why="address")
            return False
        if len(self.active_associations) >= self.max_connections:
            log("refused", level=logging.WARNING, address=client_address[0], why="too many")
            return False
        return True

    def process_request(self, request: Any, client_address: Any) -> None:  # noqa: ANN401 - socketserver's
        """Start an association."""
        if self.ssl_context is None:
            super().process_request(request, client_address)
        elif self._in_handshake.acquire(blocking=False):
            threading.Thread(
                target=self._shake_hands, args=(request, client_address), daemon=True
            ).start()
        else:
            log("refused", level=logging.WARNING, address=client_address[0], why="too many")
            self.shutdown_request(request)

    def _shake_hands(self, request: socket.socket, client_address: Any) -> None:  # noqa: ANN401 - as above
        # A client that never says hello must not hold up the others.
        assert self.ssl_context is not None
        try:
            request.settimeout(_HANDSHAKE_S)
            encrypted = self.ssl_context.wrap_socket(request, server_side=True)
            encrypted.settimeout(None)
        except (OSError, ssl.SSLError):
            log("refused", level=logging.WARNING, address=client_address[0], why="TLS handshake")
            self.shutdown_request(request)
            return
        finally:
            self._in_handshake.release()
        super().process_request(encrypted, client_address)

    def shutdown(self) -> None:
        """End `serve_forever`, close the port, and abort what is still being received."""
        # Not the library's own, which looks for the server where only it starts some.
        BaseServer.shutdown(self)
        self.server_close()
        for association in self.active_associations:
            association.abort()

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ANN401, ARG002 - socketserver's
        """Say that a connection failed, without a traceback."""
        log("refused", level=logging.WARNING, address=client_address[0], why="connection failed")
