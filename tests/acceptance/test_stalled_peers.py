"""Peers that stop, trickle or do not read, against the listener and the status port."""

import http.client
import shutil
import signal
import socket
import struct
import subprocess
import threading
import time
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pydicom
import pytest

from tests.support.peers import free_port
from tests.support.waits import wait_for

pynetdicom = pytest.importorskip("pynetdicom", reason="needs pynetdicom (extra 'pacs')")
pytestmark = pytest.mark.skipif(
    not shutil.which("storescu"), reason="needs DCMTK (Debian's package 'dcmtk')"
)
FAST = {
    "PACS_PDU_TIMEOUT_S": "3",
    "PACS_IDLE_TIMEOUT_S": "4",
    "PACS_MIN_RATE_BYTES_S": "1000",
}
CR = "1.2.840.10008.5.1.4.1.1.1"


def association_request():
    """Encode an association request for CR and Verification (PS3.8 9.3.2)."""

    def item(kind, content):
        return struct.pack(">BBH", kind, 0, len(content)) + content

    body = struct.pack(">HH16s16s32x", 1, 0, b"LUNGWATCH".ljust(16), b"STALLED".ljust(16))
    body += item(0x10, b"1.2.840.10008.3.1.1.1")
    for number, uid in ((1, CR), (3, "1.2.840.10008.1.1")):
        syntax = item(0x30, uid.encode()) + item(0x40, b"1.2.840.10008.1.2")
        body += item(0x20, bytes([number, 0, 0, 0]) + syntax)
    body += item(0x50, item(0x51, struct.pack(">L", 16_384)) + item(0x52, b"1.2.3"))
    return struct.pack(">BBL", 1, 0, len(body)) + body


def echo_request():
    uid = b"1.2.840.10008.1.1\0"
    command = struct.pack("<HHL", 0, 2, len(uid)) + uid
    for element, value in ((0x100, 0x30), (0x110, 1), (0x800, 0x101)):
        command += struct.pack("<HHLH", 0, element, 2, value)
    command = struct.pack("<HHLL", 0, 0, 4, len(command)) + command
    part = struct.pack(">LBB", len(command) + 2, 3, 3) + command
    return struct.pack(">BBL", 4, 0, len(part)) + part


def connect(port, *, associated):
    peer = socket.create_connection(("127.0.0.1", port), 60)
    if associated:
        peer.sendall(association_request())
        if peer.recv(1) != b"\x02":
            peer.close()
            raise ConnectionRefusedError("the association was rejected")
    return peer


def stop_in_the_request(port):
    peer = connect(port, associated=False)
    peer.sendall(association_request()[:40])
    return peer


def stop_in_a_pdu(port):
    peer = connect(port, associated=True)
    peer.sendall(struct.pack(">BBL", 4, 0, 10_000) + b"\0" * 50)
    return peer


def trickle(port):
    peer = connect(port, associated=True)

    def drip():
        try:
            peer.sendall(struct.pack(">BBL", 4, 0, 100_000))
            while True:
                peer.sendall(b"\0")
                time.sleep(0.3)
        except OSError:
            pass

    threading.Thread(target=drip, daemon=True).start()
    return peer


def say_nothing(port):
    return connect(port, associated=True)


def never_read(port):
    peer = connect(port, associated=True)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)

    def flood():
        try:
            while True:
                peer.sendall(echo_request())
        except OSError:
            pass

    threading.Thread(target=flood, daemon=True).start()
    return peer


STALLS = (stop_in_the_request, stop_in_a_pdu, trickle, say_nothing, never_read)


@contextmanager
def listening(make_home, **env):
    port = free_port()
    home = make_home(PACS_PORT=str(port), **env)
    with home.daemon() as daemon:
        yield home, daemon, port


def store(port, path, *, calling="STORESCU"):
    return subprocess.run(
        ["storescu", "-aet", calling, "-aec", "LUNGWATCH", "127.0.0.1", str(port), str(path)],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


@pytest.mark.parametrize("stall", STALLS)
@pytest.mark.parametrize("many", [10, 18])
def test_peers_that_stall_are_cut_and_others_deliver(make_home, find_testdata, stall, many):
    path = find_testdata("RG1_UNCR.dcm")
    with listening(make_home, **FAST) as (home, daemon, port), ExitStack() as stack:
        for _ in range(many):
            with suppress(OSError):  # rejected
                stack.callback(stall(port).close)
        wait_for(lambda: store(port, path).returncode == 0, daemon.log, 60)
        daemon.wait_until_said("action=cut_off")
        assert "address=127.0.0.1" in daemon.log()
        assert "Traceback" not in daemon.log()
        home.wait_until_ended([])


@pytest.mark.parametrize("stall", STALLS)
def test_a_stop_ends_within_its_bound_whatever_peers_do(make_home, stall):
    """The limits are long: it is the stop that ends the connections."""
    with listening(make_home, PACS_PDU_TIMEOUT_S="600") as (_, daemon, port), ExitStack() as stack:
        for _ in range(6):
            stack.callback(stall(port).close)
        daemon.process.send_signal(signal.SIGTERM)
        assert daemon.process.wait(40) == 0


def test_one_address_does_not_take_every_association(make_home, find_testdata):
    with listening(make_home) as (_, daemon, port), ExitStack() as stack:
        rejected = 0
        for _ in range(10):
            try:
                stack.callback(say_nothing(port).close)
            except ConnectionRefusedError:
                rejected += 1
        assert rejected == 2
        daemon.wait_until_said('why="too many associations of this address"')


@pytest.mark.parametrize("keyword", ["SOPInstanceUID", "SOPClassUID"])
def test_an_object_that_is_not_what_the_command_says_is_refused(
    make_home, find_testdata, tmp_path, keyword
):
    """PS3.4 B.2.3: 0xA900, data set does not match SOP class."""
    image = pydicom.dcmread(find_testdata("RG1_UNCR.dcm"))
    with listening(make_home, OBSERVER="polling", RESCAN_S="3600") as (home, daemon, port):
        entity = pynetdicom.AE()
        entity.add_requested_context(image.SOPClassUID, image.file_meta.TransferSyntaxUID)
        association = entity.associate("127.0.0.1", port, ae_title="LUNGWATCH")
        true = (image.SOPClassUID, image.SOPInstanceUID)
        context_of = association._get_valid_context
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                association,
                "_get_valid_context",
                lambda _, *rest, **more: context_of(true[0], *rest, **more),
            )
            provider = pynetdicom.dimse.DIMSEServiceProvider
            patch.setattr(provider, "send_msg", _claiming(provider.send_msg, *true))
            other = "1.2.3.4" if keyword == "SOPInstanceUID" else "1.2.840.10008.5.1.4.1.1.7"
            setattr(image, keyword, other)
            status = association.send_c_store(image)
        association.release()
        assert status.Status == 0xA900
        assert [p for p in home.incoming.iterdir() if p.is_file()] == []
        daemon.wait_until_said("status=0xA900")


def _claiming(send, sop_class, sop_instance):
    def wrapped(self, primitive, context_id):
        primitive.AffectedSOPClassUID, primitive.AffectedSOPInstanceUID = sop_class, sop_instance
        return send(self, primitive, context_id)

    return wrapped


def test_an_object_of_500_mb_takes_no_more_memory_than_stated(make_home, find_testdata, tmp_path):
    """The bound of docs/dicom-conformance.md: 16 MiB for each association."""
    image = pydicom.dcmread(find_testdata("RG1_UNCR.dcm"))
    image.Rows = image.Columns = 15_800
    image.PixelData = bytes(15_800 * 15_800 * 2)
    image.SOPInstanceUID = image.file_meta.MediaStorageSOPInstanceUID = "1.2.3.4.5"
    path = tmp_path / "big.dcm"
    image.save_as(path)
    del image
    quiet = {"OBSERVER": "polling", "RESCAN_S": "3600", "STABILITY_S": "3600"}
    with listening(make_home, **quiet) as (home, daemon, port):
        assert store(port, find_testdata("RG1_UNCR.dcm")).returncode == 0
        # 5 sets the peak back to what is resident now (proc(5)).
        Path(f"/proc/{daemon.process.pid}/clear_refs").write_text("5")
        before_kb = peak_kb(daemon.process.pid)
        assert store(port, path).returncode == 0
        grown_kb = peak_kb(daemon.process.pid) - before_kb
        sizes = [one.stat().st_size for one in home.incoming.glob("pacs-*.dcm")]
        assert max(sizes) > 480_000_000
    print(f"grown by {grown_kb} KiB")
    assert grown_kb < 16 * 1024


def peak_kb(pid):
    status = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))


def test_slow_requests_do_not_close_the_status_port(make_home):
    port = free_port()
    home = make_home(METRICS_PORT=str(port))
    with home.daemon() as daemon, ExitStack() as stack:
        stopped = threading.Event()
        stack.callback(stopped.set)
        peers = []
        for _ in range(18):
            peer = socket.create_connection(("127.0.0.1", port), 30)
            stack.callback(peer.close)
            peer.sendall(b"GET /ready HTTP/1.1\r\nHost: localhost\r\n")
            peers.append(peer)

        def drip():
            while not stopped.wait(1):
                for peer in peers:
                    with suppress(OSError):
                        peer.sendall(b"X")

        threading.Thread(target=drip, daemon=True).start()
        wait_for(lambda: ready(port) == 200, daemon.log, 60)
        daemon.process.send_signal(signal.SIGTERM)
        assert daemon.process.wait(40) == 0


def test_a_large_header_is_cut(make_home):
    port = free_port()
    with make_home(METRICS_PORT=str(port)).daemon():
        with socket.create_connection(("127.0.0.1", port), 60) as peer:
            peer.sendall(b"GET /ready HTTP/1.1\r\n")
            line = b"X-Filler: " + b"a" * 4000 + b"\r\n"
            sent = 0
            with suppress(OSError):
                for _ in range(90):
                    peer.sendall(line)
                    sent += 1
                    time.sleep(0.02)
            assert sent < 90
        assert ready(port) == 200


def ready(port):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", "/ready")
        return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return 0
    finally:
        connection.close()
