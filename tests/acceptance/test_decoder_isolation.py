"""A decoder that crashes, hangs or eats memory costs its own file, and nothing else."""

import os
import re
import signal
from pathlib import Path

import cv2
import numpy as np
import pytest

from lungwatch.daemon.pipeline.sandbox import fault_mark
from tests.support.waits import wait_for

FAULTS = {
    "segfault": "decoder_crashed",
    "hang": "decoder_timed_out",
    "memory": "decoder_out_of_memory",
}
NEIGHBOURS = 6


def decoders_of(daemon):
    """The process ids of a daemon's decoders."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(status.read_text().rpartition(")")[2].split()[1])
            command = (status.parent / "cmdline").read_bytes()
        except OSError:
            continue
        if parent == daemon.process.pid and b"lungwatch.daemon.pipeline.sandbox" in command:
            found.append(int(status.parent.name))
    return sorted(found)


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_each_fault_costs_one_file_and_a_retry_finds_it_whole(make_home, picture):
    """Among others, each poisoned file fails with its own reason; the daemon is the same one."""
    home = make_home(DECODE_TIMEOUT_S="15", DECODE_MEMORY_MB="768")
    poisoned = {fault: picture(number) + fault_mark(fault) for number, fault in enumerate(FAULTS)}
    neighbours = [picture(100 + number) for number in range(NEIGHBOURS)]
    contents = [*poisoned.values(), *neighbours]
    home.env["TEST_DECODER"] = "1"
    with home.daemon() as daemon:
        for number, content in enumerate(neighbours[::2]):
            home.drop(f"before-{number}.png", content)
        for fault, content in poisoned.items():
            home.drop(f"{fault}.png", content)
        for number, content in enumerate(neighbours[1::2]):
            home.drop(f"after-{number}.png", content)
        home.wait_until_ended(contents)
        assert daemon.process.poll() is None
        assert daemon.stop() == 0, daemon.log()
    assert "Traceback" not in daemon.log()
    rows = {fault: home.row(content) for fault, content in poisoned.items()}
    assert {fault: (row.state, row.reason) for fault, row in rows.items()} == {
        fault: ("failed", reason) for fault, reason in FAULTS.items()
    }
    assert {row.attempts for row in rows.values()} == {1}
    assert {home.row(content).state for content in neighbours} == {"done"}
    home.assert_settled(contents)

    del home.env["TEST_DECODER"]
    assert home.command("retry", "--failed").returncode == 0
    assert home.run_once().returncode == 0
    assert {home.row(content).state for content in contents} == {"done"}
    home.assert_settled(contents)


def test_a_large_image_beyond_the_limit_is_no_fault_of_the_file(make_home):
    """64 million pixels in less memory than they take: failed for want of memory, not refused."""
    pixels = np.zeros((8000, 8000), np.uint8)
    pixels[:4000] = 200
    is_encoded, data = cv2.imencode(".png", pixels)
    assert is_encoded
    content = data.tobytes()
    home = make_home(DECODE_MEMORY_MB="600")
    home.drop("large.png", content, old=True)
    assert home.run_once().returncode == 0
    assert (home.row(content).state, home.row(content).reason) == (
        "failed",
        "decoder_out_of_memory",
    )
    home.assert_settled([content])


def test_a_decoder_holds_nothing_of_the_daemons(make_home, picture):
    """No lock, database, socket of others, secret; no model's library; within its limits."""
    if os.geteuid() != 0:
        pytest.skip("only root sees the descriptors of a process that is not dumpable")
    home = make_home(DECODE_MEMORY_MB="2048", DECODE_WORKERS="1")
    with home.daemon() as daemon:
        home.drop("x.png", picture(1))
        # The only decoder has answered then: it has set its limits and imported all that it needs.
        home.wait_until_ended([picture(1)])
        (pid,) = decoders_of(daemon)
        proc = Path(f"/proc/{pid}")
        mapped = (proc / "maps").read_text()
        assert "cv2" in mapped
        assert not re.search("tensorflow|onnxruntime|sqlite", mapped)
        opened = [str(entry.readlink()) for entry in (proc / "fd").iterdir()]
        assert sum(name.startswith("socket:") for name in opened) == 1
        assert not [name for name in opened if str(home.root) in name or "inotify" in name]
        assert b"LUNGWATCH_" not in (proc / "environ").read_bytes()
        limits = (proc / "limits").read_text()
        assert re.search(rf"^Max address space +{2048 << 20} ", limits, re.MULTILINE)
        assert re.search(r"^Max core file size +0 ", limits, re.MULTILINE)
        assert re.search(r"^Max file size +0 ", limits, re.MULTILINE)


def test_decoders_end_with_a_daemon_that_is_killed(make_home):
    home = make_home()
    with home.daemon() as daemon:
        # Each is started by its own thread, of which "ready" says nothing.
        wait_for(lambda: len(decoders_of(daemon)) == 2, daemon.log)
        decoders = decoders_of(daemon)
        daemon.kill()
        wait_for(lambda: not any(is_alive(pid) for pid in decoders), daemon.log)


def test_a_stop_meant_for_the_group_leaves_the_decoders_to_the_drain(make_home, picture):
    """Ctrl-C and systemd reach every process: a decoder goes on until its parent is done."""
    home = make_home(DECODE_WORKERS="1")
    with home.daemon() as daemon:
        home.drop("x.png", picture(1))
        home.wait_until_ended([picture(1)])
        # It has answered: by then it has put the signals out of its way.
        decoders = decoders_of(daemon)
        assert len(decoders) == 1
        for pid in decoders:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                os.kill(pid, number)
        home.drop("y.png", picture(2))
        home.wait_until_ended([picture(2)])
        assert decoders_of(daemon) == decoders
        assert daemon.stop() == 0, daemon.log()
    assert not any(is_alive(pid) for pid in decoders)
    home.assert_settled([picture(1), picture(2)])


def test_a_decoder_killed_from_outside_is_replaced_at_no_cost(make_home, picture):
    """As the kernel does when memory runs out: the file is decoded by the next one."""
    home = make_home(TEST_DECODER="1", DECODE_WORKERS="1")
    contents = [picture(1), picture(2), picture(3)]
    with home.daemon() as daemon:
        for number, content in enumerate(contents):
            home.drop(f"{number}.png", content)
            home.wait_until_ended([content])
            (decoder,) = decoders_of(daemon)
            os.kill(decoder, signal.SIGKILL)
        assert daemon.stop() == 0, daemon.log()
    assert {home.row(content).state for content in contents} == {"done"}
    home.assert_settled(contents)


@pytest.mark.parametrize("retried", [False, True], ids=["gone", "dropped again"])
def test_a_file_taken_away_while_it_is_decoded_has_an_end(make_home, picture, retried):
    home = make_home(DECODE_TIMEOUT_S="6", TEST_DECODER="1")
    content = picture(1) + fault_mark("hang")
    with home.daemon() as daemon:
        home.drop("x.png", content)
        daemon.wait_until_said("action=claimed")
        (path,) = home.files("work")
        path.unlink()
        daemon.wait_until_said("action=failed")
        assert daemon.stop() == 0, daemon.log()
    row = home.row(content)
    # By whether the decoder had opened it when it went.
    assert row.reason in ("decoder_timed_out", "file_vanished")
    assert (row.state, row.path) == ("failed", None)
    assert list((home.root / "work").iterdir()) == []
    if retried:
        del home.env["TEST_DECODER"]
        home.drop("x.png", content, old=True)
        assert home.run_once().returncode == 0
        assert home.row(content).state == "done"
