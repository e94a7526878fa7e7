"""Storage and verification SCP (PS3.4 annexes A and B): access list, TLS, limits, reception."""

import ipaddress
import logging
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from socketserver import BaseServer
from typing import Any

import pynetdicom
from pydicom.uid import AllTransferSyntaxes
from pynetdicom import AllStoragePresentationContexts, evt
from pynetdicom.ae import ApplicationEntity
from pynetdicom.association import Association
from pynetdicom.events import EventHandlerType
from pynetdicom.presentation import PresentationContext, build_context
from pynetdicom.transport import AssociationServer, RequestHandler

from lungwatch.daemon.config import Config
from lungwatch.daemon.home import Home
from lungwatch.daemon.logs import event as log
from lungwatch.daemon.pacs.commitment import PUSH_MODEL, CommitmentHandlers
from lungwatch.daemon.pacs.connections import (
    ACSE_S,
    BoundedEntity,
    BoundedSocket,
    ConnectionLimits,
    Handshakes,
)
from lungwatch.daemon.pacs.reception import SUCCESS, SpoolingProvider, StorageHandler
from lungwatch.daemon.retry import SystemClock
from lungwatch.daemon.stage import Progress, Worker
from lungwatch.errors import ConfigError


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


_HANDSHAKE_S = 10.0
_HANDSHAKES = 8
_SPARE_CONNECTIONS = 8
_SPARE_PER_ADDRESS = 2
_STOP_S = 5.0
_VERIFICATION = "1.2.840.10008.1.1"


class _AssociationHandler(RequestHandler):
    server: "BoundedServer"

    def _create_association(self) -> Association:
        association = super()._create_association()
        connection = association.dul.socket
        assert connection is not None
        bounded = BoundedSocket.guard(connection, self.server.limits, self.client_address[0])
        association.dimse = SpoolingProvider(association, self.server.folder, bounded)
        self.server.track(association)
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
    """Association server with limits on clients, connections, time and object size.

    Parameters
    ----------
    folder
        Where objects are spooled.

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
        folder: Path,
    ) -> None:
        self._networks = _networks(config.pacs_calling_addresses)
        # Beyond the maximum of associations, so that further ones can be rejected properly.
        self._max_connections = config.pacs_max_associations + _SPARE_CONNECTIONS
        self._max_per_address = config.pacs_max_associations_per_address or max(
            1, config.pacs_max_associations - _SPARE_PER_ADDRESS
        )
        self.limits = ConnectionLimits.of(config)
        self.folder = folder
        self.own_ports: set[int] = set()
        self._tracked: set[Association] = set()
        self._guard = threading.Lock()
        self._handshakes = Handshakes(_HANDSHAKES, _HANDSHAKE_S)
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
            evt_handlers=[*handlers, (evt.EVT_REQUESTED, self._on_requested)],
            request_handler=_AssociationHandler,
        )

    def track(self, association: Association) -> None:
        """Bound an association's time until it ends."""
        with self._guard:
            self._tracked.add(association)

    def _connections(self) -> list[tuple[Association, BoundedSocket]]:
        with self._guard:
            found = [(one, one.dul.socket) for one in self._tracked]
        return [(one, bounded) for one, bounded in found if isinstance(bounded, BoundedSocket)]

    def service_actions(self) -> None:
        """Do what is due after each look for connections."""
        super().service_actions()
        self._handshakes.check()
        for association, connection in self._connections():
            connection.check()
            if association.ident and not association.is_alive() and not association.dul.is_alive():
                self._forget(association)

    def _forget(self, association: Association) -> None:
        with self._guard:
            self._tracked.discard(association)
        if isinstance(association.dimse, SpoolingProvider):
            association.dimse.discard()

    def get_request(self) -> tuple[socket.socket, Any]:
        """Accept a connection; its TLS handshake follows on a thread of its own."""
        assert self.socket is not None
        return self.socket.accept()

    def _is_own(self, client_address: Any) -> bool:  # noqa: ANN401 - socketserver's
        return client_address[1] in self.own_ports

    def verify_request(self, request: Any, client_address: Any) -> bool:  # noqa: ANN401, ARG002 - socketserver's
        """Return whether a connection is accepted."""
        if self._is_own(client_address):
            return True
        if not _is_in(self._networks, client_address[0]):
            _log_refusal(client_address[0], "address")
            return False
        connections = [connection for _, connection in self._connections()]
        if len([one for one in connections if not one.is_cut]) < self._max_connections:
            return True
        # Whoever asks for nothing makes room, as long as the threads of such ones are few.
        asking_nothing = [one for one in connections if not one.has_request and not one.is_cut]
        _log_refusal(client_address[0], "too many")
        if not asking_nothing or len(connections) >= 2 * self._max_connections:
            return False
        min(asking_nothing, key=lambda one: one.since_s).cut("too many connections")
        return True

    def _on_requested(self, event: evt.Event) -> None:
        """Reject one association too many of one address."""
        association = event.assoc
        address = association.requestor.address
        if association.requestor.port in self.own_ports:
            return
        address_of = {one: connection.caller_address for one, connection in self._connections()}
        same = [
            one
            for one, connection in self._connections()
            if connection.caller_address == address_of.get(association)
            and connection.has_request
            and not connection.is_cut
            and one is not association
        ]
        if len(same) >= self._max_per_address:
            _log_refusal(address, "too many associations of this address")
            # PS3.8 table 9-21: rejected-transient, presentation related, local limit exceeded.
            association.acse.send_reject(0x02, 0x03, 0x02)
            association.kill()

    def process_request(self, request: Any, client_address: Any) -> None:  # noqa: ANN401 - socketserver's
        """Start an association."""
        if self.ssl_context is None or self._is_own(client_address):
            super().process_request(request, client_address)
            return
        encrypted = self.ssl_context.wrap_socket(
            request, server_side=True, do_handshake_on_connect=False
        )
        if self._handshakes.begin(encrypted):
            threading.Thread(
                target=self._shake_hands, args=(encrypted, client_address), daemon=True
            ).start()
        else:
            _log_refusal(client_address[0], "too many")
            self.shutdown_request(encrypted)

    def _shake_hands(self, encrypted: ssl.SSLSocket, client_address: Any) -> None:  # noqa: ANN401 - as above
        # A client that never starts its handshake must not delay the others.
        try:
            encrypted.settimeout(_HANDSHAKE_S)
            encrypted.do_handshake()
            encrypted.settimeout(None)
        except (OSError, ssl.SSLError):
            _log_refusal(client_address[0], "TLS handshake")
            self.shutdown_request(encrypted)
            return
        finally:
            self._handshakes.end(encrypted)
        super().process_request(encrypted, client_address)

    def shutdown(self) -> None:
        """End `serve_forever`, close the port, and cut what is still being received."""
        # The library's own method looks for servers that it started itself.
        BaseServer.shutdown(self)
        self.server_close()
        self._handshakes.check(all_of_them=True)
        deadline_s = time.monotonic() + _STOP_S
        for _, connection in self._connections():
            connection.end()
        while time.monotonic() < deadline_s and self._tracked:
            for association in list(self._tracked):
                if not association.is_alive() and not association.dul.is_alive():
                    self._forget(association)
            time.sleep(_POLL_S / 10)

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ANN401, ARG002 - socketserver's
        """Log that a connection failed, without a traceback."""
        _log_refusal(client_address[0], "connection failed")


def _item(kind: int, content: bytes) -> bytes:
    """Encode an item of an association request (PS3.8 9.3.2)."""
    return struct.pack(">BBH", kind, 0, len(content)) + content


def _echo_request(called: str, calling: str) -> tuple[bytes, bytes]:
    """Encode an association request for Verification, and a C-ECHO request (PS3.7 9.3.5)."""
    context = (
        b"\x01\0\0\0" + _item(0x30, _VERIFICATION.encode()) + _item(0x40, b"1.2.840.10008.1.2")
    )
    user = _item(0x51, struct.pack(">L", 16_384)) + _item(0x52, b"1.2.826.0.1.3680043.9.3811.3.0.4")
    request = struct.pack(
        ">HH16s16s32x", 1, 0, called.encode().ljust(16), calling.encode().ljust(16)
    )
    request += _item(0x10, b"1.2.840.10008.3.1.1.1") + _item(0x20, context) + _item(0x50, user)
    uid = _VERIFICATION.encode() + b"\0"
    command = struct.pack("<HHL", 0, 0x0002, len(uid)) + uid
    for element, value in ((0x0100, 0x0030), (0x0110, 1), (0x0800, 0x0101)):
        command += struct.pack("<HHLH", 0, element, 2, value)
    command = struct.pack("<HHLL", 0, 0, 4, len(command)) + command
    part = struct.pack(">LBB", len(command) + 2, 1, 3) + command
    return struct.pack(">BBL", 1, 0, len(request)) + request, struct.pack(
        ">BBL", 4, 0, len(part)
    ) + part


class OwnEcho:
    """C-ECHO of the listener to itself: its sign of life.

    It takes no association of anybody else, and is let in whoever may send. A rejection is an
    answer too.
    """

    def __init__(self, server: BoundedServer, config: Config) -> None:
        self._server = server
        calling = (*config.pacs_calling_ae_titles, config.pacs_ae_title)[0]
        self._request, self._echo = _echo_request(config.pacs_ae_title, calling)

    def is_answered(self, within_s: float) -> bool:
        """Ask, and return whether an answer came in time."""
        address, port = self._server.server_address[:2]
        here = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(str(address), str(address))  # noqa: S104 - compared
        end_s = time.monotonic() + within_s
        with socket.socket(self._server.address_family, socket.SOCK_STREAM) as caller:
            try:
                caller.bind((here, 0))
                own_port = caller.getsockname()[1]
                self._server.own_ports.add(own_port)
                try:
                    caller.settimeout(within_s)
                    caller.connect((here, port))
                    caller.sendall(self._request)
                    if self._answer(caller, end_s) == 3:
                        return True
                    caller.sendall(self._echo)
                    is_answered = self._answer(caller, end_s) == 4
                    caller.sendall(b"\x05\0\0\0\0\x04\0\0\0\0")  # A-RELEASE-RQ
                    self._answer(caller, end_s)
                    return is_answered
                finally:
                    self._server.own_ports.discard(own_port)
            except OSError:
                return False

    @staticmethod
    def _answer(caller: socket.socket, end_s: float) -> int:
        """Read one PDU; return its type, 0 for none."""
        content = b""
        while len(content) < 6 or len(content) < 6 + struct.unpack(">L", content[2:6])[0]:
            caller.settimeout(max(end_s - time.monotonic(), 0.001))
            part = caller.recv(4096)
            if not part:
                return 0
            content += part
        return content[0]


_ECHO_EVERY_S = 30.0
_ECHO_S = 10.0
# Associations are ended by `BoundedSocket`; the library's own times only come after those.
_LIBRARY_SLACK_S = 5.0
_PDU_BYTES = 256 * 1024
_POLL_S = 0.2


class Listener:
    """Receives objects until stopped.

    Parameters
    ----------
    on_crash
        As of `Worker`.
    progress
        Where each object that is taken is noted as a unit of the stage "reception", and each own
        C-ECHO that is answered as the progress of the stage "listener".
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
        entity = BoundedEntity(ae_title=config.pacs_ae_title)
        entity.require_called_aet = True
        entity.require_calling_aet = list(config.pacs_calling_ae_titles)
        entity.maximum_associations = config.pacs_max_associations
        entity.maximum_pdu_size = _PDU_BYTES
        entity.acse_timeout = ACSE_S + _LIBRARY_SLACK_S
        entity.dimse_timeout = config.pacs_idle_timeout_s
        entity.network_timeout = config.pacs_idle_timeout_s + _LIBRARY_SLACK_S
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
            self._server = BoundedServer(config, entity, handlers, home.incoming)
        except OSError as error:
            raise ConfigError(
                f"cannot listen on {config.pacs_address} port {config.pacs_port}: {error.strerror}"
            ) from error
        self._echo = OwnEcho(self._server, config)
        self._echo_every_s = min(_ECHO_EVERY_S, config.stuck_s / 4)
        self._stopped = threading.Event()
        self._thread = Worker("listener", self._serve, on_crash)
        self._asker = Worker("listener-echo", self._ask, on_crash)

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
        self._asker.start()
        log("listening", port=self.port, tls=self._server.ssl_context is not None)

    def stop(self) -> None:
        """Close the port; objects being received are cut off, and their senders keep them."""
        self._stopped.set()
        self._server.shutdown()
        self._thread.join(_STOP_S)
        self._asker.join(_ECHO_S)
        if self._commitment is not None:
            self._commitment.stop()

    def _serve(self) -> None:
        self._server.serve_forever(_POLL_S)

    def _ask(self) -> None:
        with self._progress.busy("listener"):
            while not self._stopped.wait(self._echo_every_s):
                if self._echo.is_answered(min(_ECHO_S, 2 * self._echo_every_s)):
                    self._progress.beat("listener")
                elif not self._stopped.is_set():
                    log("echo_unanswered", level=logging.WARNING)

    def _on_store(self, event: evt.Event) -> int:
        with self._progress.busy("reception"):
            return self._reception.store(event)

    @staticmethod
    def _on_echo(event: evt.Event) -> int:
        del event
        return SUCCESS

    @staticmethod
    def _on_rejected(event: evt.Event) -> None:
        _log_refusal(event.assoc.requestor.address, "AE title, or too many associations")
