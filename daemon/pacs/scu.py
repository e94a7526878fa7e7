"""Storage SCU (PS3.4 annex B): associations with destinations, and what is to be sent."""

import logging
import socket
import ssl
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path
from typing import TYPE_CHECKING

from lungwatch.daemon.config import Config, Destination
from lungwatch.db.deliveries import DeliveryRow, OutboxPlan
from lungwatch.errors import LungwatchError, MissingExtraError

if TYPE_CHECKING:
    from pydicom.dataset import Dataset
    from pynetdicom import evt
    from pynetdicom.ae import ApplicationEntity
    from pynetdicom.association import Association
    from pynetdicom.events import EventHandlerType
    from pynetdicom.pdu_primitives import SCP_SCU_RoleSelectionNegotiation


def plan_of(config: Config) -> OutboxPlan | None:
    """Return which objects are sent of each result, and to which destinations; None for none."""
    if not config.pacs_destinations:
        return None
    return OutboxPlan(destinations=config.pacs_destinations, kinds=config.pacs_send)


_CONNECT_S = 10.0
_ACSE_S = 15.0
# A receiver may need long for one object; a silent association is dead.
_DIMSE_S = 60.0
# An object is given as long as the slowest line takes that is of use (bytes a second).
_LEAST_RATE = 16 * 1024
# Beyond the library's own timeouts, which a peer that trickles keeps from taking effect.
_GRACE_S = 5.0
_ESTABLISH_S = _CONNECT_S + _ACSE_S + _GRACE_S
_SUCCESS = 0x0000
# The object is there already, under a UID that only this program makes (PS3.7, C.4.2).
_DUPLICATE = 0x0111
_OUT_OF_RESOURCES = range(0xA700, 0xA800)
_WARNINGS = range(0xB000, 0xC000)


class StoreVerdict(Enum):
    """Meaning of a C-STORE response."""

    STORED = auto()
    REFUSED = auto()
    """The destination rejects this object."""
    OUT_OF_RESOURCES = auto()
    """The destination is out of resources (PS3.4, table B.2-1: A7xx)."""


@dataclass(frozen=True, kw_only=True)
class OutgoingObject:
    """A delivery whose object is there as a file, named by its SOP Instance UID."""

    row: DeliveryRow
    path: Path
    sop_class_uid: str


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Response to one object; `text` has no patient data."""

    verdict: StoreVerdict
    text: str


class UnreachableError(LungwatchError):
    """No association, or it broke."""


class StorageScu:
    """Storage SCU: sends objects to one destination after the other.

    Raises
    ------
    MissingExtraError
        If pynetdicom is not installed.
    """

    def __init__(self, config: Config) -> None:
        try:
            import pynetdicom  # noqa: PLC0415 - only where something is sent
        except ModuleNotFoundError as error:
            raise MissingExtraError("sending to a PACS", "pacs") from error
        # Its log lines may quote a data set; errors are raised or recorded here instead.
        logging.getLogger(pynetdicom.__name__).setLevel(logging.CRITICAL + 1)
        self._config = config
        self._association: Association | None = None

    def send(
        self, destination: Destination, objects: Sequence[OutgoingObject]
    ) -> Generator[tuple[OutgoingObject, Answer], None, None]:
        """Send objects over one association, yielding what was answered to each.

        Raises
        ------
        UnreachableError
            If there is no association, or none any more; what was not answered until then
            may or may not have been stored.
        """
        ae = self._entity({item.sop_class_uid for item in objects})
        association = self._associate(ae, destination)
        try:
            accepted = {str(context.abstract_syntax) for context in association.accepted_contexts}
            for item in objects:
                if item.sop_class_uid not in accepted:
                    yield item, Answer(verdict=StoreVerdict.REFUSED, text="SOP class not accepted")
                else:
                    yield item, self._store(association, item)
        finally:
            self._release(association)
            self._association = None

    def echo(self, destination: Destination) -> None:
        """Verify a destination by C-ECHO.

        Raises
        ------
        UnreachableError
            If there is no association, or no answer.
        """
        from pynetdicom.sop_class import Verification  # type: ignore[attr-defined]  # noqa: PLC0415

        association = self._associate(self._entity({Verification}), destination)
        try:
            with self._limited(_DIMSE_S + _GRACE_S):
                status = association.send_c_echo()
        finally:
            self._release(association)
            self._association = None
        if "Status" not in status or status.Status != _SUCCESS:
            raise UnreachableError("connected, but C-ECHO was not answered")

    def abort(self) -> bool:
        """Break the connection, from another thread; return whether there was one.

        The library's own abort waits until the peer has read what was sent before it.
        """
        association = self._association
        if association is None:
            return False
        connection = association.dul.socket
        if connection is not None and connection.socket is not None:
            with suppress(OSError):
                connection.socket.shutdown(socket.SHUT_RDWR)
        return True

    @contextmanager
    def _limited(self, seconds: float) -> Iterator[None]:
        """Break the connection if what is done inside takes longer."""
        timer = threading.Timer(seconds, self.abort)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _release(self, association: "Association") -> None:
        if association.is_established:
            with self._limited(_ACSE_S + _GRACE_S):
                association.release()

    def _store(self, association: "Association", item: OutgoingObject) -> Answer:
        try:
            allowed_s = _DIMSE_S + item.path.stat().st_size / _LEAST_RATE
            association.dimse_timeout = allowed_s
            with self._limited(allowed_s + _GRACE_S):
                status = association.send_c_store(item.path)
        except RuntimeError as error:  # the association ended between two objects
            raise UnreachableError("the association broke") from error
        except (OSError, ValueError, AttributeError):
            return Answer(verdict=StoreVerdict.REFUSED, text="the object's file cannot be read")
        return _answer(status)

    def _entity(self, sop_classes: set[str]) -> "ApplicationEntity":
        from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian  # noqa: PLC0415
        from pynetdicom.ae import ApplicationEntity  # noqa: PLC0415

        ae = ApplicationEntity(ae_title=self._config.pacs_ae_title)
        ae.connection_timeout = _CONNECT_S
        ae.acse_timeout = _ACSE_S
        ae.dimse_timeout = _DIMSE_S
        ae.network_timeout = _DIMSE_S
        for sop_class in sorted(sop_classes):
            ae.add_requested_context(sop_class, [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
        return ae

    def _associate(
        self,
        ae: "ApplicationEntity",
        destination: Destination,
        *,
        handlers: Sequence["EventHandlerType"] = (),
        ext_neg: Sequence["SCP_SCU_RoleSelectionNegotiation"] = (),
    ) -> "Association":
        from pynetdicom import evt  # noqa: PLC0415

        tls_args = None
        if destination.tls:
            tls_args = (self._context(), destination.host)
        started_s = time.monotonic()
        with self._limited(_ESTABLISH_S):
            association = ae.associate(
                destination.host,
                destination.port,
                ae_title=destination.ae_title,
                tls_args=tls_args,
                # Known from the start, so that it can be ended while it is negotiated.
                evt_handlers=[(evt.EVT_CONN_OPEN, self._on_open), *handlers],
                ext_neg=list(ext_neg) or None,
            )
        if association.is_established:
            return association
        if association.is_rejected:
            answer = association.acceptor.primitive
            why = answer.reason_str if answer is not None else "no reason given"
            raise UnreachableError(f"association rejected: {why}")
        if association.rejected_contexts:
            # The library aborts where no class was accepted; here that is a response.
            return association
        raise UnreachableError(_why_not(destination, time.monotonic() - started_s))

    def _on_open(self, opened: "evt.Event") -> None:
        self._association = opened.assoc

    def _context(self) -> ssl.SSLContext:
        config = self._config
        try:
            context = ssl.create_default_context(cafile=config.pacs_tls_ca or None)
            if config.pacs_tls_certificate:
                context.load_cert_chain(config.pacs_tls_certificate, config.pacs_tls_key or None)
        except OSError as error:  # which SSLError is, too
            raise UnreachableError(
                f"cannot use the files of 'pacs.tls_…': {error.strerror or 'unreadable'}"
            ) from error
        return context


def _answer(status: "Dataset") -> Answer:
    """Return what a C-STORE response means."""
    if "Status" not in status:
        raise UnreachableError("the association broke, or C-STORE was not answered")
    code = int(status.Status)
    text = f"C-STORE status 0x{code:04X}"
    if code in (_SUCCESS, _DUPLICATE) or code in _WARNINGS:
        return Answer(verdict=StoreVerdict.STORED, text=text)
    if code in _OUT_OF_RESOURCES:
        return Answer(verdict=StoreVerdict.OUT_OF_RESOURCES, text=f"{text}: out of resources")
    return Answer(verdict=StoreVerdict.REFUSED, text=text)


def _why_not(destination: Destination, took_s: float) -> str:
    """Return why there was no association, which the library only logs."""
    if took_s >= _CONNECT_S:
        return "no answer: host down, or a firewall"
    try:
        with socket.create_connection((destination.host, destination.port), timeout=_CONNECT_S):
            pass
    except OSError as error:
        return (error.strerror or "no connection").lower()
    side = "is the certificate trusted, is it a TLS port?" if destination.tls else "a TLS port?"
    return f"connected, but no association was established: {side}"
