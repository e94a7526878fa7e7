"""Results reach real peers, DCMTK's and Orthanc, once, whatever happens in between."""

import io
import json
import signal
import socket
import subprocess
import time
from collections import Counter

import cv2
import pydicom
import pytest
from pydicom.uid import SecondaryCaptureImageStorage, generate_uid

from tests.support.peers import Orthanc, SlowScp, StoreScp, free_port, program
from tests.support.waits import wait_for

SIGKILLED = -signal.SIGKILL
COMPREHENSIVE_3D_SR = "1.2.840.10008.5.1.4.1.1.88.34"
BATCH = 4
# The bound of a stop (5 s for what is being sent and 5 s for breaking it off), doubled.
STOP_S = 20.0
# DCMTK's association profile: everything of the kind that is named, and nothing else.
ONLY_PICTURES = """
[[TransferSyntaxes]]
[Uncompressed]
TransferSyntax1 = LittleEndianExplicit
TransferSyntax2 = LittleEndianImplicit
[[PresentationContexts]]
[Pictures]
PresentationContext1 = VerificationSOPClass\\Uncompressed
PresentationContext2 = SecondaryCaptureImageStorage\\Uncompressed
[[Profiles]]
[Pictures]
PresentationContexts = Pictures
"""


@pytest.fixture
def orthanc(tmp_path):
    program("Orthanc", "orthanc")
    return Orthanc(tmp_path / "orthanc")


@pytest.fixture
def home_for(make_home):
    """Make a home that sends to a peer, and is quick to try again."""

    def make(peer, **env: str):
        settings = {"PACS_DESTINATIONS": peer.name, "PACS_RETRY_S": "0.2", "PACS_RETRY_MAX_S": "1"}
        return make_home(**{**settings, **env})

    return make


@pytest.fixture
def radiograph(rg1):
    """Other radiographs of the same patient: RG1 under another UID for each number."""

    def make(number: int, **values: str):
        dataset = pydicom.dcmread(rg1)
        uid = generate_uid(entropy_srcs=[f"radiograph {number}"])
        dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = uid
        with pydicom.config.disable_value_validation():
            for keyword, value in values.items():
                setattr(dataset, keyword, value)
            target = io.BytesIO()
            dataset.save_as(target)
        return target.getvalue()

    return make


def deliveries(home):
    said = home.command(
        *("pacs", "queue", "--json"),
        *(part for state in ("queued", "sending", "sent", "failed", "invalid")
          for part in ("--state", state)),
    )  # fmt: skip
    assert said.returncode == 0, said.stderr
    return json.loads(said.stdout)


def states(home):
    return Counter(row["state"] for row in deliveries(home))


def wait_until_sent(home, count: int):
    wait_for(lambda: states(home) == {"sent": count}, lambda: f"{states(home)}{home.log()}")


def test_results_lie_beside_the_original_and_conform(orthanc, home_for, rg1, tmp_path):
    """SC and SR in the source's study; no error of dciodvfy; dsrdump prints the tree."""
    storescu, dsrdump = program("storescu", "dcmtk"), program("dsrdump", "dcmtk")
    dciodvfy = program("dciodvfy", "dicom3tools")
    content = rg1.read_bytes()
    with orthanc:
        subprocess.run(
            [storescu, "-aec", "ORTHANC", "127.0.0.1", str(orthanc.port), str(rg1)], check=True
        )
        home = home_for(orthanc)
        with home.daemon() as daemon:
            home.drop("chest.dcm", content)
            home.wait_until_ended([content])
            wait_until_sent(home, 2)
            assert len(orthanc.ask("studies")) == 1
            assert len(orthanc.ask("series")) == 3
            again = home.command("pacs", "send", "1")
            assert again.returncode == 0, again.stderr
            assert "the running daemon will send them" in again.stdout
            wait_until_sent(home, 2)
            assert daemon.stop() == 0
        found = {dataset.SOPClassUID: dataset for dataset in orthanc.datasets()}
        assert orthanc.newcomers() == 3
    source = pydicom.dcmread(rg1, stop_before_pixels=True)
    assert set(found) == {source.SOPClassUID, SecondaryCaptureImageStorage, COMPREHENSIVE_3D_SR}
    for dataset in found.values():
        assert dataset.StudyInstanceUID == source.StudyInstanceUID
        assert dataset.PatientID == source.PatientID
        path = tmp_path / f"{dataset.SOPInstanceUID}.dcm"
        dataset.save_as(path)
        if dataset.SOPClassUID != source.SOPClassUID:
            checked = subprocess.run([dciodvfy, path], capture_output=True, text=True, check=False)
            said = (checked.stdout + checked.stderr).splitlines()
            assert [line for line in said if line.startswith("Error")] == []
    report = tmp_path / f"{found[COMPREHENSIVE_3D_SR].SOPInstanceUID}.dcm"
    tree = subprocess.run([dsrdump, report], capture_output=True, text=True, check=True).stdout
    assert "Imaging Measurement Report" in tree
    (result,) = home.results()
    presence = {"COVID": "Present", "NEGATIVE": "Absent", "UNCERTAIN": "Indeterminate"}
    (line,) = (line for line in tree.splitlines() if '"COVID-19 pattern")' in line)
    assert f'"{presence[result["label"]]}"' in line
    assert ('"Finding")' in tree) == (result["label"] == "COVID")
    assert f'"Conclusion")="{result["label"]}: ' in tree
    picture = cv2.imread(result["overlay"])
    captured = found[SecondaryCaptureImageStorage].pixel_array
    assert (captured == cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)).all()
    shown = json.loads(home.command("results", "show", "1", "--json").stdout)
    assert {(row["kind"], row["state"]) for row in shown["deliveries"]} == {
        ("sc", "sent"),
        ("sr", "sent"),
    }
    assert home.results()[0]["delivery"] == "sent"
    assert home.files("outbox") == []
    home.assert_settled([content])


def test_an_archive_stopped_in_the_middle_gets_all_and_none_twice(orthanc, home_for, radiograph):
    contents = [radiograph(number) for number in range(BATCH)]
    home = home_for(orthanc)
    with home.daemon() as daemon:
        with orthanc:
            home.drop("first.dcm", contents[0])
            wait_for(lambda: len(orthanc.ask("instances")) > 0, home.log)
        for number, content in enumerate(contents[1:]):
            home.drop(f"{number}.dcm", content)
        home.wait_until_ended(contents)
        wait_for(lambda: "action=unreachable" in daemon.log(), daemon.log)
        with orthanc:
            wait_until_sent(home, 2 * BATCH)
            uids = Counter(str(dataset.SOPInstanceUID) for dataset in orthanc.datasets())
            assert orthanc.newcomers() == 2 * BATCH
        assert daemon.stop() == 0
    assert set(uids.values()) == {1}
    assert set(uids) == {row["sop_instance_uid"] for row in deliveries(home)}


@pytest.mark.parametrize(("point", "receipts"), [("packed", 2), ("stored", 3)])
def test_killed_while_sending_all_arrive(home_for, rg1, tmp_path, point, receipts):
    """Killed between the answer and the record, one is sent again, as the same object."""
    with StoreScp(tmp_path / "received") as peer:
        home = home_for(peer)
        home.drop("chest.dcm", rg1.read_bytes(), old=True)
        assert home.run_once(env={"CRASH_AT": point}).returncode == SIGKILLED
        assert states(home) == {"sending": 2}
        again = home.run_once()
        assert again.returncode == 0, again.stderr
        assert states(home) == {"sent": 2}
        received = peer.received()
    assert sum(received.values()) == receipts
    assert set(received) == {row["sop_instance_uid"] for row in deliveries(home)}
    assert home.files("outbox") == []


def test_killed_at_any_moment_of_a_batch_all_arrive(home_for, radiograph, tmp_path):
    contents = [radiograph(number) for number in range(BATCH)]
    with StoreScp(tmp_path / "received") as peer:
        home = home_for(peer)
        for number, content in enumerate(contents):
            home.drop(f"{number}.dcm", content, old=True)
        for receipts in (1, 4):
            with home.daemon():
                wait_for(lambda least=receipts: peer.receipts() >= least, home.log)
        with home.daemon() as daemon:
            home.wait_until_ended(contents)
            wait_until_sent(home, 2 * BATCH)
            assert daemon.stop() == 0
        assert set(peer.received()) == {row["sop_instance_uid"] for row in deliveries(home)}
    home.assert_settled(contents)


def test_an_invalid_object_is_never_sent_and_is_seen(home_for, radiograph, tmp_path):
    content = radiograph(0, SeriesInstanceUID="1.2.NOT-A-UID")
    with StoreScp(tmp_path / "received") as peer:
        home = home_for(peer)
        home.drop("chest.dcm", content, old=True)
        assert home.run_once().returncode == 0
        assert peer.received() == {}
        checked = json.loads(home.command("doctor", "--json").stdout)
    (result,) = home.results()
    assert (result["status"], result["delivery"]) == ("done", "invalid")
    assert all("SeriesInstanceUID" in row["error"] for row in deliveries(home))
    assert "NOT-A-UID" not in home.log()
    (check,) = [check for check in checked if check["name"] == f"PACS {peer.name}"]
    assert check["ok"] is False
    assert "2 were invalid" in check["detail"]


def test_a_lossless_copy_of_an_instance_gets_no_second_answer(
    home_for, radiograph, find_testdata, tmp_path
):
    """One SOP instance in two encodings: two results, one Secondary Capture."""
    native = radiograph(0)
    identity = pydicom.dcmread(io.BytesIO(native), stop_before_pixels=True)
    copy = pydicom.dcmread(find_testdata("RG1_J2KR.dcm"))
    for keyword in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID"):
        setattr(copy, keyword, identity.get(keyword))
    copy.file_meta.MediaStorageSOPInstanceUID = identity.SOPInstanceUID
    copy.save_as(tmp_path / "copy.dcm")
    with StoreScp(tmp_path / "received") as peer:
        home = home_for(peer, PACS_SEND="sc")
        for name, content in (
            ("native.dcm", native),
            ("copy.dcm", (tmp_path / "copy.dcm").read_bytes()),
        ):
            home.drop(name, content, old=True)
            assert home.run_once().returncode == 0
        assert sorted(peer.received().values()) == [1]
        said = home.command("pacs", "send", "2")
    assert [row.state for row in home.rows()] == ["done", "done"]
    assert [(row["result_id"], row["state"]) for row in deliveries(home)] == [(1, "sent")]
    assert said.returncode == 1
    assert "another result covers" in said.stderr


def test_an_answer_arrives_whatever_is_wrong_with_the_identifiers(orthanc, home_for, radiograph):
    """In the study as the PACS has it: a UID with a leading zero, an accession number too long."""
    study = "1.2.276.0.7230010.3.1.2.20250102.091500.0123"
    contents = [
        radiograph(1, StudyInstanceUID=study),
        radiograph(2, AccessionNumber="HOSP2025010212345678"),
        radiograph(3, PatientName="M\u00fcller^Zo\u00eb", SpecificCharacterSet=None),
        radiograph(4, StudyDate="00000000"),
    ]
    with orthanc:
        home = home_for(orthanc, PACS_SEND="sc")
        for number, content in enumerate(contents):
            home.drop(f"{number}.dcm", content, old=True)
        assert home.run_once().returncode == 0
        assert states(home) == {"sent": len(contents)}
        answers = orthanc.datasets()
    assert len(answers) == len(contents)
    assert study in {answer.StudyInstanceUID for answer in answers}
    assert {str(answer.PatientName) for answer in answers if answer.PatientName} == {
        str(pydicom.dcmread(io.BytesIO(contents[0])).PatientName)
    }


def test_what_is_refused_for_good_fails_is_seen_and_can_be_sent_later(
    home_for, rg1, tmp_path
):  # fmt: skip
    profile = tmp_path / "profile.cfg"
    profile.write_text(ONLY_PICTURES)
    picky = StoreScp(tmp_path / "received", "--config-file", str(profile), "Pictures")
    home = home_for(picky)
    with picky, home.daemon() as daemon:
        home.drop("chest.dcm", rg1.read_bytes())
        wait_for(lambda: states(home) == {"sent": 1, "failed": 1}, home.log)
        assert daemon.stop() == 0
        (failed,) = json.loads(home.command("pacs", "queue", "--json").stdout)
        assert (failed["kind"], failed["error"]) == ("sr", "SOP class not accepted")
        assert home.results()[0]["delivery"] == "failed"
        checked = home.command("doctor", "--json")
        assert checked.returncode == 1
        (check,) = [c for c in json.loads(checked.stdout) if c["name"] == f"PACS {picky.name}"]
        assert "1 were refused" in check["detail"]
    said = home.command("pacs", "send", "--failed", "--destination", "OTHER@localhost:104")
    assert said.returncode == 1
    assert "is not one of 'pacs.destinations'" in said.stderr
    with StoreScp(tmp_path / "again") as generous:
        generous_home = {"PACS_DESTINATIONS": generous.name}
        said = home.command("pacs", "send", "1", "--json", env=generous_home)
        assert said.returncode == 0, said.stderr
        assert Counter(row["state"] for row in json.loads(said.stdout)) == {"sent": 2}
        assert len(generous.received()) == 2


def test_a_destination_that_never_answers_does_not_hold_up_a_stop(make_home, rg1):
    with socket.create_server(("127.0.0.1", 0)) as mute:
        home = make_home(PACS_DESTINATIONS=f"MUTE@127.0.0.1:{mute.getsockname()[1]}")
        with home.daemon() as daemon:
            home.drop("chest.dcm", rg1.read_bytes())
            home.wait_until_ended([rg1.read_bytes()])
            wait_for(lambda: "sending" in states(home), home.log)
            assert daemon.stop() == 0
    assert set(states(home)) <= {"queued", "sending"}


def test_a_good_destination_gets_its_objects_beside_mute_slow_and_absent_ones(
    home_for, rg1, tmp_path
):
    """One accepts and never answers, one never answers a C-STORE, one is not there."""
    with (
        socket.create_server(("127.0.0.1", 0)) as mute,
        SlowScp() as slow,
        StoreScp(tmp_path / "received") as good,
    ):
        names = {
            "mute": f"MUTE@127.0.0.1:{mute.getsockname()[1]}",
            "slow": slow.name,
            "absent": f"ABSENT@127.0.0.1:{free_port()}",
            "good": good.name,
        }
        home = home_for(good, PACS_DESTINATIONS=",".join(names.values()))
        with home.daemon() as daemon:
            content = rg1.read_bytes()
            home.drop("chest.dcm", content)
            home.wait_until_ended([content])
            # In turn they would take the mute one's 15 s and the slow one's 60 s first.
            wait_for(lambda: good.receipts() == 2, home.log, timeout_s=30)
            wait_for(slow.has_begun.is_set, home.log)
            assert {row["destination"] for row in deliveries(home) if row["state"] == "sent"} == {
                good.name
            }
            slow.may_answer.set()
            wait_for(lambda: slow.stored == 2, home.log)
            wait_for(lambda: states(home)["sent"] == 4, home.log)
            began_s = time.monotonic()
            assert daemon.stop() == 0
            assert time.monotonic() - began_s < STOP_S
    log = daemon.log()
    assert f"destination={names['absent']}" in log
    assert "action=crashed" not in log


def test_what_leaves_can_be_without_the_patient(home_for, rg1, tmp_path):
    (tmp_path / "secret").write_bytes(b"0123456789abcdef0123456789abcdef")
    with StoreScp(tmp_path / "received") as peer:
        home = home_for(peer, PACS_DEIDENTIFY="true", PACS_DEIDENTIFY_KEY=str(tmp_path / "secret"))
        home.drop("chest.dcm", rg1.read_bytes(), old=True)
        assert home.run_once().returncode == 0
        sent = [pydicom.dcmread(path, force=True) for path in peer.folder.iterdir()]
    source = pydicom.dcmread(rg1, stop_before_pixels=True)
    assert len(sent) == 2
    for dataset in sent:
        assert dataset.PatientIdentityRemoved == "YES"
        assert dataset.PatientID != source.PatientID
        assert dataset.StudyInstanceUID != source.StudyInstanceUID


def test_an_encrypted_destination_is_reached_if_its_certificate_is_trusted(
    home_for, rg1, tmp_path
):  # fmt: skip
    openssl = program("openssl", "openssl")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(
        [
            *(openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"),
            *("-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"),
            *("-keyout", key, "-out", certificate),
        ],
        check=True,
        capture_output=True,
    )
    tls = ("--enable-tls", str(key), str(certificate), "--ignore-peer-cert")
    with StoreScp(tmp_path / "received", *tls) as peer:
        home = home_for(peer, PACS_DESTINATIONS=f"{peer.name}+tls")
        home.drop("chest.dcm", rg1.read_bytes(), old=True)
        assert home.run_once().returncode == 0
        assert states(home) == {"queued": 2}
        assert peer.received() == {}
        said = home.command("pacs", "send", "--all-due", env={"PACS_TLS_CA": str(certificate)})
        assert said.returncode == 0, said.stderr + said.stdout
        assert len(peer.received()) == 2
