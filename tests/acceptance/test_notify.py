"""Notifications to the service manager: readiness, keep-alive, and none while work hangs.

With the manager's socket alone, which any machine has; test_systemd.py has the manager.
"""

import shutil
import socket
import tempfile
import time
from contextlib import closing
from pathlib import Path

import pytest

from tests.support.waits import PATIENCE_S, wait_for

PERIOD_S = 0.5


class Manager:
    """The service manager's end of the socket."""

    def __init__(self, folder: Path):
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(folder / "notify"))
        self._socket.setblocking(False)
        self.said: list[str] = []
        self.environment = {
            "NOTIFY_SOCKET": str(folder / "notify"),
            "WATCHDOG_USEC": str(round(3 * PERIOD_S * 1e6)),
        }

    def close(self):
        self._socket.close()

    def listen(self):
        """Take what has come."""
        while True:
            try:
                self.said += self._socket.recv(4096).decode().splitlines()
            except BlockingIOError:
                return self.said

    def wait_for(self, line: str, times: int = 1):
        count = self.listen().count(line) + times
        wait_for(lambda: self.listen().count(line) >= count, lambda: str(self.said))


@pytest.fixture
def manager(monkeypatch):
    # A socket's name is short; pytest's own folders are deep.
    folder = Path(tempfile.mkdtemp(prefix="lw-"))
    with closing(Manager(folder)) as manager:
        for name, value in manager.environment.items():
            monkeypatch.setenv(name, value)
        yield manager
    shutil.rmtree(folder)


def test_the_manager_hears_of_readiness_work_and_the_end(manager, make_home, picture):
    home = make_home()
    content = picture(1)
    with home.daemon() as daemon:
        wait_for(lambda: "READY=1" in manager.listen(), lambda: str(manager.said))
        assert manager.said[:2] == ["STATUS=opening the database", "READY=1"]
        manager.wait_for("WATCHDOG=1", 2)  # idle
        home.drop("a.png", content)
        home.wait_until_ended([content])
        manager.wait_for("WATCHDOG=1", 2)
        wait_for(
            lambda: "STATUS=1 ended, 0 in progress, 0 waiting" in manager.listen(),
            lambda: str(manager.said),
        )
        assert daemon.stop() == 0
    assert "STOPPING=1" in manager.listen()
    assert "WATCHDOG=1" not in manager.said[manager.said.index("STOPPING=1") :]


def test_a_daemon_that_cannot_start_never_says_that_it_is_ready(manager, make_home, tmp_path):
    home = make_home(MODEL=str(tmp_path / "nowhere"))
    assert home.daemon().launch().process.wait(PATIENCE_S) == 1
    assert "READY=1" not in manager.listen()


@pytest.mark.parametrize(("place", "stage"), [("classified", "inference"), ("overlaid", "overlay")])
def test_a_stage_that_hangs_starves_the_watchdog_and_is_named(
    manager, make_home, picture, place, stage
):
    """The main loop, and every other thread, live on; only the work does not."""
    home = make_home(HANG_AT=place, STUCK_S="1", RETRIES="0")
    home.drop("a.png", picture(2), old=True)
    with home.daemon() as daemon:
        daemon.wait_until_said(f"action=stuck stage={stage}")
        manager.listen()
        manager.said.clear()
        time.sleep(4 * PERIOD_S)
        assert "WATCHDOG=1" not in manager.listen()
        assert daemon.log().count(f"action=stuck stage={stage}") == 1
    del home.env["HANG_AT"]
    assert home.run_once().returncode == 0
    home.assert_settled([picture(2)])
