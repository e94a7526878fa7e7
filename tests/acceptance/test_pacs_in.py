"""Images by C-STORE: DCMTK's tools, raw sockets and many at once against the real daemon."""

import os
import shutil
import signal
import socket
import subprocess
import threading
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from tests.support.peers import free_port
from tests.support.processes import COMMAND
from tests.support.waits import wait_for

pytestmark = pytest.mark.skipif(
    not shutil.which("storescu"), reason="needs DCMTK (Debian's package 'dcmtk')"
)
OUT_OF_RESOURCES = "0xa700"


@contextmanager
def listening(make_home, **env):
    port = free_port()
    home = make_home(PACS_PORT=str(port), **env)
    with home.daemon() as daemon:
        yield home, daemon, port


def dcmtk(program, port, *arguments, calling="STORESCU", called="LUNGWATCH"):
    return subprocess.run(
        [program, "-aet", calling, "-aec", called, "127.0.0.1", str(port), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


@pytest.fixture(scope="module")
def x_rays(tmp_path_factory, picture):
    """Make small DICOM chest X-rays, each another one."""
    folder = tmp_path_factory.mktemp("x-rays")

    def make(count, start=0):
        paths = []
        for number in range(start, start + count):
            pixels = cv2.imdecode(np.frombuffer(picture(number), np.uint8), cv2.IMREAD_GRAYSCALE)
            image = Dataset()
            image.file_meta = FileMetaDataset()
            image.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
            image.SOPClassUID = "1.2.840.10008.5.1.4.1.1.1.1"
            image.SOPInstanceUID = generate_uid()
            image.StudyInstanceUID = image.SeriesInstanceUID = generate_uid()
            image.PatientID, image.PatientName = f"P{number}", "Secret^Name"
            image.Modality, image.BodyPartExamined, image.ViewPosition = "DX", "CHEST", "PA"
            image.Rows, image.Columns = pixels.shape
            image.SamplesPerPixel, image.PhotometricInterpretation = 1, "MONOCHROME2"
            image.BitsAllocated = image.BitsStored = 8
            image.HighBit, image.PixelRepresentation = 7, 0
            image.PixelData = pixels.tobytes()
            paths.append(folder / f"{number}.dcm")
            image.save_as(paths[-1], enforce_file_format=True)
        return paths

    return make


def waiting(home):
    return [path.name for path in home.incoming.iterdir()]


def test_what_is_sent_is_screened_under_its_own_identity(make_home, find_testdata):
    with listening(make_home) as (home, daemon, port):
        assert dcmtk("echoscu", port).returncode == 0
        sent = dcmtk("storescu", port, find_testdata("RG1_UNCR.dcm"))
        assert sent.returncode == 0, sent.stderr
        wait_for(lambda: [r for r in home.rows() if r.is_kept], daemon.log)
        (row,) = home.rows()
        assert row.state == "done"
        (result,) = home.results()
        assert result["source_name"].startswith("pacs-")
        assert result["study_uid"]
        assert result["sending_ae"] == "STORESCU"
        assert daemon.stop() == 0
        assert "action=received" in daemon.log()


def test_300_images_over_four_associations_are_acknowledged_and_recorded_once(make_home, x_rays):
    paths = x_rays(300)
    with listening(make_home, OVERLAY_SIDE_PX="256") as (home, daemon, port):
        parts = [paths[i::4] for i in range(4)]
        answers = [None] * 4

        def send(index):
            answers[index] = dcmtk("storescu", port, *parts[index])

        threads = [threading.Thread(target=send, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [answer.returncode for answer in answers] == [0] * 4, answers[0].stderr
        wait_for(
            lambda: sum(row.has_ended and row.is_kept for row in home.rows()) == 300,
            lambda: f"{len(home.rows())} rows; {daemon.log()[-500:]}",
            240,
        )
        rows = home.rows()
        assert {(row.state, row.arrivals) for row in rows} == {("done", 1)}
        assert waiting(home) == []
        assert daemon.stop() == 0
        assert home.reconcile()[0] == 0


def test_a_wrong_title_is_refused_whether_called_or_calling(make_home, x_rays):
    with listening(make_home, PACS_CALLING_AE_TITLES="MODALITY") as (home, daemon, port):
        assert dcmtk("echoscu", port).returncode != 0
        assert dcmtk("echoscu", port, calling="MODALITY", called="OTHER").returncode != 0
        assert dcmtk("storescu", port, x_rays(1)[0]).returncode != 0
        assert dcmtk("echoscu", port, calling="MODALITY").returncode == 0
        assert waiting(home) == []
        assert home.rows() == []
        daemon.wait_until_said("action=refused")


def test_an_address_that_is_not_listed_is_not_let_in(make_home):
    with listening(make_home, PACS_CALLING_ADDRESSES="10.99.0.0/16") as (_, daemon, port):
        assert dcmtk("echoscu", port).returncode != 0
        daemon.wait_until_said("why=address")


def test_a_port_open_to_everybody_is_no_start(make_home):
    home = make_home(PACS_PORT=str(free_port()), PACS_ADDRESS="0.0.0.0")
    said = home.command("run")
    assert said.returncode == 1
    assert "pacs.calling_addresses" in said.stderr


def test_a_port_that_is_taken_is_one_line(make_home):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        home = make_home(PACS_PORT=str(taken.getsockname()[1]))
        said = home.command("run")
    assert said.returncode == 1
    assert "cannot listen" in said.stderr
    assert "Traceback" not in said.stderr


def test_garbage_and_giants_are_cut_off_and_others_served(make_home):
    with listening(make_home) as (home, daemon, port):
        for junk in (
            b"GET / HTTP/1.1\r\n\r\n",
            os.urandom(5000),
            b"\x01\x00\xff\xff\xff\xff" + bytes(100_000),  # a PDU of 4 GiB
            b"\x04\x00\x7f\xff\xff\xff",
        ):
            with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
                connection.sendall(junk)
        assert dcmtk("echoscu", port).returncode == 0
        assert waiting(home) == []
        assert daemon.process.poll() is None


def test_an_object_beyond_the_limit_is_cut_off(make_home, find_testdata):
    big = find_testdata("RG1_UNCR.dcm")
    assert big.stat().st_size > 2 * 1024 * 1024
    with listening(make_home, PACS_MAX_OBJECT_MB="1") as (home, daemon, port):
        assert dcmtk("storescu", port, big).returncode != 0
        wait_for(lambda: waiting(home) == [], lambda: waiting(home))
        assert dcmtk("echoscu", port).returncode == 0
        daemon.wait_until_said("action=cut_off")


def test_an_abort_in_the_middle_leaves_nothing_half_written(make_home, find_testdata):
    path = find_testdata("RG1_UNCR.dcm")
    with listening(make_home) as (home, _, port):
        for _ in range(3):
            # A relay that breaks off after the first part: as a pulled cable.
            with socket.socket() as relay:
                relay.bind(("127.0.0.1", 0))
                relay.listen()
                sender = subprocess.Popen(
                    [
                        "storescu",
                        "-aec",
                        "LUNGWATCH",
                        "127.0.0.1",
                        str(relay.getsockname()[1]),
                        path,
                    ],
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                )
                inner, _ = relay.accept()
                outer = socket.create_connection(("127.0.0.1", port))
                stop = threading.Thread(target=pump, args=(outer, inner), daemon=True)
                stop.start()
                passed = 0
                while passed < 1_000_000 and (data := inner.recv(65_536)):
                    outer.sendall(data)
                    passed += len(data)
                inner.close()
                outer.close()
                sender.kill()
                sender.wait()
            assert passed >= 1_000_000
        assert dcmtk("echoscu", port).returncode == 0
        wait_for(lambda: waiting(home) == [], lambda: waiting(home))
        assert home.rows() == []


def pump(source, target):
    try:
        while data := source.recv(65_536):
            target.sendall(data)
    except OSError:
        pass


def test_a_flood_of_connections_is_bounded_and_survived(make_home):
    with listening(make_home, PACS_MAX_ASSOCIATIONS="2") as (_, daemon, port):
        flood = []
        for _ in range(200):
            connection = socket.socket()
            connection.settimeout(5)
            try:
                connection.connect(("127.0.0.1", port))
            except OSError:
                connection.close()
                continue
            flood.append(connection)
        assert len(flood) > 50
        wait_for(lambda: 'why="too many"' in daemon.log(), daemon.log)
        threads = len(list(Path(f"/proc/{daemon.process.pid}/task").iterdir()))
        assert threads < 120
        for connection in flood:
            connection.close()
        wait_for(lambda: dcmtk("echoscu", port).returncode == 0, daemon.log)


def test_below_the_watermark_the_sender_keeps_its_copy(make_home, x_rays):
    """The start needs room too, so the port is opened by `pacs listen`."""
    port = free_port()
    home = make_home(MIN_FREE_MB="9000000", PACS_PORT=str(port))
    process = subprocess.Popen(
        [COMMAND, "pacs", "listen", "--home", str(home.root)],
        env=home.environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        wait_for(lambda: dcmtk("echoscu", port).returncode == 0, lambda: "no echo")
        sent = dcmtk("storescu", port, "-v", x_rays(1)[0])
        assert "OutOfResources" in sent.stderr + sent.stdout
        assert waiting(home) == []
    finally:
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=240)[1]
    assert process.returncode == 0
    assert f"status={OUT_OF_RESOURCES.upper().replace('X', 'x')}" in said


def test_a_kill_after_success_loses_nothing(make_home, x_rays):
    path = x_rays(1, start=900)[0]
    port = free_port()
    # Polling once an hour: what is received stays unclaimed.
    home = make_home(PACS_PORT=str(port))
    slow = {"OBSERVER": "polling", "RESCAN_S": "3600", "STABILITY_S": "3600"}
    home.env.update(slow)
    with home.daemon() as daemon:
        assert dcmtk("storescu", port, path).returncode == 0
        daemon.kill()
    assert len(waiting(home)) == 1
    assert home.rows() == []
    for key in slow:
        del home.env[key]
    with home.daemon() as daemon:
        wait_for(lambda: [r for r in home.rows() if r.is_kept], daemon.log)
        assert [row.state for row in home.rows()] == ["done"]


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    """An authority, and certificates for both sides, made by openssl."""
    if not shutil.which("openssl"):
        pytest.skip("needs openssl")
    folder = tmp_path_factory.mktemp("tls")

    def openssl(*arguments):
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)

    openssl(
        "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", "ca.key", "-out", "ca.pem",
        "-subj", "/CN=test authority", "-days", "2",
    )  # fmt: skip
    for name in ("server", "client"):
        openssl(
            "req", "-newkey", "rsa:2048", "-nodes", "-keyout", f"{name}.key",
            "-out", f"{name}.csr", "-subj", f"/CN={name}",
        )  # fmt: skip
        openssl(
            "x509", "-req", "-in", f"{name}.csr", "-CA", "ca.pem", "-CAkey", "ca.key",
            "-CAcreateserial", "-out", f"{name}.pem", "-days", "2",
        )  # fmt: skip
    return folder


def test_tls_lets_in_who_has_a_certificate(make_home, certificates, x_rays):
    place = certificates
    tls = {
        "PACS_TLS_CERTIFICATE": str(place / "server.pem"),
        "PACS_TLS_KEY": str(place / "server.key"),
        "PACS_TLS_CA": str(place / "ca.pem"),
    }
    with listening(make_home, **tls) as (home, daemon, port):
        # One that says nothing does not hold up the others.
        silent = socket.create_connection(("127.0.0.1", port))
        with_certificate = (
            "+tls",
            place / "client.key",
            place / "client.pem",
            "+cf",
            place / "ca.pem",
        )
        path = x_rays(1, start=950)[0]
        assert dcmtk("echoscu", port).returncode != 0
        assert dcmtk("echoscu", port, "+tla", "+cf", place / "ca.pem").returncode != 0
        assert waiting(home) == []
        sent = dcmtk("storescu", port, *with_certificate, path)
        assert sent.returncode == 0, sent.stderr
        silent.close()
        wait_for(lambda: [r for r in home.rows() if r.is_kept], daemon.log)
        daemon.wait_until_said('why="TLS handshake"')
