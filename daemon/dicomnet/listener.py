"""The storage and verification services' provider (PS3.4 annexes A and B)."""

import logging
from collections.abc import Callable

import pynetdicom
from pydicom.uid import AllTransferSyntaxes
from pynetdicom import AllStoragePresentationContexts, evt
from pynetdicom.ae import ApplicationEntity
from pynetdicom.presentation import build_context

from lungwatch.daemon.clock import SystemClock
from lungwatch.daemon.config import Config
from lungwatch.daemon.dicomnet.access import AccessList
from lungwatch.daemon.dicomnet.reception import SUCCESS, Reception
from lungwatch.daemon.dicomnet.server import BoundedServer, BoundedSocket
from lungwatch.daemon.dicomnet.tls import server_context
from lungwatch.daemon.home import Home
from lungwatch.daemon.logs import event as log
from lungwatch.daemon.vitals import Vitals
from lungwatch.daemon.worker import Worker
from lungwatch.errors import ConfigError

_ACSE_S = 15.0
_DIMSE_S = 30.0
# Nothing at all for so long ends an association; a sender may pause between two images.
_NETWORK_S = 60.0
_PDU_BYTES = 256 * 1024
_MIB = 1024 * 1024
# Connections beyond the associations that are served, so that a refusal can be said.
_CONNECTIONS_TO_SPARE = 8
_POLL_S = 0.2


class Listener:
    """Receives objects until stopped.

    Parameters
    ----------
    on_crash
        As of `Worker`.
    vitals
        Where each object that is taken is noted as a unit of the stage "reception", and that
        connections are being accepted as the progress of the stage "listener".

    Raises
    ------
    ConfigError
        If the port cannot be had, the addresses or the TLS files make no sense, or everybody
        would be let in.
    """

    def __init__(
        self,
        config: Config,
        home: Home,
        on_crash: Callable[[str, BaseException], None],
        vitals: Vitals | None = None,
    ) -> None:
        # Its lines quote data sets.
        logging.getLogger(pynetdicom.__name__).setLevel(logging.CRITICAL + 1)
        self._reception = Reception(home, config.min_free_mb)
        self._vitals = vitals or Vitals(SystemClock())
        entity = ApplicationEntity(ae_title=config.pacs_ae_title)
        entity.require_called_aet = True
        entity.require_calling_aet = list(config.pacs_calling_ae_titles)
        entity.maximum_associations = config.pacs_max_associations
        entity.maximum_pdu_size = _PDU_BYTES
        entity.acse_timeout, entity.dimse_timeout = _ACSE_S, _DIMSE_S
        entity.network_timeout = _NETWORK_S
        contexts = [
            build_context(str(context.abstract_syntax), list(AllTransferSyntaxes))
            for context in AllStoragePresentationContexts
        ]
        contexts.append(build_context("1.2.840.10008.1.1"))
        access = AccessList.parse(config.pacs_calling_addresses)
        tls = None
        if config.pacs_tls_certificate:
            tls = server_context(
                config.pacs_tls_certificate, config.pacs_tls_key, config.pacs_tls_ca
            )
        try:
            self._server = BoundedServer(
                entity,
                (config.pacs_address, config.pacs_port),
                contexts,
                tls,
                [
                    (evt.EVT_C_STORE, self._on_store),
                    (evt.EVT_C_ECHO, self._on_echo),
                    (evt.EVT_REJECTED, self._on_rejected),
                ],
            )
        except OSError as error:
            raise ConfigError(
                f"cannot listen on {config.pacs_address} port {config.pacs_port}: {error.strerror}"
            ) from error
        self._server.on_round = lambda: self._vitals.beat("listener")
        self._server.access = access
        self._server.max_connections = config.pacs_max_associations + _CONNECTIONS_TO_SPARE
        self._server.max_object_bytes = config.pacs_max_object_mb * _MIB
        self._thread = Worker("listener", self._serve, on_crash)

    @property
    def port(self) -> int:
        """The port that is listened on."""
        return int(self._server.server_address[1])

    def start(self) -> None:
        """Begin to listen."""
        self._reception.sweep()
        self._thread.start()
        log("listening", port=self.port, tls=self._server.ssl_context is not None)

    def stop(self) -> None:
        """Take no more; what is being received is aborted, and its sender keeps its copy."""
        self._server.shutdown()
        self._thread.join()

    def _serve(self) -> None:
        with self._vitals.busy("listener"):
            self._server.serve_forever(_POLL_S)

    def _on_store(self, event: evt.Event) -> int:
        connection = event.assoc.dul.socket
        if isinstance(connection, BoundedSocket):
            connection.start_anew()
        with self._vitals.busy("reception"):
            return self._reception.store(event)

    @staticmethod
    def _on_echo(event: evt.Event) -> int:
        del event
        return SUCCESS

    @staticmethod
    def _on_rejected(event: evt.Event) -> None:
        log(
            "refused",
            level=logging.WARNING,
            address=event.assoc.requestor.address,
            why="AE title, or too many associations",
        )
