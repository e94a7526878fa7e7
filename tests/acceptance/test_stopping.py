"""A stop finishes what is in hand and leaves the rest where the next start finds it."""

import signal

import pytest

from tests.support.record import sha256
from tests.support.waits import PATIENCE_S, wait_for

BEFORE, COUNT = 10, 60


@pytest.fixture
def contents(picture):
    return [picture(number) for number in range(COUNT)]


def drop(home, contents):
    for content in contents:
        home.drop(f"{sha256(content)}.png", content, old=True)


def signal_in_the_middle(home, run, contents, number):
    """Send a signal when some files have their ends and most wait, however slow this process is."""
    wait_for(lambda: any(row.has_ended for row in home.rows()), run.log)
    run.suspend()
    drop(home, contents[BEFORE:])
    run.process.send_signal(number)
    run.resume()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_drains_and_exits_0_and_the_next_start_takes_the_rest(make_home, contents, number):
    home = make_home(MAX_IN_FLIGHT="4")
    drop(home, contents[:BEFORE])
    with home.daemon() as daemon:
        signal_in_the_middle(home, daemon, contents, number)
        assert daemon.process.wait(PATIENCE_S) == 0, daemon.log()
    left = home.files("incoming")
    assert 0 < len(left) < COUNT
    assert home.files("work") == []
    assert all(row.has_ended for row in home.rows())
    assert len(home.rows()) + len(left) == COUNT
    assert home.run_once().returncode == 0
    home.assert_settled(contents)


def test_a_stop_that_may_not_wait_leaves_work_that_the_next_start_finishes(make_home, contents):
    home = make_home(DRAIN_S="0", MAX_IN_FLIGHT="30")
    drop(home, contents[:BEFORE])
    with home.daemon() as daemon:
        signal_in_the_middle(home, daemon, contents, signal.SIGTERM)
        assert daemon.process.wait(PATIENCE_S) == 0, daemon.log()
        assert "Traceback" not in daemon.log()
    assert len(home.files("incoming", "work")) > 0
    assert home.run_once().returncode == 0
    home.assert_settled(contents)


def test_a_stop_ends_run_once_early_too(make_home, contents):
    """Interrupted, it does not say that every file has an end."""
    home = make_home(MAX_IN_FLIGHT="1")
    with home.daemon() as daemon:
        daemon.kill()  # the database is made, and can be asked
    drop(home, contents[:BEFORE])
    run = home.daemon("--once").launch()
    signal_in_the_middle(home, run, contents, signal.SIGTERM)
    status = run.process.wait(PATIENCE_S)
    assert home.files("incoming"), run.log()
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
