"""DICOM peers: DCMTK's `storescp`, and Orthanc."""

import io
import json
import shutil
import socket
import subprocess
import threading
import time
import urllib.request
from abc import ABC, abstractmethod
from collections import Counter
from pathlib import Path
from typing import Any, Self

import pydicom
import pytest
from pynetdicom import AE, AllStoragePresentationContexts, build_role, evt
from pynetdicom.sop_class import StorageCommitmentPushModel  # type: ignore[attr-defined]

from tests.support.waits import PATIENCE_S, wait_for


def program(name: str, package: str) -> str:
    """Return a program's path; skip the test where it is not installed."""
    path = shutil.which(name) or shutil.which(name, path="/usr/sbin:/usr/local/bin:/usr/bin")
    if path is None:
        pytest.skip(f"{name} is not installed (Debian's package {package})")
    return path


def free_port() -> int:
    """Return a TCP port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def is_listening(port: int) -> bool:
    """Whether somebody listens on a port of this machine."""
    with socket.socket() as caller:
        return caller.connect_ex(("127.0.0.1", port)) == 0


class Peer(ABC):
    """A program that listens; inside the ``with`` it does."""

    def __init__(self, folder: Path, port: int) -> None:
        self.folder = folder
        self.port = port
        self.log_file = folder.with_suffix(".log")
        self.process: subprocess.Popen[bytes] | None = None

    @abstractmethod
    def command(self) -> list[str]:
        """Return the program and its arguments."""

    def __enter__(self) -> Self:
        with self.log_file.open("ab") as log:
            self.process = subprocess.Popen(
                self.command(), cwd=self.folder, stdout=log, stderr=subprocess.STDOUT
            )
        wait_for(self.answers, lambda: self.log_file.read_text(errors="replace")[-2000:])
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait(PATIENCE_S)

    def answers(self) -> bool:
        """Whether it takes connections."""
        return is_listening(self.port)


class StoreScp(Peer):
    """DCMTK's `storescp`, which writes a file for everything that it is sent, twice for twice."""

    def __init__(self, folder: Path, *options: str) -> None:
        super().__init__(folder, free_port())
        folder.mkdir()
        self._options = options

    def command(self) -> list[str]:
        """Return the program and its arguments."""
        return [
            program("storescp", "dcmtk"),
            *self._options,
            "--unique-filenames",
            "--output-directory",
            str(self.folder),
            str(self.port),
        ]

    @property
    def name(self) -> str:
        """As a destination."""
        return f"STORESCP@127.0.0.1:{self.port}"

    def receipts(self) -> int:
        """Count the objects that came, the one included that is being written at the moment."""
        return len(list(self.folder.iterdir()))

    def received(self) -> Counter[str]:
        """Return the SOP Instance UIDs, each as often as it came; when all is written."""
        return Counter(
            str(pydicom.dcmread(path, force=True).SOPInstanceUID) for path in self.folder.iterdir()
        )


class SlowScp:
    """A Storage SCP in this process, which answers nothing before it may.

    Attributes
    ----------
    has_begun
        Set once an object has come.
    may_answer
        Set by the test.
    stored
        Objects that were answered.
    """

    def __init__(self) -> None:
        self.has_begun = threading.Event()
        self.may_answer = threading.Event()
        self.stored = 0

    def __enter__(self) -> Self:
        entity = AE(ae_title="SLOW")
        entity.supported_contexts = AllStoragePresentationContexts
        self._server: Any = entity.start_server(
            ("127.0.0.1", 0), block=False, evt_handlers=[(evt.EVT_C_STORE, self._take)]
        )
        self.name = f"SLOW@127.0.0.1:{self._server.server_address[1]}"
        return self

    def __exit__(self, *_: object) -> None:
        self.may_answer.set()
        self._server.shutdown()

    def _take(self, event: Any) -> int:
        del event
        self.has_begun.set()
        self.may_answer.wait(PATIENCE_S)
        self.stored += 1
        return 0x0000


class CommitScp:
    """A Storage and Storage Commitment SCP in this process.

    Attributes
    ----------
    losses
        Reports that say that nothing is there; later ones say that all is committed.
    reports_to
        Port of LUNGWATCH to report to over a new association; None for the request's own.
    is_silent
        Whether requests are taken and never reported on.
    stored, requests
        SOP Instance UIDs that came, each as often as it came; transactions that were asked for.
    """

    def __init__(self, port: int = 0) -> None:
        self.losses = 0
        self.reports_to: int | None = None
        self.is_silent = False
        self.stored: Counter[str] = Counter()
        self.requests: list[str] = []
        self._port = port

    def __enter__(self) -> Self:
        entity = AE(ae_title="COMMIT")
        entity.supported_contexts = AllStoragePresentationContexts
        entity.add_supported_context(StorageCommitmentPushModel)
        entity.maximum_associations = 50
        self._server: Any = entity.start_server(
            ("127.0.0.1", self._port),
            block=False,
            evt_handlers=[(evt.EVT_C_STORE, self._take), (evt.EVT_N_ACTION, self._commit)],
        )
        self.name = f"COMMIT@127.0.0.1:{self._server.server_address[1]}"
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()

    def _take(self, event: Any) -> int:
        self.stored[str(event.request.AffectedSOPInstanceUID)] += 1
        return 0x0000

    def _commit(self, event: Any) -> tuple[int, None]:
        asked = event.action_information
        self.requests.append(str(asked.TransactionUID))
        if not self.is_silent:
            threading.Thread(target=self._report, args=(event.assoc, asked), daemon=True).start()
        return 0x0000, None

    def _report(self, association: Any, asked: pydicom.Dataset) -> None:
        report = pydicom.Dataset()
        report.TransactionUID = asked.TransactionUID
        is_lost = self.losses > 0
        self.losses -= is_lost
        if is_lost:
            report.FailedSOPSequence = asked.ReferencedSOPSequence
            for item in report.FailedSOPSequence:
                item.FailureReason = 0x0112
        else:
            report.ReferencedSOPSequence = asked.ReferencedSOPSequence
        time.sleep(0.3)  # the answer to the request goes out first
        if self.reports_to is not None:
            entity = AE(ae_title="COMMIT")
            entity.add_requested_context(StorageCommitmentPushModel)
            association = entity.associate(
                "127.0.0.1",
                self.reports_to,
                ae_title="LUNGWATCH",
                ext_neg=[build_role(StorageCommitmentPushModel, scp_role=True)],
            )
        if association.is_established:
            association.send_n_event_report(
                report, 2 if is_lost else 1, StorageCommitmentPushModel, PUSH_MODEL_INSTANCE
            )
            if self.reports_to is not None:
                association.release()


PUSH_MODEL_INSTANCE = "1.2.840.10008.1.20.1.1"


class Orthanc(Peer):
    """Orthanc with nothing but its core, on this machine alone.

    Parameters
    ----------
    lungwatch_port
        Where it knows LUNGWATCH; None for nowhere.
    """

    def __init__(self, folder: Path, lungwatch_port: int | None = None) -> None:
        super().__init__(folder, free_port())
        self.http = free_port()
        folder.mkdir()
        (folder / "orthanc.json").write_text(
            json.dumps(
                {
                    "Name": "test",
                    "StorageDirectory": str(folder / "storage"),
                    "IndexDirectory": str(folder / "storage"),
                    "Plugins": [],
                    "HttpPort": self.http,
                    "DicomPort": self.port,
                    "DicomAet": "ORTHANC",
                    "RemoteAccessAllowed": False,
                    "AuthenticationEnabled": False,
                    "DicomModalities": {
                        "lungwatch": {
                            "AET": "LUNGWATCH",
                            "Host": "127.0.0.1",
                            "Port": lungwatch_port,
                            "AllowStorageCommitment": True,
                        }
                    }
                    if lungwatch_port
                    else {},
                }
            )
        )

    def command(self) -> list[str]:
        """Return the program and its arguments."""
        return [program("Orthanc", "orthanc"), str(self.folder / "orthanc.json")]

    @property
    def name(self) -> str:
        """As a destination."""
        return f"ORTHANC@127.0.0.1:{self.port}"

    def get(self, path: str) -> bytes:
        """Return what its REST interface answers."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.http}/{path}", timeout=60) as answer:
            content: bytes = answer.read()
            return content

    def post(self, path: str, body: object) -> Any:
        """Return the JSON that its REST interface answers to a request with a body of JSON."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        asked = urllib.request.Request(f"http://127.0.0.1:{self.http}/{path}", data=content)
        with urllib.request.urlopen(asked, timeout=60) as answer:
            return json.loads(answer.read())

    def ask(self, path: str) -> Any:
        """Return the JSON that its REST interface answers."""
        return json.loads(self.get(path))

    def answers(self) -> bool:
        """Whether both of its ports are served."""
        try:
            return super().answers() and bool(self.ask("system"))
        except OSError:
            return False

    def datasets(self) -> list[pydicom.Dataset]:
        """Return the objects that it has."""
        return [
            pydicom.dcmread(io.BytesIO(self.get(f"instances/{instance}/file")))
            for instance in self.ask("instances")
        ]

    def newcomers(self) -> int:
        """Count the objects that it ever took in as new."""
        changes = self.ask("changes?limit=1000")["Changes"]
        return sum(change["ChangeType"] == "NewInstance" for change in changes)
