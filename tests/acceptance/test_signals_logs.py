"""A log that nobody reads never stops the work, and signals never end it unasked."""

import contextlib
import fcntl
import os
import signal
import subprocess

import pytest

from tests.support.processes import COMMAND
from tests.support.waits import PATIENCE_S

_PIPE_BYTES = 4096
_FILES = 40


@contextlib.contextmanager
def unread(home):
    """Run a daemon whose standard error is a small pipe; yield it and the end to read."""
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
    process = subprocess.Popen(
        [COMMAND, "run", "--home", str(home.root)],
        env=home.environment(),
        cwd=home.root.parent,
        stdout=subprocess.DEVNULL,
        stderr=writer,
    )
    os.close(writer)
    try:
        yield process, reader
    finally:
        process.kill()
        process.wait()
        os.close(reader)


def test_a_log_that_nobody_reads_stops_neither_the_work_nor_the_stop(make_home, picture):
    home = make_home(GATE="flag", OVERLAY_SIDE_PX="128")
    with home.daemon() as daemon:
        daemon.kill()  # the database is made, and can be asked
    contents = [picture(number) for number in range(_FILES)]
    for number, content in enumerate(contents):
        home.drop(f"{number}.png", content, old=True)
    with unread(home) as (process, _):
        home.wait_until_ended(contents)
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_S) == 0


def test_no_signal_but_a_stop_ends_the_daemon(make_home):
    home = make_home()
    daemon = home.daemon()
    daemon.start()
    # Made in the middle of a start, long before it is ready.
    daemon.wait_for((home.root / "lungwatch.db").exists, "a database")
    for number in (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        daemon.process.send_signal(number)
    try:
        daemon.wait_until_said("action=ready")
        daemon.process.send_signal(signal.SIGUSR1)
        daemon.wait_until_said("action=status phase=ready")
        daemon.wait_until_said("action=stage_status stage=")
        for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            daemon.process.send_signal(number)
        assert daemon.process.wait(PATIENCE_S) == 0, daemon.log()
    finally:
        daemon.kill()


def test_the_closing_of_its_terminal_ends_a_daemon(make_home):
    home = make_home()
    ours, theirs = os.openpty()
    process = subprocess.Popen(
        [COMMAND, "run", "--home", str(home.root)],
        env=home.environment(),
        stdin=theirs,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert any("action=ready" in line for line in process.stderr)
        process.send_signal(signal.SIGHUP)
        _, said = process.communicate(timeout=PATIENCE_S)
        assert "action=stopped" in said
        assert process.returncode == 0
    finally:
        process.kill()
        os.close(ours)
        os.close(theirs)


def test_sigusr2_looks_through_the_drop_folder_now(make_home, picture):
    home = make_home(OBSERVER="polling", RESCAN_S="3600", GATE="flag")
    with home.daemon() as daemon:
        first, second = picture(1), picture(2)
        home.drop("first.png", first, old=True)
        daemon.process.send_signal(signal.SIGUSR2)
        daemon.wait_until_said("action=rescan")
        home.wait_until_ended([first])
        home.drop("second.png", second, old=True)
        daemon.process.send_signal(signal.SIGUSR2)
        home.wait_until_ended([second])


def test_sighup_takes_over_the_format_and_names_what_needs_a_restart(make_home):
    home = make_home()
    file = home.root / "lungwatch.toml"
    with home.daemon() as daemon:
        file.write_text('log_format = "yaml"\n')
        daemon.process.send_signal(signal.SIGHUP)
        daemon.wait_until_said("action=reload_refused")
        file.write_text('log_format = "json"\nlease_s = 60\n')
        daemon.process.send_signal(signal.SIGHUP)
        daemon.wait_until_said('"action": "reloaded", "changed": "log_format"')
        daemon.wait_until_said('"action": "reload_needs_restart", "keys": "lease_s"')
        assert daemon.stop() == 0


@pytest.mark.parametrize("args", [("results", "list"), ("results", "--help")])
def test_a_pipe_that_is_closed_ends_a_command_quietly(make_home, args):
    home = make_home()
    with home.daemon() as daemon:
        assert daemon.stop() == 0
    reader, writer = os.pipe()
    os.close(reader)
    env = home.environment({"HOME": str(home.root)})
    ended = subprocess.run(
        [COMMAND, *args], env=env, stdout=writer, stderr=subprocess.PIPE, check=False
    )
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (128 + signal.SIGPIPE, b"")
