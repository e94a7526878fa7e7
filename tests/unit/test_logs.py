"""Log events as text, JSON and entries of systemd's journal."""

import json
import logging
import os
import socket
import struct
import threading

import pytest

from lungwatch.daemon.logs import (
    JournalHandler,
    JsonFormatter,
    QueuedHandler,
    event,
    is_journal,
    journal_entry,
)
from lungwatch.errors import ConfigError
from tests.support.waits import wait_for


@pytest.fixture
def records():
    """The records of the events of a test."""
    kept = []
    handler = logging.Handler()
    handler.emit = kept.append
    log = logging.getLogger("lungwatch")
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    yield kept
    log.removeHandler(handler)
    log.setLevel(level)


def test_json_is_one_ascii_line_whatever_the_values(records):
    event("filed", "ab" * 32, text="a\nb\x1b\udcff%s", share=float("nan"), count=3)
    line = JsonFormatter().format(records[0])
    assert line.isascii()
    assert "\n" not in line
    parsed = json.loads(line, parse_constant=pytest.fail)
    assert parsed["sha"] == "ab" * 6
    assert (parsed["action"], parsed["level"], parsed["count"]) == ("filed", "info", 3)
    assert parsed["time"].endswith("+00:00")
    assert parsed["share"] == "nan"


def test_a_value_cannot_forge_a_field_of_the_journal(records):
    event("rejected", reason="x\nPRIORITY=0", level=logging.WARNING)
    entry = journal_entry(records[0])
    value = b"x\nPRIORITY=0"
    assert b"REASON\n" + struct.pack("<Q", len(value)) + value + b"\n" in entry
    assert b"ACTION=rejected\n" in entry
    assert entry.count(b"\nPRIORITY=4\n") == 1


def test_the_journal_gets_events_by_datagram(tmp_path, records):
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as journal:
        journal.bind(str(path))
        handler = JournalHandler(path)
        assert journal.recv(100) == b""
        event("claimed", "cd" * 32)
        handler.emit(records[0])
        assert b"SHA=" + b"cd" * 6 + b"\n" in journal.recv(65536)
        handler.close()


def test_no_journal_is_said_at_the_start(tmp_path):
    with pytest.raises(ConfigError, match="log_format"):
        JournalHandler(tmp_path / "none")


def test_the_journal_is_known_by_device_and_inode(tmp_path):
    with (tmp_path / "file").open("w") as file:
        status = os.fstat(file.fileno())
        stream = f"{status.st_dev}:{status.st_ino}"
        assert is_journal(file.fileno(), {"JOURNAL_STREAM": stream})
        assert not is_journal(file.fileno(), {"JOURNAL_STREAM": stream + "1"})
        assert not is_journal(file.fileno(), {})


def test_lines_that_find_the_queue_full_are_counted_and_reported_in_one_line():
    gate, written = threading.Event(), []

    class Stalled(logging.Handler):
        def emit(self, record):
            gate.wait()
            written.append(record.getMessage())

    handler = QueuedHandler(Stalled(), most_lines=5)
    for number in range(20):
        handler.emit(logging.makeLogRecord({"msg": f"line {number}"}))
    assert not handler.is_flushed()
    dropped = handler.dropped
    assert dropped in (14, 15)  # the thread holds one, if it has come to it
    gate.set()
    wait_for(handler.is_flushed)
    assert written[-1] == f"action=log_dropped lines={dropped}"
    assert len(written) == 20 - dropped + 1
    handler.close()
