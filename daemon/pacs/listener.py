"""Storage and verification SCP (PS3.4 annexes A and B): access list, TLS, limits, reception."""

import errno
import ipaddress
import logging
import secrets
import socket
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from socketserver import BaseServer
from typing import TYPE_CHECKING, Any

import pynetdicom
from pydicom.uid import AllTransferSyntaxes
from pynetdicom import AllStoragePresentationContexts, evt
from pynetdicom.ae import ApplicationEntity
from pynetdicom.association import Association
from pynetdicom.dsutils import encode_file_meta
from pynetdicom.events import EventHandlerType
from pynetdicom.presentation import PresentationContext, build_context
from pynetdicom.transport import AssociationServer, AssociationSocket, RequestHandler

from lungwatch.daemon.config import Config, is_ae_title
from lungwatch.daemon.home import Home
from lungwatch.daemon.logs import event as log
from lungwatch.daemon.pacs.commitment import PUSH_MODEL, CommitmentHandlers
from lungwatch.daemon.retry import SystemClock
from lungwatch.daemon.stage import Progress, Worker
from lungwatch.errors import ConfigError
from lungwatch.files import write_atomic

if TYPE_CHECKING:
    from pynetdicom.events import Event


def _server_context(config: Config) -> ssl.SSLContext:
    """Return the context of a TLS server (PS3.15 annex B: BCP 195), TLS 1.2 and later."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(config.pacs_tls_certificate, config.pacs_tls_key or None)
        if config.pacs_tls_ca:
            context.load_verify_locations(config.pacs_tls_ca)
            context.verify_mode = ssl.CERT_REQUIRED
    except OSError as error:  # which SSLError is, too
        raise ConfigError(
            f"cannot use the files of 'pacs.tls_…': {error.strerror or 'unreadable'}"
        ) from error
    return context


_Network = ipaddress.IPv4Network | ipaddress.IPv6Network
_LOOPBACK = ("127.0.0.0/8", "::1/128")


def _networks(addresses: Sequence[str]) -> tuple[_Network, ...]:
    """Parse addresses and networks ("10.1.0.0/16"); none means this machine alone."""
    try:
        return tuple(ipaddress.ip_network(text) for text in addresses or _LOOPBACK)
    except ValueError as error:
        raise ConfigError(f"bad value for 'pacs.calling_addresses': {error}") from error


def _is_in(networks: Sequence[_Network], address: str) -> bool:
    # An IPv4 client of an IPv6 socket comes as ::ffff:10.0.0.1; a scope follows a %.
    client = ipaddress.ip_address(address.partition("%")[0])
    mapped = getattr(client, "ipv4_mapped", None)
    return any((mapped or client) in network for network in networks)


def _log_refusal(address: str, why: str) -> None:
    log("refused", level=logging.WARNING, address=address, why=why)


# PS3.4 table B.2-1, PS3.7 annex C.
SUCCESS = 0x0000
OUT_OF_RESOURCES = 0xA700
CANNOT_UNDERSTAND = 0xC000
PROCESSING_FAILURE = 0x0110
_FULL = {errno.ENOSPC, errno.EDQUOT}
_LEFT_OVER_S = 3600.0


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

        The data set is written as it came: its bytes are not decoded. The calling AE title goes
        into the file meta information, as Sending Application Entity Title (0002,0017).
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
        data_set = event.encoded_dataset(include_meta=False)
        if not data_set:
            return CANNOT_UNDERSTAND
        meta = event.file_meta
        # PS3.10 7.1. A title with other characters is not written: it would make a broken file.
        if is_ae_title(caller := event.assoc.requestor.ae_title):
            meta.SendingApplicationEntityTitle = caller
        data = b"\0" * 128 + b"DICM" + encode_file_meta(meta) + data_set
        # No part of the object in the name: even a UID leads to a patient.
        write_atomic(self._home.incoming / f"pacs-{secrets.token_hex(12)}.dcm", data)
        return SUCCESS


_HANDSHAKE_S = 10.0
_HANDSHAKES = 8
_SPARE_CONNECTIONS = 8
_MIB = 1024 * 1024
_VERIFICATION = "1.2.840.10008.1.1"
# Above any association request, and above what we say that a PDU may have.
MAX_PDU_BYTES = 1024 * 1024


class BoundedSocket(AssociationSocket):
    """A connection that ends when more is sent than an object may have.

    The library reads as much as a PDU's header announces, up to 4 GiB.
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

    def reset(self) -> None:
        """Start counting the next object."""
        self._received = 0


class _AssociationHandler(RequestHandler):
    server: "BoundedServer"

    def _create_association(self) -> Association:
        association = super()._create_association()
        connection = association.dul.socket
        # The library makes the socket, takes no other, and has begun to listen to this one.
        connection.__class__ = BoundedSocket
        assert isinstance(connection, BoundedSocket)
        connection.max_object_bytes = self.server.max_object_bytes
        return association


def _commitment_contexts(handlers: list[EventHandlerType]) -> list[PresentationContext]:
    """Return the context of storage commitment if its requests are handled.

    The caller may be its SCU, which asks, or by role selection its SCP, which reports.
    """
    if not any(handler[0] is evt.EVT_N_ACTION for handler in handlers):
        return []
    context = build_context(PUSH_MODEL)
    context.scu_role = context.scp_role = True
    return [context]


class BoundedServer(AssociationServer):
    """Association server with limits on clients, connections and object size.

    Parameters
    ----------
    on_round
        Called several times a second, for as long as connections are being accepted.

    Raises
    ------
    OSError
        If the port cannot be bound.
    ConfigError
        If an address or a TLS file is invalid.
    """

    request_queue_size = 64

    def __init__(
        self,
        config: Config,
        entity: ApplicationEntity,
        handlers: list[EventHandlerType],
        on_round: Callable[[], None],
    ) -> None:
        self._networks = _networks(config.pacs_calling_addresses)
        # Beyond the maximum of associations, so that further ones can be rejected properly.
        self._max_connections = config.pacs_max_associations + _SPARE_CONNECTIONS
        self.max_object_bytes = config.pacs_max_object_mb * _MIB
        self._on_round = on_round
        self._in_handshake = threading.Semaphore(_HANDSHAKES)
        contexts = [
            build_context(str(context.abstract_syntax), list(AllTransferSyntaxes))
            for context in AllStoragePresentationContexts
        ]
        super().__init__(
            entity,
            (config.pacs_address, config.pacs_port),
            entity.ae_title,
            [*contexts, build_context(_VERIFICATION), *_commitment_contexts(handlers)],
            ssl_context=_server_context(config) if config.pacs_tls_certificate else None,
            evt_handlers=handlers,
            request_handler=_AssociationHandler,
        )

    def service_actions(self) -> None:
        """Do what is due after each look for connections."""
        super().service_actions()
        self._on_round()

    def get_request(self) -> tuple[socket.socket, Any]:
        """Accept a connection; its TLS handshake follows on a thread of its own."""
        assert self.socket is not None
        return self.socket.accept()

    def verify_request(self, request: Any, client_address: Any) -> bool:  # noqa: ANN401, ARG002 - socketserver's
        """Return whether a connection is accepted."""
        if not _is_in(self._networks, client_address[0]):
            _log_refusal(client_address[0], "address")
            return False
        if len(self.active_associations) >= self._max_connections:
            _log_refusal(client_address[0], "too many")
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
            _log_refusal(client_address[0], "too many")
            self.shutdown_request(request)

    def _shake_hands(self, request: socket.socket, client_address: Any) -> None:  # noqa: ANN401 - as above
        # A client that never starts its handshake must not delay the others.
        assert self.ssl_context is not None
        try:
            request.settimeout(_HANDSHAKE_S)
            encrypted = self.ssl_context.wrap_socket(request, server_side=True)
            encrypted.settimeout(None)
        except (OSError, ssl.SSLError):
            _log_refusal(client_address[0], "TLS handshake")
            self.shutdown_request(request)
            return
        finally:
            self._in_handshake.release()
        super().process_request(encrypted, client_address)

    def shutdown(self) -> None:
        """End `serve_forever`, close the port, and abort what is still being received."""
        # The library's own method looks for servers that it started itself.
        BaseServer.shutdown(self)
        self.server_close()
        for association in self.active_associations:
            association.abort()

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ANN401, ARG002 - socketserver's
        """Log that a connection failed, without a traceback."""
        _log_refusal(client_address[0], "connection failed")


_ACSE_S = 15.0
_DIMSE_S = 30.0
# Idle time that ends an association; a sender may pause between two images.
_NETWORK_S = 60.0
_PDU_BYTES = 256 * 1024
_POLL_S = 0.2


class Listener:
    """Receives objects until stopped.

    Parameters
    ----------
    on_crash
        As of `Worker`.
    progress
        Where each object that is taken is noted as a unit of the stage "reception", and that
        connections are being accepted as the progress of the stage "listener".
    commitment
        Answers requests of storage commitment, which are not accepted without it.

    Raises
    ------
    ConfigError
        If the port cannot be bound, the addresses or the TLS files are invalid, or everybody
        would be accepted.
    """

    def __init__(
        self,
        config: Config,
        home: Home,
        on_crash: Callable[[str, BaseException], None],
        progress: Progress | None = None,
        commitment: CommitmentHandlers | None = None,
    ) -> None:
        # Its log lines quote data sets.
        logging.getLogger(pynetdicom.__name__).setLevel(logging.CRITICAL + 1)
        self._reception = StorageHandler(home, config.min_free_mb)
        self._progress = progress or Progress(SystemClock())
        self._commitment = commitment
        entity = ApplicationEntity(ae_title=config.pacs_ae_title)
        entity.require_called_aet = True
        entity.require_calling_aet = list(config.pacs_calling_ae_titles)
        entity.maximum_associations = config.pacs_max_associations
        entity.maximum_pdu_size = _PDU_BYTES
        entity.acse_timeout, entity.dimse_timeout = _ACSE_S, _DIMSE_S
        entity.network_timeout = _NETWORK_S
        handlers: list[EventHandlerType] = [
            (evt.EVT_C_STORE, self._on_store),
            (evt.EVT_C_ECHO, self._on_echo),
            (evt.EVT_REJECTED, self._on_rejected),
        ]
        if commitment is not None:
            handlers += [
                (evt.EVT_N_ACTION, commitment.on_action),
                (evt.EVT_N_EVENT_REPORT, commitment.on_report),
            ]
        try:
            self._server = BoundedServer(
                config, entity, handlers, lambda: self._progress.beat("listener")
            )
        except OSError as error:
            raise ConfigError(
                f"cannot listen on {config.pacs_address} port {config.pacs_port}: {error.strerror}"
            ) from error
        self._thread = Worker("listener", self._serve, on_crash)

    @property
    def port(self) -> int:
        """The port that is listened on."""
        return int(self._server.server_address[1])

    def start(self) -> None:
        """Begin to listen."""
        self._reception.sweep()
        if self._commitment is not None:
            self._commitment.start()
        self._thread.start()
        log("listening", port=self.port, tls=self._server.ssl_context is not None)

    def stop(self) -> None:
        """Close the port; objects being received are aborted, and their senders keep them."""
        self._server.shutdown()
        self._thread.join()
        if self._commitment is not None:
            self._commitment.stop()

    def _serve(self) -> None:
        with self._progress.busy("listener"):
            self._server.serve_forever(_POLL_S)

    def _on_store(self, event: evt.Event) -> int:
        connection = event.assoc.dul.socket
        if isinstance(connection, BoundedSocket):
            connection.reset()
        with self._progress.busy("reception"):
            return self._reception.store(event)

    @staticmethod
    def _on_echo(event: evt.Event) -> int:
        del event
        return SUCCESS

    @staticmethod
    def _on_rejected(event: evt.Event) -> None:
        _log_refusal(event.assoc.requestor.address, "AE title, or too many associations")
