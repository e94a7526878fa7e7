"""A stop finishes what is in hand and leaves the rest where the next start finds it."""

import signal
import time

import pytest

COUNT = 40


def drop_many(home, picture):
    contents = [picture(number) for number in range(COUNT)]
    for number, content in enumerate(contents):
        home.drop(f"{number:02}.png", content, old=True)
    return contents


def wait_for_first_end(home):
    deadline = time.monotonic() + 30
    while not any(row.has_ended for row in home.rows()):
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_drains_and_exits_0_and_the_next_start_takes_the_rest(make_home, picture, number):
    home = make_home(MAX_IN_FLIGHT="4")
    contents = drop_many(home, picture)
    with home.daemon() as daemon:
        wait_for_first_end(home)
        daemon.process.send_signal(number)
        assert daemon.process.wait(60) == 0, daemon.stderr()
    left = home.files("incoming")
    assert 0 < len(left) < COUNT
    assert home.files("work") == []
    assert all(row.has_ended for row in home.rows())
    assert len(home.rows()) + len(left) == COUNT
    assert home.run_once().returncode == 0
    home.assert_settled(contents)


def test_a_stop_that_may_not_wait_leaves_work_that_the_next_start_finishes(make_home, picture):
    home = make_home(DRAIN_S="0", MAX_IN_FLIGHT="30")
    contents = drop_many(home, picture)
    with home.daemon() as daemon:
        wait_for_first_end(home)
        assert daemon.stop() == 0, daemon.stderr()
        assert "Traceback" not in daemon.stderr()
    assert len(home.files("incoming", "work")) > 0
    assert home.run_once().returncode == 0
    home.assert_settled(contents)


def test_a_stop_ends_run_once_early_too(make_home, picture):
    """Interrupted, it does not say that every file has an end."""
    home = make_home(MAX_IN_FLIGHT="1")
    contents = drop_many(home, picture)
    with home.daemon() as daemon:
        daemon.kill()
    run = home.daemon("--once").launch()
    wait_for_first_end(home)
    status = run.stop()
    assert home.files("incoming"), run.stderr()
    assert status == 1
    assert home.run_once().returncode == 0
    home.assert_settled(contents)


def test_a_second_daemon_on_the_same_home_is_refused(make_home, picture):
    home = make_home()
    with home.daemon() as daemon:
        second = home.command("run")
        assert second.returncode == 1
        (line,) = second.stderr.splitlines()
        assert "another lungwatch process" in line
        content = picture(1)
        home.drop("x.png", content)
        home.wait_until_ended([content])
        assert daemon.stop() == 0
    # The lock dies with its holder: nothing has to be cleaned up by hand.
    with home.daemon() as daemon:
        daemon.kill()
    assert home.run_once().returncode == 0
