"""Storage commitment with real peers, both ways, over crashes: "sent" becomes "committed"."""

import json
import signal
from collections import Counter

import pydicom
import pytest
from pydicom.config import IGNORE
from pydicom.dataelem import DataElement
from pydicom.uid import generate_uid
from pynetdicom import AE, evt
from pynetdicom.sop_class import StorageCommitmentPushModel  # type: ignore[attr-defined]

from tests.support.peers import PUSH_MODEL_INSTANCE, CommitScp, Orthanc, free_port, program
from tests.support.waits import PATIENCE_S, wait_for

SIGKILLED = -signal.SIGKILL
NOWHERE = "1.2.826.0.1.3680043.8.498.1"
LEADING_ZERO = "1.2.03"
DIGITAL_X_RAY = "1.2.840.10008.5.1.4.1.1.1.1"


@pytest.fixture
def port():
    return free_port()


@pytest.fixture
def home_for(make_home, port):
    """Make a home that sends to a peer, asks it to commit, and listens."""

    def make(peer, **env: str):
        settings = {
            "PACS_DESTINATIONS": peer.name,
            "PACS_STORAGE_COMMITMENT": peer.name,
            "PACS_PORT": str(port),
            "PACS_RETRY_S": "0.2",
            "PACS_RETRY_MAX_S": "1",
        }
        return make_home(**{**settings, **env})

    return make


def deliveries(home):
    chosen = [part for state in ("queued", "sending", "sent", "failed", "invalid")
              for part in ("--state", state)]  # fmt: skip
    said = home.command("pacs", "queue", "--json", *chosen)
    assert said.returncode == 0, said.stderr
    return json.loads(said.stdout)


def commitments(home):
    return Counter((row["state"], row["commitment"]) for row in deliveries(home))


def wait_until(home, **counts: int):
    """Wait for all deliveries to be, say, ``sent_committed=2``."""
    wanted = Counter({tuple(key.split("_")): count for key, count in counts.items()})
    wait_for(lambda: commitments(home) == wanted, lambda: f"{deliveries(home)}{home.log()}")


def test_what_was_sent_to_orthanc_is_committed_by_it(home_for, port, rg1, tmp_path):
    """Orthanc reports over an association of its own, to the listener."""
    program("Orthanc", "orthanc")
    with Orthanc(tmp_path / "orthanc", lungwatch_port=port) as orthanc:
        home = home_for(orthanc)
        with home.daemon() as daemon:
            home.drop("chest.dcm", rg1.read_bytes())
            wait_until(home, sent_committed=2)
            shown = json.loads(home.command("pacs", "status", "--json").stdout)
            assert daemon.stop() == 0
    (status,) = shown["destinations"]
    assert (status["sent"], status["commitments"]) == (2, {"committed": 2})
    assert home.files("outbox") == []


def test_orthanc_learns_what_is_kept_here_and_what_is_not(home_for, port, rg1, tmp_path):
    program("Orthanc", "orthanc")
    with Orthanc(tmp_path / "orthanc", lungwatch_port=port) as orthanc:
        home = home_for(orthanc, PACS_SEND="sc")
        with home.daemon():
            added = orthanc.post("instances", rg1.read_bytes())
            orthanc.post("modalities/lungwatch/store", {"Resources": [added["ID"]]})

            def outcome(body):
                asked = orthanc.post("modalities/lungwatch/storage-commitment", body)
                found: dict[str, object] = {}

                def has_ended():
                    found.update(orthanc.ask(asked["Path"]))
                    return found["Status"] != "Pending"

                wait_for(has_ended, lambda: f"{found}{home.log()}")
                return found

            assert outcome({"Resources": [added["ID"]]})["Status"] == "Success"
            unknown = {"SOPClassUID": DIGITAL_X_RAY, "SOPInstanceUID": NOWHERE}
            refused = outcome({"DicomInstances": [unknown]})
            assert refused["Status"] == "Failure"
            assert [row["FailureReason"] for row in refused["Failures"]] == [0x0112]
            (image,) = home.files("done")
            image.unlink()
            assert outcome({"Resources": [added["ID"]]})["Status"] == "Failure"


@pytest.mark.parametrize("way", ["same association", "new association"])
def test_a_report_is_taken_over_either_association(home_for, port, rg1, way):
    with CommitScp() as peer:
        peer.reports_to = port if way == "new association" else None
        home = home_for(peer)
        with home.daemon() as daemon:
            home.drop("chest.dcm", rg1.read_bytes())
            wait_until(home, sent_committed=2)
            assert daemon.stop() == 0
    assert set(peer.stored.values()) == {1}
    assert home.files("outbox") == []


def test_what_the_destination_has_lost_is_sent_again(home_for, rg1):
    with CommitScp() as peer:
        peer.losses = 1
        home = home_for(peer, PACS_SEND="sc")
        with home.daemon():
            home.drop("chest.dcm", rg1.read_bytes())
            wait_until(home, sent_committed=1)
    assert set(peer.stored.values()) == {2}


def test_what_the_destination_keeps_losing_fails_and_is_seen(home_for, rg1):
    with CommitScp() as peer:
        peer.losses = 100
        home = home_for(peer, PACS_SEND="sc")
        with home.daemon():
            home.drop("chest.dcm", rg1.read_bytes())
            wait_until(home, failed_failed=1)
    assert set(peer.stored.values()) == {3}
    (row,) = deliveries(home)
    assert "0x0112" in row["commitment_error"]
    assert home.results()[0]["delivery"] == "failed"


def test_a_file_is_kept_until_it_is_committed_and_a_deadline_ends_the_waiting(home_for, rg1):
    with CommitScp() as peer:
        peer.is_silent = True
        settings = {"PACS_COMMITMENT_WAIT_S": "1", "PACS_COMMITMENT_DEADLINE_S": "10"}
        home = home_for(peer, PACS_SEND="sc", **settings)
        with home.daemon():
            home.drop("chest.dcm", rg1.read_bytes())
            wait_until(home, sent_requested=1)
            assert len(home.files("outbox")) == 1
            wait_until(home, sent_failed=1)
            wait_for(lambda: home.files("outbox") == [], home.log)
    assert len(peer.requests) > 1
    assert len(set(peer.requests)) == len(peer.requests)


@pytest.mark.parametrize("point", ["commitment_noted", "commitment_asked"])
def test_killed_between_the_request_and_the_report_it_is_asked_again(home_for, rg1, point):
    with CommitScp() as peer:
        peer.is_silent = True
        home = home_for(peer, PACS_SEND="sc", PACS_COMMITMENT_WAIT_S="1")
        daemon = home.daemon()
        home.drop("chest.dcm", rg1.read_bytes(), old=True)
        home.env["CRASH_AT"] = point
        daemon.launch()
        assert daemon.process.wait(PATIENCE_S) == SIGKILLED
        del home.env["CRASH_AT"]
        assert commitments(home) == {("sent", "requested"): 1}
        assert len(home.files("outbox")) == 1
        peer.is_silent = False
        with home.daemon() as again:
            wait_until(home, sent_committed=1)
            assert again.stop() == 0
    assert set(peer.stored.values()) == {1}


class Requester:
    """A Storage Commitment SCU, which takes reports on a port and on its own association."""

    def __init__(self, port: int):
        self._port = port
        self.reports: list[tuple[int, pydicom.Dataset]] = []
        self._entity = AE(ae_title="ASKER")
        self._entity.add_requested_context(StorageCommitmentPushModel)
        self._entity.add_supported_context(StorageCommitmentPushModel, scu_role=True, scp_role=True)

    def take(self, event):
        self.reports.append((event.event_type, event.event_information))
        return 0x0000, None

    def listen(self, port: int):
        return self._entity.start_server(
            ("127.0.0.1", port), block=False, evt_handlers=[(evt.EVT_N_EVENT_REPORT, self.take)]
        )

    def ask(self, *uids: str):
        """Ask, and return the status and the association."""
        association = self._entity.associate(
            "127.0.0.1",
            self._port,
            ae_title="LUNGWATCH",
            evt_handlers=[(evt.EVT_N_EVENT_REPORT, self.take)],
        )
        assert association.is_established
        asked = pydicom.Dataset()
        asked.TransactionUID = generate_uid()
        items = []
        for uid in uids:
            items.append(pydicom.Dataset())
            items[-1].ReferencedSOPClassUID = DIGITAL_X_RAY
            items[-1].add(
                DataElement("ReferencedSOPInstanceUID", "UI", uid, validation_mode=IGNORE)
            )
        asked.ReferencedSOPSequence = items
        status, _ = association.send_n_action(
            asked, 1, StorageCommitmentPushModel, PUSH_MODEL_INSTANCE
        )
        return status.get("Status"), association


def test_a_requester_without_an_address_is_answered_on_its_own_association(make_home, port, rg1):
    kept = str(pydicom.dcmread(rg1, stop_before_pixels=True).SOPInstanceUID)
    home = make_home(PACS_PORT=str(port))
    with home.daemon():
        home.drop("chest.dcm", rg1.read_bytes())
        home.wait_until_ended([rg1.read_bytes()])
        asker = Requester(port)
        status, association = asker.ask(kept, NOWHERE, LEADING_ZERO)
        assert status == 0x0000
        wait_for(lambda: asker.reports, home.log)
        association.release()
        refused, association = asker.ask("NOT-A-UID")
        assert refused == 0x0115
        association.release()
    ((event_type, report),) = asker.reports
    assert event_type == 2
    assert [item.ReferencedSOPInstanceUID for item in report.ReferencedSOPSequence] == [kept]
    assert [
        (item.ReferencedSOPInstanceUID, item.FailureReason) for item in report.FailedSOPSequence
    ] == [(NOWHERE, 0x0112), (LEADING_ZERO, 0x0112)]


def test_killed_after_a_request_was_taken_the_report_is_sent_by_the_next_start(
    make_home, port, rg1
):
    kept = str(pydicom.dcmread(rg1, stop_before_pixels=True).SOPInstanceUID)
    own = free_port()
    home = make_home(
        PACS_PORT=str(port),
        PACS_COMMITMENT_REQUESTERS=f"ASKER@127.0.0.1:{own}",
        PACS_RETRY_S="0.2",
        PACS_RETRY_MAX_S="1",
    )
    home.drop("chest.dcm", rg1.read_bytes(), old=True)
    assert home.run_once().returncode == 0
    asker = Requester(port)
    home.env["CRASH_AT"] = "commitment_accepted"
    daemon = home.daemon()
    with daemon:
        status, _ = asker.ask(kept)
        assert status is None
        assert daemon.process.wait(PATIENCE_S) == SIGKILLED
    del home.env["CRASH_AT"]
    server = asker.listen(own)
    try:
        with home.daemon():
            wait_for(lambda: asker.reports, home.log)
            shown = json.loads(home.command("pacs", "status", "--json").stdout)
    finally:
        server.shutdown()
    ((event_type, report),) = asker.reports
    assert event_type == 1
    assert [item.ReferencedSOPInstanceUID for item in report.ReferencedSOPSequence] == [kept]
    assert [row["requester"] for row in shown["requests"]] == ["ASKER"]


def test_a_report_on_a_transaction_that_was_never_requested_changes_nothing(home_for, port, rg1):
    with CommitScp() as peer:
        peer.is_silent = True
        home = home_for(peer, PACS_SEND="sc")
        with home.daemon() as daemon:
            home.drop("chest.dcm", rg1.read_bytes())
            wait_until(home, sent_requested=1)
            entity = AE(ae_title="FORGER")
            entity.add_requested_context(StorageCommitmentPushModel)
            association = entity.associate("127.0.0.1", port, ae_title="LUNGWATCH")
            report = pydicom.Dataset()
            report.TransactionUID = generate_uid()
            item = pydicom.Dataset()
            item.ReferencedSOPClassUID = DIGITAL_X_RAY
            item.ReferencedSOPInstanceUID = deliveries(home)[0]["sop_instance_uid"]
            report.ReferencedSOPSequence = [item]
            status, _ = association.send_n_event_report(
                report, 1, StorageCommitmentPushModel, PUSH_MODEL_INSTANCE
            )
            association.release()
            assert status.Status == 0x0115
            assert commitments(home) == {("sent", "requested"): 1}
            assert daemon.stop() == 0
