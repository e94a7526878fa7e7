"""Taking an object from the network is work that the watchdog watches."""

import socket
import threading

import pydicom
import pytest

from lungwatch.daemon.config import Config
from lungwatch.daemon.home import Home
from lungwatch.daemon.stage import Progress
from tests.support.clock import ManualClock
from tests.support.waits import PATIENCE_S, wait_for

pynetdicom = pytest.importorskip("pynetdicom", reason="needs pynetdicom (extra 'pacs')")


def wait_until_stuck(stages, progress, clock):
    """Wait until just these stages are stuck; one that goes on shows that a moment later."""

    def stuck():
        return list(progress.stuck(clock.monotonic()))

    wait_for(lambda: stuck() == stages, stuck)


@pytest.fixture
def listening(tmp_path):
    """A started listener, its home, the record of its progress, and that record's clock."""
    from lungwatch.daemon.pacs.listener import Listener

    config = Config(home=tmp_path, min_free_mb=0, stuck_s=7)
    home, clock = Home(tmp_path), ManualClock()
    home.prepare()
    progress = Progress(clock, config.stuck_s)
    crashes = []
    listener = Listener(config, home, lambda *crash: crashes.append(crash), progress)
    listener.start()
    yield listener, home, progress, clock
    listener.stop()
    assert crashes == []


def test_a_disk_that_hangs_while_an_object_is_stored_starves_the_watchdog(
    listening, monkeypatch, rg1
):
    """Stuck after `stuck_s`, and no longer once the file is written and success was answered."""
    from lungwatch.daemon.pacs.reception import SpooledObject

    listener, home, progress, clock = listening
    release, real = threading.Event(), SpooledObject.publish

    def hanging(spool, target):
        assert release.wait(PATIENCE_S)
        real(spool, target)

    monkeypatch.setattr(SpooledObject, "publish", hanging)
    try:
        entity = pynetdicom.AE()
        entity.add_requested_context("1.2.840.10008.5.1.4.1.1.1")
        association = entity.associate("127.0.0.1", listener.port, ae_title="LUNGWATCH")
        answers = []
        sender = threading.Thread(target=lambda: answers.append(association.send_c_store(rg1)))
        sender.start()
        wait_for(lambda: "reception" in progress.snapshot())
        assert progress.stuck(clock.monotonic()) == {}
        clock.advance(8)
        wait_until_stuck(["reception"], progress, clock)
        release.set()
        sender.join(PATIENCE_S)
        association.release()
    finally:
        release.set()
    assert answers[0].Status == 0
    assert progress.stuck(clock.monotonic()) == {}
    assert len(list(home.incoming.glob("*.dcm"))) == 1


def test_the_callers_title_is_in_the_file_and_the_data_set_as_it_came(listening, rg1):
    listener, home, _, _ = listening
    for _ in range(2):
        entity = pynetdicom.AE(ae_title="CT_ROOM 3")
        entity.add_requested_context("1.2.840.10008.5.1.4.1.1.1")
        association = entity.associate("127.0.0.1", listener.port, ae_title="LUNGWATCH")
        assert association.send_c_store(rg1).Status == 0
        association.release()
    one, two = home.incoming.glob("*.dcm")
    assert one.read_bytes() == two.read_bytes(), "the same object twice is one content"
    stored = pydicom.dcmread(one)
    assert stored.file_meta.SendingApplicationEntityTitle == "CT_ROOM 3"
    assert stored.PixelData == pydicom.dcmread(rg1).PixelData


def test_a_listener_that_takes_no_connections_any_more_starves_the_watchdog(listening, monkeypatch):
    from lungwatch.daemon.pacs.listener import BoundedServer

    listener, _, progress, clock = listening
    release, asked, real = threading.Event(), threading.Event(), BoundedServer.verify_request

    def hanging(*arguments):
        asked.set()
        assert release.wait(PATIENCE_S)
        return real(*arguments)

    try:
        clock.advance(8)
        wait_until_stuck([], progress, clock)
        monkeypatch.setattr(BoundedServer, "verify_request", hanging)
        with socket.create_connection(("127.0.0.1", listener.port), PATIENCE_S):
            assert asked.wait(PATIENCE_S)
            clock.advance(8)
            wait_until_stuck(["listener"], progress, clock)
            release.set()
        wait_until_stuck([], progress, clock)
    finally:
        release.set()
