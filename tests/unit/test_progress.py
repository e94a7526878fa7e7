"""Progress of stages, and its absence, which starves the service manager's watchdog."""

import socket
import threading
from contextlib import ExitStack, closing, contextmanager, nullcontext

import pytest

from lungwatch.daemon.service import Watchdog
from lungwatch.daemon.stage import Progress, Stage
from tests.support.clock import ManualClock


class Clock(ManualClock):
    def now(self):
        raise AssertionError("progress is not measured by the wall clock")


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def progress(clock):
    return Progress(clock, 10.0)


def stages(progress, clock):
    return list(progress.stuck(clock.monotonic()))


def test_an_idle_stage_is_never_stuck(progress, clock):
    with progress.busy("decode"):
        clock.advance(9)
    clock.advance(10_000)
    assert progress.stuck(clock.monotonic()) == {}
    assert progress.snapshot()["decode"].finished == 1


def test_a_unit_of_work_beyond_its_limit_is_stuck_until_it_ends(progress, clock):
    with progress.busy("decode"):
        clock.advance(11)
        assert progress.stuck(clock.monotonic()) == {"decode": 11.0}
        assert progress.snapshot()["decode"].oldest_s == 11.0
    assert stages(progress, clock) == []


def test_a_unit_that_fails_has_ended_too(progress, clock):
    with pytest.raises(OSError, match="gone"), progress.busy("decode"):
        raise OSError("gone")
    clock.advance(100)
    assert stages(progress, clock) == []


def test_others_that_go_on_do_not_hide_the_one_that_hangs(progress, clock):
    with progress.busy("decode"):
        for _ in range(4):
            clock.advance(3)
            with progress.busy("decode"):
                pass
        assert stages(progress, clock) == ["decode"]


def test_a_beat_renews_the_work_of_its_own_thread_alone(progress, clock):
    with ExitStack() as work:
        work.enter_context(progress.busy("decode"))
        clock.advance(8)
        other = threading.Thread(target=progress.beat, args=("decode",))
        other.start()
        other.join()
        clock.advance(3)
        assert stages(progress, clock) == ["decode"]
        progress.beat("decode")
        assert stages(progress, clock) == []


def test_a_queue_in_which_nothing_moves_is_stuck(progress, clock):
    waiting = 0
    progress.watch("decode", waiting=lambda: waiting)
    clock.advance(100)
    waiting = 1
    assert stages(progress, clock) == []  # it has only just come
    clock.advance(9)
    with progress.busy("decode"):
        pass
    clock.advance(9)
    assert stages(progress, clock) == []
    clock.advance(2)
    assert stages(progress, clock) == ["decode"]


def test_time_in_a_known_outage_does_not_count(progress, clock):
    with progress.busy("decode"):
        clock.advance(1000)
        progress.excuse(clock.monotonic())
        assert stages(progress, clock) == []
        clock.advance(11)
        assert stages(progress, clock) == ["decode"]


def test_a_stage_may_use_up_its_own_timeouts_first(progress, clock):
    progress.watch("decode", extra_s=5.0)
    with progress.busy("decode"), progress.busy("overlay"):
        clock.advance(15)
        assert stages(progress, clock) == ["overlay"]
        clock.advance(1)
        assert stages(progress, clock) == ["decode", "overlay"]


def stage_of(progress, handler, **options):
    crashes = []
    stage = Stage(
        "test",
        lambda: nullcontext(handler),
        progress,
        lambda name, error: crashes.append((name, error)),
        **options,
    )
    return stage, crashes


def test_a_stage_takes_batches_of_what_waits_and_ends_after_what_is_queued(progress):
    batches = []
    stage, crashes = stage_of(progress, batches.append, batch_size=3)
    for number in range(5):
        stage.put(number)
    stage.close()
    assert progress.snapshot()["test"].waiting == 6
    stage.start()
    stage.join()
    assert batches == [[0, 1, 2], [3, 4]]
    assert crashes == []
    assert progress.snapshot()["test"].finished == 2


def test_a_stage_whose_handler_fails_reports_its_thread(progress):
    error = ValueError("a mistake")

    def fail(items):
        raise error

    stage, crashes = stage_of(progress, fail, workers=2)
    stage.start()
    stage.put(1)
    stage.close()
    stage.join()
    ((name, found),) = crashes
    assert name in ("test-0", "test-1")
    assert found is error
    assert sorted(stage.dead) == ["test-0", "test-1"]


def test_a_handler_is_opened_on_each_thread_and_closed_at_the_end(progress):
    seen = []

    @contextmanager
    def opened():
        seen.append(("open", threading.current_thread().name))
        yield lambda items: None
        seen.append(("close", threading.current_thread().name))

    stage = Stage("test", opened, progress, lambda *_: None, workers=2)
    stage.close()
    stage.start()
    stage.join()
    assert sorted(seen) == [(what, f"test-{n}") for what in ("close", "open") for n in (0, 1)]


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
    def watchdog(self, progress, clock, dead, excuses):
        return Watchdog(
            progress=progress,
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
        self, watchdog, manager, progress, clock, caplog
    ):
        with progress.busy("decode"):
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

    def test_a_full_disk_does_not_starve_it(self, watchdog, manager, progress, clock, excuses):
        excuses.append("space")
        with progress.busy("decode"):
            for _ in range(40):
                watchdog.tick()
                clock.advance(1)
        assert self.heard(manager).count("WATCHDOG=1") == 4

    @pytest.mark.parametrize(
        "environ",
        [{}, {"WATCHDOG_USEC": "soon"}, {"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}],
    )
    def test_nobody_is_fed_who_does_not_ask(self, progress, clock, manager, environ):
        watchdog = Watchdog(
            progress=progress,
            clock=clock,
            is_excused=lambda: False,
            dead=list,
            status=lambda: "all well",
            environ=environ,
        )
        watchdog.tick()
        assert self.heard(manager) == ["STATUS=all well"]
        assert watchdog.wait_s(1.0) == 1.0
