"""Observers of the drop folder: the choice of one, and the arrival of its hints."""

import os

import pytest

from lungwatch.daemon.intake.eligibility import Hint, WriterState, writer_of
from lungwatch.daemon.intake.watch import Watcher, file_system_of
from tests.support.waits import PATIENCE_S, wait_for

MOUNTS = """\
22 1 8:1 / / rw - ext4 /dev/sda1 rw
30 22 0:40 / {folder} rw - {kind} server:/x rw
"""


@pytest.mark.parametrize("kind", ["nfs4", "cifs", "smb3", "fuse.sshfs", "9p", "ext4", "tmpfs"])
def test_the_innermost_mount_decides_the_file_system(tmp_path, kind):
    text = MOUNTS.format(folder=tmp_path.resolve(), kind=kind)
    inside = tmp_path / "incoming"
    inside.mkdir()
    assert file_system_of(inside, lambda: text) == kind
    assert file_system_of(tmp_path.parent, lambda: text) == "ext4"


def test_an_unreadable_mount_table_is_no_obstacle(tmp_path):
    def unreadable() -> str:
        raise PermissionError

    assert file_system_of(tmp_path, unreadable) == "unknown"


def test_polling_starts_no_observer(tmp_path):
    watcher = Watcher(tmp_path, "polling")
    watcher.start()
    assert watcher.is_alive
    assert watcher.take_hints() == {}
    watcher.stop()


def test_a_closed_file_gives_the_hint_that_it_is_complete(tmp_path):
    watcher = Watcher(tmp_path, "inotify")
    watcher.start()
    try:
        (tmp_path / "x.png").write_bytes(b"x")
        assert watcher.wake.wait(PATIENCE_S)
        hints = {}

        def is_complete():
            hints.update(watcher.take_hints())
            return hints.get(tmp_path / "x.png") is Hint.CLOSED

        wait_for(is_complete, lambda: hints)
    finally:
        watcher.stop()


def test_the_kernel_tells_of_an_open_writer(tmp_path):
    path = tmp_path / "x"
    with path.open("wb") as file:
        file.write(b"half")
        file.flush()
        assert writer_of(path) is WriterState.PRESENT
    assert writer_of(path) is WriterState.NONE


def test_asking_about_a_fifo_does_not_block(tmp_path):
    path = tmp_path / "fifo"
    os.mkfifo(path)
    assert writer_of(path) is not WriterState.PRESENT
