"""What counts as progress, and what starves the service manager's watchdog."""

import socket
import threading
from contextlib import ExitStack, closing

import pytest

from lungwatch.daemon.config import Config
from lungwatch.daemon.service import Watchdog
from lungwatch.daemon.stage import Progress, StuckStage, progress_limits
from tests.support.clock import ManualClock


class Clock(ManualClock):
    def now(self):
        raise AssertionError("progress is not measured by the wall clock")


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def vitals(clock):
    return Progress(clock, {"decode": 10.0})


def stages(vitals, clock):
    return [one.stage for one in vitals.stuck(clock.monotonic())]


def test_an_idle_stage_is_never_stuck(vitals, clock):
    with vitals.busy("decode"):
        clock.advance(9)
    clock.advance(10_000)
    assert vitals.stuck(clock.monotonic()) == []
    assert vitals.snapshot()["decode"].finished == 1


def test_a_unit_of_work_beyond_its_limit_is_stuck_until_it_ends(vitals, clock):
    with vitals.busy("decode"):
        clock.advance(11)
        assert vitals.stuck(clock.monotonic()) == [StuckStage(stage="decode", seconds=11.0)]
        assert vitals.snapshot()["decode"].oldest_s == 11.0
    assert stages(vitals, clock) == []


def test_a_unit_that_fails_has_ended_too(vitals, clock):
    with pytest.raises(OSError, match="gone"), vitals.busy("decode"):
        raise OSError("gone")
    clock.advance(100)
    assert stages(vitals, clock) == []


def test_others_that_go_on_do_not_hide_the_one_that_hangs(vitals, clock):
    with vitals.busy("decode"):
        for _ in range(4):
            clock.advance(3)
            with vitals.busy("decode"):
                pass
        assert stages(vitals, clock) == ["decode"]


def test_a_beat_renews_the_work_of_its_own_thread_alone(vitals, clock):
    with ExitStack() as work:
        work.enter_context(vitals.busy("decode"))
        clock.advance(8)
        other = threading.Thread(target=vitals.beat, args=("decode",))
        other.start()
        other.join()
        clock.advance(3)
        assert stages(vitals, clock) == ["decode"]
        vitals.beat("decode")
        assert stages(vitals, clock) == []


def test_a_queue_in_which_nothing_moves_is_stuck(vitals, clock):
    waiting = 0
    vitals.watch_queue("decode", lambda: waiting)
    clock.advance(100)
    waiting = 1
    assert stages(vitals, clock) == []  # it has only just come
    clock.advance(9)
    with vitals.busy("decode"):
        pass
    clock.advance(9)
    assert stages(vitals, clock) == []
    clock.advance(2)
    assert stages(vitals, clock) == ["decode"]


def test_time_in_a_known_trouble_does_not_count(vitals, clock):
    with vitals.busy("decode"):
        clock.advance(1000)
        vitals.excuse(clock.monotonic())
        assert stages(vitals, clock) == []
        clock.advance(11)
        assert stages(vitals, clock) == ["decode"]


def test_a_stage_may_use_up_its_own_timeouts_first():
    short = progress_limits(Config(decode_timeout_s=1.0, retries=0))["decode"]
    long = progress_limits(Config(decode_timeout_s=100.0, retries=6))["decode"]
    assert long - short == 2 * 99 + 0.5 * (64 - 1)


class TestWatchdog:
    @pytest.fixture
    def manager(self, tmp_path, monkeypatch):
        with closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) as server:
            server.bind(str(tmp_path / "notify"))
            server.setblocking(False)
            monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
            yield server

    @staticmethod
    def heard(manager):
        said = []
        while True:
            try:
                said.append(manager.recv(4096).decode())
            except BlockingIOError:
                return said

    @pytest.fixture
    def dead(self):
        return []

    @pytest.fixture
    def excuses(self):
        return []

    @pytest.fixture
    def watchdog(self, vitals, clock, dead, excuses):
        return Watchdog(
            vitals=vitals,
            clock=clock,
            is_excused=lambda: bool(excuses),
            dead=lambda: dead,
            status=lambda: "all well",
            environ={"WATCHDOG_USEC": "30000000"},
        )

    def test_it_is_fed_thrice_a_period(self, watchdog, manager, clock):
        fed = 0
        for _ in range(60):
            watchdog.tick()
            fed += self.heard(manager).count("WATCHDOG=1")
            clock.advance(1)
        assert fed == 6

    def test_a_stuck_stage_starves_it_and_is_named_once(
        self, watchdog, manager, vitals, clock, caplog
    ):
        with vitals.busy("decode"):
            for _ in range(40):
                watchdog.tick()
                clock.advance(1)
            said = self.heard(manager)
        assert said.count("WATCHDOG=1") == 2  # at 0 and 10 s; the limit is 10 s
        assert "STATUS=no progress: decode" in said
        assert caplog.text.count("action=stuck stage=decode") == 1
        watchdog.tick()
        assert "WATCHDOG=1" in self.heard(manager)
        assert caplog.text.count("action=unstuck stage=decode") == 1

    def test_a_dead_thread_starves_it(self, watchdog, manager, dead):
        dead.append("overlay-1")
        watchdog.tick()
        assert self.heard(manager) == ["STATUS=no progress: overlay-1"]

    def test_a_full_disk_does_not_starve_it(self, watchdog, manager, vitals, clock, excuses):
        excuses.append("space")
        with vitals.busy("decode"):
            for _ in range(40):
                watchdog.tick()
                clock.advance(1)
        assert self.heard(manager).count("WATCHDOG=1") == 4

    @pytest.mark.parametrize(
        "environ",
        [{}, {"WATCHDOG_USEC": "soon"}, {"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}],
    )
    def test_nobody_is_fed_who_does_not_ask(self, vitals, clock, manager, environ):
        watchdog = Watchdog(
            vitals=vitals,
            clock=clock,
            is_excused=lambda: False,
            dead=list,
            status=lambda: "all well",
            environ=environ,
        )
        watchdog.tick()
        assert self.heard(manager) == ["STATUS=all well"]
        assert watchdog.wait_s(1.0) == 1.0
